"""Which labels are probably wrong, and why: suspects from image, label and report together.

Per finding, a probe that never saw the patient scores every volume; the noise model
(:mod:`ctclip.evaluation.noise`) turns score, label and what the report says into a chance that the
label is wrong and into a noise rate with an interval; cleanlab's confident learning gives a second
opinion; the report's own sentence stands beside each suspect. Labels have three states: unknown
ones are never trained on, counted or listed, only given the probe's opinion.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.special import expit

from ctclip.evaluation import metrics, noise, probes
from ctclip.findings import FINDINGS
from ctclip.progress import track

if TYPE_CHECKING:
    from ctclip.embeddings import EmbeddingTable

logger = logging.getLogger(__name__)

Text = Literal["affirmed", "denied", "not mentioned", "no report"]
READINGS = {"affirmed": noise.AFFIRMED, "denied": noise.DENIED}
Said = dict[str, tuple[Text, str]]
"""Finding to what one report says about it, and the sentence that says so."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How labels are audited."""

    num_folds: int = 5
    replicates: int = 100
    """Bootstrap fits behind the noise rate's interval."""

    suspicion: float = 0.5
    """Labels whose chance of being wrong is above this are listed."""

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.suspicion < 1:
            raise ValueError(f"suspicion is a chance between 0 and 1, got {self.suspicion}")


@dataclass(frozen=True, kw_only=True, eq=False)
class FindingAudit:
    """What is known about one finding's labels."""

    finding: str
    known: int
    unknown: int
    positives: int
    auroc: float
    """Of the out-of-fold probe against the labels; nan where there are too few patients."""

    estimate: noise.NoiseEstimate | None = None
    logits: np.ndarray = field(default_factory=lambda: np.empty(0))
    """``(N,)`` out-of-fold log-odds."""

    is_flagged: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool))
    """``(N,)`` cleanlab's verdict; all False where cleanlab isn't installed."""

    contradicted: int = 0
    """Known labels that the case's report contradicts."""

    note: str = ""

    @property
    def is_identified(self) -> bool:
        """Whether the noise rate means anything."""
        return self.estimate is not None and self.estimate.is_identified


@dataclass(frozen=True, kw_only=True, eq=False)
class Audit:
    """The audit of one table of embeddings."""

    findings: list[FindingAudit]
    suspects: pd.DataFrame
    """Ranked, most suspicious first; see :func:`audit`."""

    def rates(self) -> pd.DataFrame:
        """One row per finding: the noise estimate with its intervals."""
        rows = []
        for found in self.findings:
            row: dict[str, Any] = {
                "finding": found.finding,
                "known": found.known,
                "unknown": found.unknown,
                "positives": found.positives,
                "probe_auroc": found.auroc,
                "contradicted_by_report": found.contradicted,
            }
            if found.estimate is not None:
                values = asdict(found.estimate)
                del values["model"], values["posterior"], values["chance"]
                row |= values if found.is_identified else {}
                row["flagged_by_cleanlab"] = int(found.is_flagged.sum())
            row["note"] = found.note
            rows.append(row)
        return pd.DataFrame(rows)


def audit(
    table: "EmbeddingTable",
    texts: Mapping[str, str] | None = None,
    config: AuditConfig | None = None,
) -> Audit:
    """Audit the labels of a table.

    Args:
        table: Embeddings with labels; every row is used, whatever its split.
        texts: Volume to report text. Where there are any, reports are evidence beside the image.
        config: Folds, replicates, threshold.

    Returns:
        Noise rates and suspects. A suspect has ``volume_id, study_id, patient_id, finding, label,
        p_present, p_wrong, cleanlab, report, sentence, reason, decision``; ``decision`` is empty
        for a reader to fill with ``keep``, ``flip`` or ``unknown``.
    """
    config = config or AuditConfig()
    patient_id = np.asarray(table.patient_id)
    said = read_reports(texts or {}, table.volume_id)
    findings, frames = [], []
    for k in track(range(len(FINDINGS)), len(FINDINGS), "audit", "finding"):
        found = _audit_finding(table, k, patient_id, said, config)
        findings.append(found)
        frames.append(_suspects(table, k, found, said, config))
    suspects = pd.concat(frames, ignore_index=True)
    suspects = suspects.sort_values(
        ["p_wrong", "finding", "volume_id"], ascending=[False, True, True], ignore_index=True
    )
    return Audit(findings=findings, suspects=suspects)


def cleaned(labels: np.ndarray, audit: Audit, threshold: float = 0.5) -> np.ndarray:
    """Labels with every identified finding's suspects flipped: ``(N, 18)``.

    The automatic form of a review, for retraining a probe; unknown labels stay unknown.
    """
    out = labels.copy()
    for k, found in enumerate(audit.findings):
        if found.estimate is None or not found.is_identified:
            continue
        wrong = np.nan_to_num(found.estimate.posterior) > threshold
        out[wrong, k] = 1.0 - out[wrong, k]
    return out


def read_reports(texts: Mapping[str, str], volume_id: Sequence[str]) -> list[Said | None]:
    """What each volume's report says; ``None`` where there is no report."""
    return [_said(texts[volume]) if texts.get(volume) else None for volume in volume_id]


def readings(said: Sequence[Said | None], finding: str) -> np.ndarray:
    """``(N,)`` what each report says about a finding, as the noise model counts it."""
    found = [_about(row, finding)[0] for row in said]
    return np.array([READINGS.get(text, noise.SILENT) for text in found], dtype=np.int64)


def _audit_finding(
    table: "EmbeddingTable",
    k: int,
    patient_id: np.ndarray,
    said: Sequence[Said | None],
    config: AuditConfig,
) -> FindingAudit:
    labels = table.labels[:, k].astype(np.float64)
    known = ~np.isnan(labels)
    logits = probes.out_of_fold(
        table.vectors, labels, patient_id, num_folds=config.num_folds, seed=config.seed
    )
    read = readings(said, FINDINGS[k])
    against = np.where(labels == 1.0, noise.DENIED, noise.AFFIRMED)
    counts: dict[str, Any] = {
        "finding": FINDINGS[k],
        "known": int(known.sum()),
        "unknown": int((~known).sum()),
        "positives": int((labels == 1.0).sum()),
        "contradicted": int((known & (read == against)).sum()),
    }
    if np.isnan(logits).all():
        note = f"fewer than {config.num_folds} patients of one class: not audited"
        return FindingAudit(**counts, auroc=float("nan"), note=note)
    found = noise.estimate(
        logits, labels, patient_id, readings=read, replicates=config.replicates, seed=config.seed
    )
    note = ""
    if not found.is_identified:
        note = "the embeddings don't see this finding well enough to judge its labels"
    return FindingAudit(
        **counts,
        auroc=metrics.auroc(labels, logits),
        estimate=found,
        logits=logits,
        is_flagged=_confident_learning(labels, expit(logits)),
        note=note,
    )


def _confident_learning(labels: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Cleanlab's multi-label issues of one finding, over its known labels only."""
    flagged = np.zeros(len(labels), dtype=bool)
    try:
        from cleanlab.multilabel_classification import filter as multilabel
    except ImportError:
        logger.info("cleanlab isn't installed (pip install ctclip[audit]): no second opinion")
        return flagged
    rows = np.flatnonzero(~np.isnan(labels))
    issues = multilabel.find_multilabel_issues_per_class(
        [[0] if labels[row] == 1.0 else [] for row in rows], chance[rows, None], n_jobs=1
    )
    flagged[rows] = np.asarray(issues).reshape(-1)
    return flagged


def _suspects(
    table: "EmbeddingTable",
    k: int,
    found: FindingAudit,
    said: Sequence[Said | None],
    config: AuditConfig,
) -> pd.DataFrame:
    columns = ["volume_id", "study_id", "patient_id", "finding", "label", "p_present", "p_wrong",
               "cleanlab", "report", "sentence", "reason", "decision"]  # fmt: skip
    rows = []
    labels = table.labels[:, k]
    posterior = np.zeros(len(table))
    disagrees = np.zeros(len(table), dtype=bool)
    if found.estimate is not None and found.is_identified:
        posterior = np.nan_to_num(found.estimate.posterior)
        disagrees = (found.estimate.chance > 0.5) != (labels == 1.0)
    for row in np.flatnonzero(~np.isnan(labels)).tolist():
        volume = table.volume_id[row]
        text, sentence = _about(said[row], found.finding)
        contradicted = {"affirmed": labels[row] == 0.0, "denied": labels[row] == 1.0}.get(text)
        if posterior[row] <= config.suspicion and not contradicted:
            continue
        identified = found.is_identified
        suspect = bool(posterior[row] > config.suspicion)
        rows.append(
            {
                "volume_id": volume,
                "study_id": table.study_id[row],
                "patient_id": table.patient_id[row],
                "finding": found.finding,
                "label": int(labels[row]),
                "p_present": float(expit(found.logits[row])) if len(found.logits) else np.nan,
                "p_wrong": float(posterior[row]) if identified else np.nan,
                "cleanlab": bool(len(found.is_flagged) and found.is_flagged[row]),
                "report": text,
                "sentence": sentence,
                "reason": _reason(
                    int(labels[row]), text, suspect, bool(disagrees[row]), identified
                ),
                "decision": "",
            }
        )
    return pd.DataFrame(rows, columns=columns)


def _said(text: str) -> Said:
    """What one report says of the findings that it mentions."""
    from ctclip.data.mentions import mentions

    found: Said = {}
    for mention in mentions(text):
        if mention.present:  # one affirmation outweighs denials, and its sentence is the evidence
            if found.get(mention.finding, ("denied", ""))[0] == "denied":
                found[mention.finding] = ("affirmed", mention.sentence)
        else:
            found.setdefault(mention.finding, ("denied", mention.sentence))
    return found


def _about(said: Said | None, finding: str) -> tuple[Text, str]:
    if said is None:
        return "no report", ""
    return said.get(finding, ("not mentioned", ""))


def _reason(
    label: int, text: Text, is_suspect: bool, image_disagrees: bool, is_identified: bool
) -> str:
    stands = f"labelled {'present' if label else 'absent'}"
    said = {"affirmed": "the report affirms it", "denied": "the report denies it"}.get(text)
    if said is None:
        silence = "no report to ask" if text == "no report" else "the report doesn't mention it"
        image = "the image suggests otherwise" if image_disagrees else "the image leaves it open"
        return f"{stands}, {image}; {silence}"
    if (text == "affirmed") == bool(label):
        return f"{stands}, {said}, the image doesn't: reader or model"
    if not is_identified:
        return f"{stands}, {said}: report and label differ; the image can't tell"
    if not is_suspect:
        # the chance counts how such contradictions turn out, which one image can't outweigh
        image = (
            "such labels are mostly right" if image_disagrees else "the image agrees with the label"
        )
        return f"{stands}, {said}: report and label differ; {image}"
    if image_disagrees:
        return f"{stands}, {said} and so does the image: labelling error"
    return f"{stands}, {said}; the image leaves it open"
