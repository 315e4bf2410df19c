"""Uncertain findings: AUROC when "possible" counts as present, as absent, or not at all.

Reports hedge ("may represent consolidation"). A label table hides it behind a 1 or a 0; the three
readings show how much of a number hangs on that choice, and where hedged cases score themselves.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctclip.evaluation import metrics


@dataclass(frozen=True, kw_only=True)
class Readings:
    """One finding under the three readings of "possible"."""

    finding: str
    certain: int
    uncertain: int
    left_out: float
    as_present: float
    as_absent: float
    rank: float
    """Mean percentile of hedged cases between the certain ones: 0 scores like absent, 1 present."""


def read_reports(path: str | Path) -> dict[str, str]:
    """Report texts of a manifest, by volume and by study; the scans needn't be there.

    Args:
        path: CSV with ``volume_id`` (or ``path``), ``study_id`` or both, and ``report`` or
            ``findings`` and ``impression``. The first volume with a text speaks for its study.

    Raises:
        ValueError: If a column is missing, or no row has a report.
    """
    from ctclip.data.manifest import volume_stem
    from ctclip.data.report import report_text

    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = set(rows[0]) if rows else set()
    if not columns & {"volume_id", "path", "study_id"}:
        raise ValueError(f"{path}: no column volume_id, path or study_id says whose report it is")
    texts: dict[str, str] = {}
    for row in rows:
        text = row.get("report") or report_text(row.get("findings"), row.get("impression"))
        volume = row.get("volume_id") or volume_stem(row.get("path") or "")
        for name in (volume, row.get("study_id")):
            if name and text:
                texts.setdefault(name, text)
    if not texts:
        raise ValueError(f"{path}: no row has a report; expected report, findings or impression")
    return texts


def hedged_findings(texts: Sequence[str], findings: Sequence[str]) -> np.ndarray:
    """``(N, K)`` bool: the report affirms a finding, and only with a hedge ("possible ...")."""
    from ctclip.data.mentions import mentions

    found = np.zeros((len(texts), len(findings)), dtype=bool)
    for row, text in enumerate(texts):
        certain: dict[str, bool] = {}
        for mention in mentions(text):
            if mention.present:
                was = certain.get(mention.finding, False)
                certain[mention.finding] = was or not mention.hedged
        found[row] = [finding in certain and not certain[finding] for finding in findings]
    return found


def relabelled(labels: np.ndarray, hedged: np.ndarray) -> dict[str, np.ndarray]:
    """Labels of one finding under each reading of its hedged cases: name to ``(N,)``."""
    out = np.where(hedged, np.nan, labels)
    return {
        "left out": out,
        "as present": np.where(hedged, 1.0, out),
        "as absent": np.where(hedged, 0.0, out),
    }


def readings(finding: str, labels: np.ndarray, hedged: np.ndarray, scores: np.ndarray) -> Readings:
    """Evaluate one finding three ways.

    Args:
        finding: Its name.
        labels: ``(N,)`` 1, 0 or nan.
        hedged: ``(N,)`` bool: the finding is only suspected, whatever the label says.
        scores: ``(N,)``.
    """
    read = relabelled(labels, hedged)
    out = np.where(np.isnan(scores), np.nan, read["left out"])
    positive, negative = np.sort(scores[out == 1.0]), np.sort(scores[out == 0.0])
    suspected = scores[hedged & ~np.isnan(scores)]
    rank = float("nan")
    if len(positive) and len(negative) and len(suspected):
        above_negative = np.searchsorted(negative, suspected) / len(negative)
        above_positive = np.searchsorted(positive, suspected) / len(positive)
        rank = float((above_negative + above_positive).mean() / 2)
    return Readings(
        finding=finding,
        certain=len(positive) + len(negative),
        uncertain=len(suspected),
        left_out=metrics.auroc(read["left out"], scores),
        as_present=metrics.auroc(read["as present"], scores),
        as_absent=metrics.auroc(read["as absent"], scores),
        rank=rank,
    )
