"""DeLong's covariance of AUROCs, also with several cases per patient.

DeLong, DeLong and Clarke-Pearson 1988 for independent cases; Obuchowski 1997 for clustered ones,
where the placements are summed per patient before their covariance is taken. Placements come
from midranks (Sun and Xu 2014), so the cost is that of sorting.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, rankdata


@dataclass(frozen=True, eq=False)
class DeLong:
    """AUROCs of ``M`` models on the same cases and the covariance of the estimates."""

    auroc: np.ndarray
    """``(M,)``"""

    covariance: np.ndarray
    """``(M, M)``"""

    def interval(self, model: int = 0, level: float = 0.95) -> tuple[float, float]:
        """Normal interval of one AUROC, cut at 0 and 1."""
        half = norm.ppf(0.5 + level / 2) * np.sqrt(self.covariance[model, model])
        area = self.auroc[model]
        return float(max(area - half, 0.0)), float(min(area + half, 1.0))

    def difference(self, a: int = 0, b: int = 1) -> tuple[float, float, float]:
        """AUROC of ``a`` minus that of ``b``, its standard error and two-sided p-value."""
        delta = float(self.auroc[a] - self.auroc[b])
        variance = self.covariance[a, a] + self.covariance[b, b] - 2 * self.covariance[a, b]
        error = float(np.sqrt(max(variance, 0.0)))
        if error == 0.0:
            return delta, 0.0, 1.0 if delta == 0 else 0.0
        return delta, error, float(2 * norm.sf(abs(delta) / error))


def logit_interval(
    labels: np.ndarray, scores: np.ndarray, patient_id: np.ndarray, level: float = 0.95
) -> tuple[float, float]:
    """Interval of one AUROC that holds with few patients of a class, and near 1.

    Normal on the logit scale, so that it stays within 0 and 1 and is longer towards 0.5. The
    variance is DeLong's with patients as clusters, plus one patient's worth of Hanley and
    McNeil's (1982): a handful of well ranked positives says little about its own spread, and
    with perfect ranks DeLong's is zero.

    Args:
        labels: ``(N,)`` 1 or 0, nothing unknown.
        scores: ``(N,)``.
        patient_id: ``(N,)``.
        level: Nominal coverage.

    Returns:
        nan where a class has fewer than two patients.
    """
    label = np.asarray(labels) == 1.0
    sick, well = len(np.unique(patient_id[label])), len(np.unique(patient_id[~label]))
    if min(sick, well) < 2:
        return float("nan"), float("nan")
    found = delong(label, scores[None], patient_id)
    edge = 0.5 / (sick * well)
    area = float(np.clip(found.auroc[0], edge, 1 - edge))
    square = area**2
    two_sick, two_well = area / (2 - area), 2 * square / (1 + area)
    assumed = area - square + (sick - 1) * (two_sick - square) + (well - 1) * (two_well - square)
    few = min(sick, well)
    variance = (few * found.covariance[0, 0] + assumed / (sick * well)) / (few + 1)
    half = norm.ppf(0.5 + level / 2) * np.sqrt(variance) / (area * (1 - area))
    centre = np.log(area / (1 - area))
    low, high = (float(1 / (1 + np.exp(-(centre + side)))) for side in (-half, half))
    return low, high


def delong(labels: np.ndarray, scores: np.ndarray, patient_id: np.ndarray | None = None) -> DeLong:
    """Estimate AUROCs and their covariance.

    Args:
        labels: ``(N,)`` 1 or 0, nothing unknown.
        scores: ``(M, N)``, one row per model.
        patient_id: ``(N,)``; cases of one patient are treated as dependent. ``None`` takes every
            case as independent, which is DeLong's original estimate.

    Raises:
        ValueError: If there are fewer than two independent units of either class.
    """
    label = np.asarray(labels) == 1.0
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    m, n = int(label.sum()), int((~label).sum())
    if min(m, n) < 2:
        raise ValueError(f"DeLong needs two cases of each class, got {m} and {n}")
    ranks = np.stack([rankdata(row) for row in scores])
    within_positive = np.stack([rankdata(row[label]) for row in scores])
    within_negative = np.stack([rankdata(row[~label]) for row in scores])
    positive = (ranks[:, label] - within_positive) / n  # share of negatives below each positive
    negative = 1.0 - (ranks[:, ~label] - within_negative) / m
    auroc = positive.mean(axis=1)
    if patient_id is None:
        covariance = np.atleast_2d(np.cov(positive)) / m + np.atleast_2d(np.cov(negative)) / n
        return DeLong(auroc, covariance)

    names, patient = np.unique(patient_id, return_inverse=True)
    sums = {}
    for key, placements, mask, size in (
        ("positive", positive, label, m),
        ("negative", negative, ~label, n),
    ):
        centred = placements - auroc[:, None]
        total = np.zeros((len(scores), len(names)))
        for model in range(len(scores)):
            total[model] = np.bincount(patient[mask], centred[model], minlength=len(names))
        sums[key] = total / size
    sick = len(np.unique(patient[label]))
    well = len(np.unique(patient[~label]))
    if min(sick, well) < 2:
        raise ValueError(f"DeLong needs two patients of each class, got {sick} and {well}")
    cross = sums["positive"] @ sums["negative"].T
    covariance = (
        sick / (sick - 1) * sums["positive"] @ sums["positive"].T
        + well / (well - 1) * sums["negative"] @ sums["negative"].T
        + cross
        + cross.T
    )
    return DeLong(auroc, covariance)
