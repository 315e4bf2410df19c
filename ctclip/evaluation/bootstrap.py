"""Patient-grouped bootstrap: patients are drawn with replacement, with all their volumes.

A replicate is a vector of how often each patient was drawn. The AUROC of a weighted sample is
a sum over one sorted order that all replicates share, so thousands of replicates cost one
cumulative sum. The same draws serve every finding and every model, which makes them paired.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CHUNK = 250
"""Replicates handled at once: small enough that the running sums stay in the cache."""

Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Draws:
    """How often each patient was drawn in each replicate."""

    patient: np.ndarray
    """``(N,)`` index of each case's patient."""

    counts: np.ndarray
    """``(chunks, P, CHUNK)`` float32."""

    replicates: int

    def weights(self, chunk: int, rows: np.ndarray) -> np.ndarray:
        """``(len(rows), CHUNK)`` weight of each case in each replicate of a chunk."""
        return np.take(self.counts[chunk], self.patient[rows], axis=0)


def draw(patient_id: np.ndarray, replicates: int, seed: int = 0) -> Draws:
    """Draw patients with replacement.

    Args:
        patient_id: ``(N,)`` one per case; cases of one patient are drawn together.
        replicates: Number of replicates; 0 gives no intervals.
        seed: Equal seeds and patients give equal draws.
    """
    _, patient = np.unique(patient_id, return_inverse=True)
    patients = int(patient.max()) + 1 if len(patient) else 0
    chunks = -(-replicates // CHUNK)
    counts = np.empty((chunks, patients, CHUNK), dtype=np.float32)
    rng = np.random.default_rng(seed)
    offset = np.arange(CHUNK) * patients
    for chunk in range(chunks):
        drawn = rng.integers(patients, size=(patients, CHUNK), dtype=np.int32) + offset
        flat = np.bincount(drawn.ravel(), minlength=patients * CHUNK)
        counts[chunk] = flat.reshape(CHUNK, patients).T
    return Draws(patient=patient, counts=counts, replicates=replicates)


def replicate(
    draws: Draws, labels: np.ndarray, scores: np.ndarray, statistic: Statistic | None = None
) -> np.ndarray:
    """A statistic in every replicate, for every finding.

    Args:
        draws: The replicates.
        labels: ``(N, K)``, nan = unknown and left out.
        scores: ``(N, K)``, nan = not scored and left out.
        statistic: Maps ``labels (n,), scores (n,), weights (n, R)`` to ``(R,)``; the AUROC if
            none is given.

    Returns:
        ``(replicates, K)``; nan where a replicate drew only one class.
    """
    chunks = range(draws.counts.shape[0])
    out = np.full((draws.replicates, labels.shape[1]), np.nan)
    for k in range(labels.shape[1]):
        rows = np.flatnonzero(~np.isnan(labels[:, k]) & ~np.isnan(scores[:, k]))
        label, score = labels[rows, k] == 1.0, scores[rows, k]
        if label.all() or not label.any():
            continue
        if statistic is None:
            parts = _auroc(draws, rows, label, score)
        else:
            parts = [statistic(label, score, draws.weights(chunk, rows)) for chunk in chunks]
        out[:, k] = np.concatenate(parts)[: draws.replicates] if parts else []
    return out


def _auroc(
    draws: Draws, rows: np.ndarray, label: np.ndarray, score: np.ndarray
) -> list[np.ndarray]:
    """Weighted Mann-Whitney: every positive counts the negatives below it, ties one half."""
    negative, positive = rows[~label], rows[label]
    order = np.argsort(score[~label], kind="stable")
    below = score[~label][order]
    first = np.searchsorted(below, score[label], side="left")
    last = np.searchsorted(below, score[label], side="right")
    has_ties = bool((first != last).any())
    running = np.zeros((len(below) + 1, CHUNK), dtype=np.float32)
    parts = []
    for chunk in range(draws.counts.shape[0]):
        np.cumsum(draws.weights(chunk, negative[order]), axis=0, out=running[1:])
        beaten = running[first]
        if has_ties:
            beaten = (beaten + running[last]) * np.float32(0.5)
        weight = draws.weights(chunk, positive)
        pairs = weight.sum(axis=0) * running[-1]
        wins = np.einsum("ir,ir->r", weight, beaten)
        parts.append(np.divide(wins, pairs, out=np.full(CHUNK, np.nan), where=pairs > 0))
    return parts


def interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of one statistic's replicates; nan where too few are defined.

    Args:
        replicates: ``(R,)``; undefined replicates are nan.
        level: Nominal coverage.
    """
    values = defined(replicates)
    if len(values) < max(20, len(replicates) // 2):
        return float("nan"), float("nan")
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(values, (tail, 1.0 - tail))
    return float(low), float(high)


def defined(replicates: np.ndarray) -> np.ndarray:
    """The replicates that drew both classes."""
    return replicates[~np.isnan(replicates)]
