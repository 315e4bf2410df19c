"""How well scores rank and separate: per finding, macro, with patient-grouped intervals.

A finding that can't be measured (no positives, no negatives, nothing known) says so in its
``note`` and is left out of the macro average; nothing becomes 0.5 in silence.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import rankdata, t

from ctclip.evaluation import bootstrap
from ctclip.evaluation.delong import logit_interval
from ctclip.evaluation.scores import ScoreTable

FEW_PATIENTS = 20
"""Below this many positive or negative patients, a finding's result is called rough."""

LEARNT_AUROC = 0.70
"""A finding counts as learnt from this AUROC on the development split on. The choice is never made
on the held-out patients, and findings that fall short are shown all the same."""

CONSTANT = "one score for all cases: nothing is ranked"
"""Note of a finding whose AUROC of 0.5 was no measurement."""

RESAMPLED_PATIENTS = 50
"""Patients that either class needs for percentiles of a bootstrap to hold what they promise."""


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; ties count one half.

    Args:
        labels: ``(N,)`` 1, 0 or nan (left out).
        scores: ``(N,)``; nan is left out.

    Returns:
        nan where only one class is known.
    """
    label, score = known(labels, scores)
    positives = int(label.sum())
    negatives = len(label) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    ranks = rankdata(score)[label].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def auroc_interval(
    labels: np.ndarray, scores: np.ndarray, patient_id: np.ndarray, replicates: np.ndarray
) -> tuple[float, float]:
    """95 % interval of one AUROC: percentiles of the bootstrap, or with few patients the logit.

    Resampling a dozen patients can't show how another dozen would rank, and its percentiles are
    too narrow; benchmarks/coverage.py has the figures.

    Args:
        labels: ``(N,)`` 1, 0 or nan (left out).
        scores: ``(N,)``; nan is left out.
        patient_id: ``(N,)``.
        replicates: ``(R,)`` AUROC in each bootstrap replicate; none, no interval.
    """
    mask = ~np.isnan(labels) & ~np.isnan(scores)
    label, score = known(labels, scores)
    patient = patient_id[mask]
    few = min(len(np.unique(patient[side])) for side in (label, ~label))
    if len(replicates) and 2 <= few < RESAMPLED_PATIENTS:
        return logit_interval(label, score, patient)
    return bootstrap.interval(replicates)


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve, step-wise as scikit-learn defines it."""
    label, score = known(labels, scores)
    if label.all() or not label.any():
        return float("nan")
    return float(weighted_average_precision(label, score, np.ones((len(label), 1)))[0])


def weighted_average_precision(
    label: np.ndarray, score: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Average precision under ``R`` sets of case weights; a :data:`bootstrap.Statistic`.

    Args:
        label: ``(n,)`` bool.
        score: ``(n,)``.
        weights: ``(n, R)``.

    Returns:
        ``(R,)``; nan where no positive has weight.
    """
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    sorted_weights = weights[order]
    total = np.cumsum(sorted_weights, axis=0)[ends]
    hits = np.cumsum(sorted_weights * label[order, None], axis=0)[ends]
    precision = np.divide(hits, total, out=np.zeros_like(hits), where=total > 0)
    gained = np.diff(hits, axis=0, prepend=0)
    area = (gained * precision).sum(axis=0)
    return np.divide(area, hits[-1], out=np.full(area.shape, np.nan), where=hits[-1] > 0)


def average_precision_interval(
    point: float, replicates: np.ndarray, patients: float
) -> tuple[float, float]:
    """95 % interval of an average precision, or of a mean of them: logit scale, less the bias.

    Average precision is biased upwards in small samples, and a bootstrap, where a case drawn twice
    ties with itself, adds the same bias once more; over 18 findings the spread averages out and
    the bias stays, so that percentiles of a macro miss the truth. What the replicates exceed the
    point by is taken off it, and the spread is that of their logits (the scale: Boyd, Eng and Page
    2013; the bias: Efron and Tibshirani 1993, chapter 10) with Student's t for few patients;
    benchmarks/coverage.py has the figures.

    Args:
        point: The average precision, or the mean.
        replicates: ``(R,)`` the same in each bootstrap replicate; none, no interval.
        patients: In the smaller class; for a mean, on average over its findings.
    """
    values = bootstrap.defined(replicates)
    if np.isnan(bootstrap.interval(replicates)[0]) or np.isnan(point) or patients < 2:
        return float("nan"), float("nan")
    if point == 1.0 and values.min() == 1.0:  # nothing varies: Clopper-Pearson's end of m out of m
        return float(0.025 ** (1.0 / patients)), 1.0
    logits = logit(np.clip(values, 1e-3, 1 - 1e-3))
    centre = 2 * float(logit(np.clip(point, 1e-3, 1 - 1e-3))) - logits.mean()
    half = t.ppf(0.975, patients - 1) * logits.std(ddof=1)
    low, high = expit(centre - half), expit(centre + half)
    return min(float(low), point), max(float(high), point)


def sensitivity_at_specificity(
    labels: np.ndarray, scores: np.ndarray, specificity: float = 0.9
) -> float:
    """Highest sensitivity of any threshold on these scores with at least that specificity."""
    label, score = known(labels, scores)
    if label.all() or not label.any():
        return float("nan")
    negatives = np.sort(score[~label])
    index = int(np.ceil(specificity * len(negatives) - 1e-9)) - 1
    cut = negatives[index] if index >= 0 else -np.inf
    return float((score[label] > cut).mean())


def known(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cases with a known label and a score: labels as bool, scores as they are."""
    mask = ~np.isnan(labels) & ~np.isnan(scores)
    return labels[mask] == 1.0, scores[mask]


@dataclass(frozen=True, kw_only=True)
class FindingResult:
    """What is known about one finding. Interval ends are nan where there is no interval."""

    finding: str
    positives: int
    negatives: int
    unknown: int
    """Cases without a label."""

    unscored: int
    """Cases with a label, but without a score."""

    positive_patients: int
    prevalence: float
    auroc: float
    auroc_low: float = float("nan")
    auroc_high: float = float("nan")
    average_precision: float = float("nan")
    average_precision_low: float = float("nan")
    average_precision_high: float = float("nan")
    sensitivity_at_90_specificity: float = float("nan")
    note: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Result of :func:`evaluate` for one score table."""

    model: str
    findings: list[FindingResult]
    macro: dict[str, float]
    """Mean over the ``num_findings`` that could be measured, with its interval."""

    cases: int
    patients: int
    split: str
    """Of the cases, in words."""

    header: dict[str, Any] = field(default_factory=dict)
    replicates: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    """``(R, K)`` AUROC in each bootstrap replicate."""

    def frame(self) -> pd.DataFrame:
        """One row per finding."""
        return pd.DataFrame([asdict(result) for result in self.findings])

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined numbers are ``None``."""
        rows = [asdict(result) for result in self.findings]
        plain: dict[str, Any] = _without_nan(
            {
                "model": self.model,
                "cases": self.cases,
                "patients": self.patients,
                "split": self.split,
                "header": self.header,
                "macro": self.macro,
                "findings": rows,
            }
        )
        return plain


def evaluate(table: ScoreTable, *, replicates: int = 1000, seed: int = 0) -> Evaluation:
    """Per-finding and macro AUROC and average precision with 95 % intervals.

    Args:
        table: Scores of one model; every row is used.
        replicates: Patient-grouped bootstrap replicates; 0 leaves the intervals out.
        seed: Seed of the draws.

    Returns:
        The evaluation. Findings are in the table's order.
    """
    if len(np.unique(table.patient_id)) < 2:
        replicates = 0
    draws = bootstrap.draw(table.patient_id, replicates, seed)
    areas = bootstrap.replicate(draws, table.labels, table.scores)
    precisions = bootstrap.replicate(
        draws, table.labels, table.scores, statistic=weighted_average_precision
    )
    results, few = [], []
    for k, finding in enumerate(table.findings):
        labels, scores = table.labels[:, k], table.scores[:, k]
        label, _ = known(labels, scores)
        mask = ~np.isnan(labels) & ~np.isnan(scores)
        positives, negatives = int(label.sum()), int((~label).sum())
        sick = len(np.unique(table.patient_id[mask][label]))
        well = len(np.unique(table.patient_id[mask][~label]))
        patients = len(np.unique(table.patient_id[mask]))
        unscored = int((~np.isnan(labels) & np.isnan(scores)).sum())
        low = high = precision_low = precision_high = float("nan")
        if patients > 1:  # every draw of one patient is that patient: a width of zero says nothing
            low, high = auroc_interval(labels, scores, table.patient_id, areas[:, k])
        few.append(min(sick, well))
        precision = average_precision(labels, scores)
        precision_low, precision_high = average_precision_interval(
            precision, precisions[:, k], few[-1]
        )
        results.append(
            FindingResult(
                finding=finding,
                positives=positives,
                negatives=negatives,
                unknown=int(np.isnan(labels).sum()),
                unscored=unscored,
                positive_patients=sick,
                prevalence=positives / len(label) if len(label) else float("nan"),
                auroc=auroc(labels, scores),
                auroc_low=low,
                auroc_high=high,
                average_precision=precision,
                average_precision_low=precision_low,
                average_precision_high=precision_high,
                sensitivity_at_90_specificity=sensitivity_at_specificity(labels, scores),
                note=_note(label, table.scores[mask, k], unscored, patients, few[-1]),
            )
        )
    return Evaluation(
        model=table.name,
        findings=results,
        macro=_macro(results, few, areas, precisions),
        cases=len(table),
        patients=len(np.unique(table.patient_id)),
        split=table.split_name,
        header=dict(table.header),
        replicates=areas,
    )


def mean_over_findings(replicates: np.ndarray) -> np.ndarray:
    """``(R, K)`` to ``(R,)``: the macro average of each replicate over what it could measure."""
    defined = ~np.isnan(replicates)
    counts = defined.sum(axis=1)
    sums = np.where(defined, replicates, 0.0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _macro(
    results: list[FindingResult], few: list[int], areas: np.ndarray, precisions: np.ndarray
) -> dict[str, float]:
    measured = [k for k, result in enumerate(results) if not np.isnan(result.auroc)]
    macro: dict[str, float] = {"num_findings": float(len(measured))}
    for name in ("auroc", "average_precision"):
        values = [getattr(results[k], name) for k in measured]
        macro[name] = float(np.mean(values)) if values else float("nan")
    macro["auroc_low"], macro["auroc_high"] = bootstrap.interval(mean_over_findings(areas))
    macro["average_precision_low"], macro["average_precision_high"] = average_precision_interval(
        macro["average_precision"],
        mean_over_findings(precisions),
        float(np.mean([few[k] for k in measured])) if measured else 0.0,
    )
    return macro


def _note(label: np.ndarray, score: np.ndarray, unscored: int, patients: int, smaller: int) -> str:
    if not len(label):
        return f"{'no scores' if unscored else 'nothing known'}: not measured"
    if not label.any():
        return "no positives: not measured"
    if label.all():
        return "no negatives: not measured"
    if score.min() == score.max():
        return CONSTANT
    if patients == 1:
        return "rough: a single patient, no interval"
    if smaller < FEW_PATIENTS:
        count = "1 patient" if smaller == 1 else f"{smaller} patients"
        return f"rough: {count} in the smaller class"
    return ""


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float | np.floating) and np.isnan(value):
        return None
    return value
