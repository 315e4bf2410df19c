"""Uncertain findings: AUROC when "possible" counts as present, as absent, or not at all.

Reports hedge ("may represent consolidation"). A label table hides it behind a 1 or a 0; the three
readings show how much of a number hangs on that choice, and where hedged cases score themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


def mentioned(texts: Sequence[str], finding: str) -> tuple[np.ndarray, np.ndarray]:
    """What reports say about a finding.

    Returns:
        ``(N,)`` labels: 1 affirmed (hedged or not), 0 denied, nan not mentioned; and ``(N,)``
        bool, whether every affirmation is hedged.
    """
    from ctclip.data.mentions import mentions

    labels, hedged = np.full(len(texts), np.nan), np.zeros(len(texts), dtype=bool)
    for row, text in enumerate(texts):
        found = [mention for mention in mentions(text) if mention.finding == finding]
        affirmed = [mention for mention in found if mention.present]
        if found:
            labels[row] = float(bool(affirmed))
        hedged[row] = bool(affirmed) and all(mention.hedged for mention in affirmed)
    return labels, hedged


def readings(finding: str, labels: np.ndarray, hedged: np.ndarray, scores: np.ndarray) -> Readings:
    """Evaluate one finding three ways.

    Args:
        finding: Its name.
        labels: ``(N,)`` 1, 0 or nan.
        hedged: ``(N,)`` bool: the label is only suspected.
        scores: ``(N,)``.
    """
    known = ~np.isnan(labels) & ~np.isnan(scores)
    certain = known & ~hedged
    out = np.where(certain, labels, np.nan)
    positive = np.sort(scores[certain & (labels == 1.0)])
    negative = np.sort(scores[certain & (labels == 0.0)])
    suspected = scores[known & hedged]
    rank = float("nan")
    if len(positive) and len(negative) and len(suspected):
        above_negative = np.searchsorted(negative, suspected) / len(negative)
        above_positive = np.searchsorted(positive, suspected) / len(positive)
        rank = float((above_negative + above_positive).mean() / 2)
    return Readings(
        finding=finding,
        certain=int(certain.sum()),
        uncertain=int((known & hedged).sum()),
        left_out=metrics.auroc(out, scores),
        as_present=metrics.auroc(np.where(known & hedged, 1.0, out), scores),
        as_absent=metrics.auroc(np.where(known & hedged, 0.0, out), scores),
        rank=rank,
    )
