"""How many labels are wrong? A noise model over out-of-fold scores.

The chance that a case with score ``s`` *carries the label* "present" is modelled as

    false + (1 - false - missed) * sigmoid(slope * s + offset)

If labels were right, it would run from 0 to 1. Labels that are wrong at random leave plateaus:
even the plainest positives carry the label in only ``1 - missed`` of cases, and even the plainest
negatives in ``false``. Overlap of the classes bends the curve between the plateaus and doesn't
count as noise, which is what separates this estimate from counting confident disagreements.

A lesion that the model can't see looks like a label that is false: images alone can't tell the
two apart. ``missed`` has no such double.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ctclip.evaluation import bootstrap

PRIOR = 4.0
"""Strength of the prior (1 - false - missed)^PRIOR: where scores tell nothing, assume no noise."""

MIN_AUROC = 0.75
"""Below this AUROC against the inferred truth, the estimate is "can't tell"."""

NUM_BINS = 400

BOUNDS = [(-5.0, 4.0), (-30.0, 30.0), (-12.0, 3.0), (-12.0, 3.0)]


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """One fitted curve, on standardised scores."""

    slope: float
    offset: float
    false: float
    """Chance that a case without the finding carries the label."""

    missed: float
    """Chance that a case with the finding doesn't."""

    def present(self, scores: np.ndarray) -> np.ndarray:
        """``(N,)`` chance that the finding is there, from the score alone."""
        chance: np.ndarray = expit(self.slope * scores + self.offset)
        return chance

    def wrong(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """``(N,)`` chance that the label is wrong, given score and label; nan where unknown."""
        q = self.present(scores)
        false = self.false * (1 - q)
        missed = self.missed * q
        right_one, right_zero = (1 - self.missed) * q, (1 - self.false) * (1 - q)
        tiny = np.finfo(float).tiny
        one = false / np.maximum(false + right_one, tiny)
        zero = missed / np.maximum(missed + right_zero, tiny)
        return np.where(np.isnan(labels), np.nan, np.where(labels == 1.0, one, zero))


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseEstimate:
    """Noise of one finding's labels with 95 % intervals over resampled patients."""

    model: NoiseModel
    wrong: float
    """Share of known labels that are wrong."""

    wrong_low: float
    wrong_high: float
    missed: float
    missed_low: float
    missed_high: float
    false: float
    false_low: float
    false_high: float
    auroc_inferred: float
    """AUROC of the scores against the inferred truth."""

    auroc_lost: float
    """How much AUROC against these labels falls short of that against the inferred truth."""

    auroc_lost_low: float
    posterior: np.ndarray
    """``(N,)`` chance that each label is wrong; nan where unknown."""

    @property
    def is_identified(self) -> bool:
        """Whether the scores see enough of the finding for the plateaus to mean anything."""
        return self.auroc_inferred >= MIN_AUROC


def fit(
    scores: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    start: NoiseModel | None = None,
) -> NoiseModel:
    """Fit the curve by maximum a posteriori.

    Args:
        scores: ``(N,)`` standardised.
        labels: ``(N,)`` 1 or 0.
        weights: ``(N,)`` case weights.
        start: Where to begin; without one, several starts are tried.
    """
    weights = np.ones(len(scores)) if weights is None else weights

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope = np.exp(parameters[0])
        odds = np.exp(parameters[2:])
        total = 1.0 + odds.sum()
        false, missed = odds / total
        span = 1.0 / total  # 1 - false - missed
        q = expit(slope * scores + parameters[1])
        p = np.clip(false + span * q, 1e-9, 1 - 1e-9)
        value = -(weights * (labels * np.log(p) + (1 - labels) * np.log(1 - p))).sum()
        dp = -weights * (labels / p - (1 - labels) / (1 - p))
        bend = span * q * (1 - q)
        d_false, d_missed = (dp * (1 - q)).sum(), -(dp * q).sum()
        gradient = np.array(
            [
                (dp * bend * scores).sum() * slope,
                (dp * bend).sum(),
                false * ((1 - false) * d_false - missed * d_missed) + PRIOR * false,
                missed * ((1 - missed) * d_missed - false * d_false) + PRIOR * missed,
            ]
        )
        return float(value - PRIOR * np.log(span)), gradient

    starts = [np.array([a, 0.0, r, r]) for a in (0.0, 1.5) for r in (-4.0, -1.5)]
    if start is not None:
        span = 1.0 - start.false - start.missed
        odds = np.log(np.maximum([start.false / span, start.missed / span], 1e-5))
        starts = [np.array([np.log(start.slope), start.offset, *odds])]
    results = [minimize(loss, x, jac=True, method="L-BFGS-B", bounds=BOUNDS) for x in starts]
    best = min(results, key=lambda result: float(result.fun))
    odds = np.exp(best.x[2:])
    false, missed = odds / (1.0 + odds.sum())
    return NoiseModel(float(np.exp(best.x[0])), float(best.x[1]), float(false), float(missed))


def estimate(
    scores: np.ndarray,
    labels: np.ndarray,
    patient_id: np.ndarray,
    *,
    replicates: int = 100,
    seed: int = 0,
) -> NoiseEstimate:
    """Estimate the noise of one finding's labels.

    Args:
        scores: ``(N,)`` out-of-fold log-odds.
        labels: ``(N,)`` 1, 0 or nan.
        patient_id: ``(N,)``.
        replicates: Patient-grouped bootstrap fits behind the intervals.
        seed: Of the draws.

    Raises:
        ValueError: If only one class is known.
    """
    mask = ~np.isnan(labels) & ~np.isnan(scores)
    label = labels[mask]
    if not len(label) or label.min() == label.max():
        raise ValueError("noise can't be estimated where only one class is known")
    spread = scores[mask].std()
    score = (scores[mask] - scores[mask].mean()) / (spread if spread > 0 else 1.0)

    # a few hundred bins carry the curve, so that the cost doesn't grow with the cohort
    bins = np.array_split(np.argsort(score, kind="stable"), min(NUM_BINS, len(score)))
    cell = np.empty(len(score), dtype=np.int64)
    for index, rows in enumerate(bins):
        cell[rows] = index
    cell += len(bins) * label.astype(np.int64)
    centre = np.tile([score[rows].mean() for rows in bins], 2)
    kind = np.repeat([0.0, 1.0], len(bins))

    def counted(weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(cell, weights, minlength=len(centre)).astype(np.float64)

    model = fit(centre, kind, counted(None))
    draws = bootstrap.draw(patient_id[mask], replicates, seed)
    sampled = []
    for index in range(replicates):
        chunk, column = divmod(index, bootstrap.CHUNK)
        counts = counted(draws.counts[chunk][draws.patient, column])
        if min(counts[kind == 0].sum(), counts[kind == 1].sum()) == 0:
            continue
        found = fit(centre, kind, counts, start=model)
        wrong = np.average(found.wrong(centre, kind), weights=counts)
        lost = _aurocs(found, centre, kind, counts)
        sampled.append((wrong, found.missed, found.false, lost[0] - lost[1]))
    table = np.array(sampled).reshape(-1, 4)
    ends = [bootstrap.interval(table[:, column]) for column in range(4)]
    posterior = np.full(len(labels), np.nan)
    posterior[mask] = model.wrong(score, label)
    inferred, against_labels = _aurocs(model, score, label, np.ones(len(label)))
    return NoiseEstimate(
        model=model,
        wrong=float(posterior[mask].mean()),
        wrong_low=ends[0][0],
        wrong_high=ends[0][1],
        missed=model.missed,
        missed_low=ends[1][0],
        missed_high=ends[1][1],
        false=model.false,
        false_low=ends[2][0],
        false_high=ends[2][1],
        auroc_inferred=inferred,
        auroc_lost=inferred - against_labels,
        auroc_lost_low=ends[3][0],
        posterior=posterior,
    )


def _aurocs(
    model: NoiseModel, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """Expected AUROC against the inferred truth, and AUROC against the labels."""
    _, rank = np.unique(scores, return_inverse=True)
    wrong = model.wrong(scores, labels)
    truth = np.where(labels == 1.0, 1 - wrong, wrong)

    def area(chance: np.ndarray) -> float:
        positive = np.bincount(rank, chance * weights)
        negative = np.bincount(rank, (1 - chance) * weights)
        below = np.cumsum(negative) - negative / 2
        return float((positive * below).sum() / max(positive.sum() * negative.sum(), 1e-12))

    return area(truth), area(labels)
