"""What a zero-shot score has meant in the archive: the share of like-scored cases with the finding.

A raw score ranks scans but is no probability. The archive has both scores and labels, so a new
score can be read against the cases that scored alike.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ctclip.embeddings import EmbeddingTable
from ctclip.findings import FINDINGS
from ctclip.retrieval.metrics import one_row_per_study

MAX_BINS = 20
CASES_PER_BIN = 15
"""Fewer make the interval too wide to read."""

Z_95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One finding of one scan."""

    finding: str
    score: float
    """Zero-shot score in [0, 1]."""

    share: float | None
    """Of the archive's like-scored cases, how many are labelled with the finding."""

    low: float | None
    high: float | None
    """95 % Wilson interval of the share."""

    operating_share: float | None
    """The share at the operating point, to draw beside ``share``."""

    is_above: bool | None
    """Whether the score is above the operating point; None where there is none."""

    sensitivity: float | None
    specificity: float | None
    """Of the operating point on the archive's own labels, where it was chosen: optimistic."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Labels by score, per finding; small enough for an index's header."""

    edges: list[list[float]]
    """Per finding, the inner edges of its score bins."""

    known: list[list[int]]
    positive: list[list[int]]
    threshold: list[float | None]
    """Youden's: the score that maximises sensitivity + specificity; None without both classes."""

    sensitivity: list[float | None]
    specificity: list[float | None]

    @classmethod
    def of(cls, table: EmbeddingTable) -> "Reference | None":
        """Bin a table's cases by score; None where it has no scores."""
        if table.scores is None:
            return None
        cases = one_row_per_study(table)
        assert cases.scores is not None
        columns: dict[str, list[Any]] = {name: [] for name in cls.__dataclass_fields__}
        for index in range(len(FINDINGS)):
            labelled = ~np.isnan(cases.labels[:, index])
            scores = cases.scores[labelled, index]
            labels = cases.labels[labelled, index] == 1
            num_bins = int(np.clip(len(scores) // CASES_PER_BIN, 1, MAX_BINS))
            quantiles = np.linspace(0, 1, num_bins + 1)[1:-1]
            edges = np.unique(np.quantile(scores, quantiles)) if len(scores) else np.empty(0)
            bins = np.searchsorted(edges, scores, side="right")
            columns["edges"].append(edges.tolist())
            columns["known"].append(np.bincount(bins, minlength=len(edges) + 1).tolist())
            columns["positive"].append(np.bincount(bins[labels], minlength=len(edges) + 1).tolist())
            for name, value in zip(
                ("threshold", "sensitivity", "specificity"), _youden(scores, labels), strict=True
            ):
                columns[name].append(value)
        return cls(**columns)

    def read(self, scores: np.ndarray) -> list[Reading]:
        """Read ``(18,)`` scores of one scan."""
        readings = []
        for index, finding in enumerate(FINDINGS):
            score, threshold = float(scores[index]), self.threshold[index]
            share, low, high = self._share(index, score)
            at_threshold = None if threshold is None else self._share(index, threshold)[0]
            readings.append(
                Reading(
                    finding=finding,
                    score=score,
                    share=share,
                    low=low,
                    high=high,
                    operating_share=at_threshold,
                    is_above=None if threshold is None else score > threshold,
                    sensitivity=self.sensitivity[index],
                    specificity=self.specificity[index],
                )
            )
        return readings

    def positives(self, scores: np.ndarray) -> np.ndarray:
        """``(18,)`` 1 above the operating point, 0 below, nan where there is none."""
        above = [reading.is_above for reading in self.read(scores)]
        return np.array([np.nan if value is None else float(value) for value in above])

    def _share(self, index: int, score: float) -> tuple[float | None, float | None, float | None]:
        at = int(np.searchsorted(self.edges[index], score, side="right"))
        known, positive = self.known[index][at], self.positive[index][at]
        return wilson(positive, known) if known else (None, None, None)


def findings_of(
    scores: np.ndarray | None, labels: np.ndarray | None, reference: Reference | None
) -> np.ndarray | None:
    """``(18,)`` findings of a case: by score where there is an operating point, else by label.

    Args:
        scores: ``(18,)`` zero-shot scores, None where there are none.
        labels: ``(18,)`` 1, 0 or nan, None where nobody labelled the case.
        reference: Operating points.
    """
    if scores is None or reference is None:
        return labels
    by_score = reference.positives(scores)
    return by_score if labels is None else np.where(np.isnan(by_score), labels, by_score)


def read_without_reference(scores: np.ndarray) -> list[Reading]:
    """Scores of a scan where the archive offers nothing to read them against."""
    return [
        Reading(
            finding=finding,
            score=float(score),
            share=None,
            low=None,
            high=None,
            operating_share=None,
            is_above=None,
            sensitivity=None,
            specificity=None,
        )
        for finding, score in zip(FINDINGS, scores, strict=True)
    ]


def wilson(successes: int, trials: int) -> tuple[float, float, float]:
    """A share with its 95 % Wilson score interval."""
    share = successes / trials
    centre = share + Z_95**2 / (2 * trials)
    half = Z_95 * np.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2))
    scale = 1 + Z_95**2 / trials
    return share, max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))


def _youden(
    scores: np.ndarray, labels: np.ndarray
) -> tuple[float, float, float] | tuple[None, None, None]:
    if not labels.any() or labels.all():
        return None, None, None
    values = np.unique(scores)
    cuts = np.concatenate([[values[0] - 1e-6], (values[1:] + values[:-1]) / 2])
    positive, negative = np.sort(scores[labels]), np.sort(scores[~labels])
    sensitivity = 1 - np.searchsorted(positive, cuts, side="right") / len(positive)
    specificity = np.searchsorted(negative, cuts, side="right") / len(negative)
    best = int(np.argmax(sensitivity + specificity))
    return float(cuts[best]), float(sensitivity[best]), float(specificity[best])
