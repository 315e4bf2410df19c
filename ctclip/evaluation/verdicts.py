"""From evidence to a verdict per disease: is it learnt, and if not, whose fault is it?

The order of the questions matters. Labels come before size, because a target can only be called
invisible once its labels are trusted; and prompts come before size, because a finding that a
probe reads from the embedding is visible.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy.stats import mannwhitneyu

from ctclip.evaluation.noise import NoiseEstimate


class Verdict(str, Enum):
    """What the evidence says about one disease."""

    LEARNT = "learnt and generalises"
    OVERFITS = "overfits"
    LABELS = "not even fitted: labels suspect"
    SMALL = "not even fitted: target too small or too subtle for this input"
    SUBTLE = "not even fitted: target too subtle for this input"
    RISING = "not fitted yet: training AUROC still rises"
    PROMPTS = "seen by the image tower, not reached by its prompts"
    FEW = "too few cases to say"


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """Where one verdict ends and the next begins. Defaults are discussed in docs/evaluation.md."""

    min_patients: int = 10
    """Patients of either class, in training and in test, below which nothing is said."""

    fitted: float = 0.8
    """AUROC on the training set from which a finding counts as fitted."""

    gap: float = 0.05
    """AUROC lost from training to test from which a finding counts as overfitted."""

    noise: float = 0.03
    """AUROC that wrong labels must take away, at the interval's lower end, to be the reason."""

    missed: float = 0.05
    """Share of the true cases labelled absent, at the interval's lower end, from which labels are
    suspect even if a rank statistic hardly feels it: in a rare finding they are few among many."""

    rising: float = 0.02
    """Training AUROC gained over the last third of the checkpoints, above which more steps help."""


@dataclass(frozen=True, kw_only=True)
class SplitFit:
    """AUROC on one split."""

    auroc: float
    low: float
    high: float
    positive_patients: int
    negative_patients: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """Everything known about one disease."""

    finding: str
    train: SplitFit
    test: SplitFit
    development: SplitFit | None = None
    gap_low: float = float("nan")
    """Lower end of the interval of training minus test AUROC."""

    probe: float = float("nan")
    """Out-of-fold AUROC of a linear probe on the training embeddings."""

    noise: NoiseEstimate | None = None
    size_mm: float = float("nan")
    """Median size of the drawn or measured lesions; nan where unknown."""

    token_mm: float = float("nan")
    """Smallest edge of the piece of scan that one token sees."""

    seen_larger_p: float = float("nan")
    """One-sided p that lesions with high scores are larger than those with low ones."""

    agreement: float = float("nan")
    """Correlation of the scores of two reconstructions of one study, beyond the label."""

    curve: tuple[float, ...] = ()
    """Training AUROC over checkpoints, oldest first; the last is the one that is judged."""

    @property
    def rise(self) -> float:
        """Training AUROC gained over the last third of the curve; nan without one."""
        if len(self.curve) < 2:
            return float("nan")
        return self.curve[-1] - self.curve[-1 - max(len(self.curve) // 3, 1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """A verdict with what led to it and what to do next."""

    evidence: Evidence
    verdict: Verdict
    paragraph: str


def judge(evidence: Evidence, criteria: Criteria | None = None) -> Judgement:
    """Decide one disease."""
    criteria = criteria or Criteria()
    verdict = _verdict(evidence, criteria)
    sentences = [_facts(evidence), *_remarks(evidence, verdict, criteria), _ADVICE[verdict]]
    return Judgement(evidence=evidence, verdict=verdict, paragraph=" ".join(sentences))


def larger_where_seen(size_mm: np.ndarray, scores: np.ndarray) -> float:
    """One-sided p that the upper half of the scores has larger lesions than the lower half."""
    known = ~np.isnan(size_mm) & ~np.isnan(scores)
    if known.sum() < 12:
        return float("nan")
    upper = scores[known] > np.median(scores[known])
    if upper.all() or not upper.any():
        return float("nan")
    return float(
        mannwhitneyu(size_mm[known][upper], size_mm[known][~upper], alternative="greater").pvalue
    )


def _verdict(evidence: Evidence, criteria: Criteria) -> Verdict:
    train, test = evidence.train, evidence.test
    counts = [s for fit in (train, test) for s in (fit.positive_patients, fit.negative_patients)]
    if min(counts) < criteria.min_patients:
        return Verdict.FEW
    if _labels_are_the_reason(evidence, criteria):
        return Verdict.LABELS
    if train.auroc < criteria.fitted:
        reached = evidence.probe >= criteria.fitted and evidence.probe - train.auroc > criteria.gap
        if reached:
            return Verdict.PROMPTS
        if evidence.rise > criteria.rising:
            return Verdict.RISING
        return Verdict.SUBTLE if evidence.size_mm > evidence.token_mm else Verdict.SMALL
    if train.auroc - test.auroc > criteria.gap and evidence.gap_low > 0:
        return Verdict.OVERFITS
    return Verdict.LEARNT


def _labels_are_the_reason(evidence: Evidence, criteria: Criteria) -> bool:
    noise = evidence.noise
    if noise is None or not noise.is_identified:
        return False
    if noise.missed_low > criteria.missed:
        return True
    if not noise.auroc_lost_low > criteria.noise:
        return False
    only_false = noise.missed_low < 0.02 and noise.false_low > 0
    # what looks like a false label may be a lesion too small to see
    return not (only_false and evidence.seen_larger_p < 0.01)


def _facts(evidence: Evidence) -> str:
    parts = [f"AUROC {_fit(evidence.train)} on training data"]
    if evidence.development is not None:
        parts.append(f"{_fit(evidence.development)} on development data")
    parts.append(f"{_fit(evidence.test)} on test data")
    text = ", ".join(parts)
    if not np.isnan(evidence.probe):
        text += f"; a linear probe on the embeddings reaches {evidence.probe:.2f}"
    positives = f"{evidence.train.positive_patients} positive patients in training"
    return f"{text} ({positives})."


def _remarks(evidence: Evidence, verdict: Verdict, criteria: Criteria) -> list[str]:
    remarks = []
    noise = evidence.noise
    if noise is not None and noise.is_identified and noise.wrong_low > 0.005:
        remarks.append(
            f"About {100 * noise.wrong:.0f} % of the training labels look wrong "
            f"[{100 * noise.wrong_low:.0f}, {100 * noise.wrong_high:.0f}]: "
            f"{100 * noise.missed:.0f} % of the true cases are labelled absent, "
            f"{100 * noise.false:.0f} % of the others present."
        )
        if noise.false > noise.missed and np.isnan(evidence.size_mm) and verdict is Verdict.LABELS:
            remarks.append(
                "Lesions that are too small to see would look like this too; the review list "
                "tells which it is."
            )
    elif noise is not None and not noise.is_identified and verdict in _UNSEEN:
        remarks.append("The embeddings see too little of it to judge the labels.")
    if not np.isnan(evidence.size_mm):
        text = f"The median lesion measures {evidence.size_mm:.0f} mm"
        if not np.isnan(evidence.token_mm):
            text += f", a token {evidence.token_mm:.0f} mm"
        if evidence.seen_larger_p < 0.01:
            text += "; the lesions that score high are larger than those that score low"
        remarks.append(text + ".")
    if not np.isnan(evidence.agreement) and verdict in (*_UNSEEN, Verdict.LABELS):
        remarks.append(
            f"Two reconstructions of a study agree with r = {evidence.agreement:.2f}: "
            + (
                "what the model sees is in the patient, so doubt the labels first."
                if evidence.agreement > 0.7
                else "the score is mostly noise of the image."
            )
        )
    if evidence.rise > criteria.rising:
        step = max(len(evidence.curve) // 3, 1)
        remarks.append(
            f"Training AUROC is still rising ({evidence.rise:+.2f} over the last "
            f"{f'{step} checkpoints' if step > 1 else 'checkpoint'})."
        )
    elif np.isnan(evidence.rise) and verdict in _UNSEEN:
        remarks.append(
            "Without earlier checkpoints (--earlier), a training that stopped too soon can't be "
            "told from a target that can't be seen."
        )
    return remarks


def _fit(fit: SplitFit) -> str:
    if np.isnan(fit.auroc):
        return "not measurable"
    return f"{fit.auroc:.2f} [{fit.low:.2f}, {fit.high:.2f}]"


_UNSEEN = (Verdict.SMALL, Verdict.SUBTLE, Verdict.RISING)

_ADVICE = {
    Verdict.LEARNT: "Nothing to mend; spend the effort elsewhere.",
    Verdict.OVERFITS: (
        "Next: more patients with this finding, stronger augmentation or an earlier checkpoint; "
        "check that scanners and hospitals of training and test are alike."
    ),
    Verdict.LABELS: "Next: run the label audit, let a reader work through its list, train again.",
    Verdict.SMALL: (
        "Next: finer spacing or smaller tokens, regional scoring with top-k pooling, and the curve "
        "of eval/lesion_size.py; more steps only help where training AUROC is still rising."
    ),
    Verdict.SUBTLE: (
        "Its lesions are larger than a token, so contrast rather than size is what the input "
        "lacks. Next: a narrower window, finer spacing, regional scoring with top-k pooling."
    ),
    Verdict.RISING: "Next: train longer, and judge again once the curve is flat.",
    Verdict.PROMPTS: (
        "Next: other prompts or synonyms, sentence-level or opposite-sentence training; until "
        "then, use a linear probe."
    ),
    Verdict.FEW: "Next: gather cases; any number here would be luck.",
}
