"""How many labels are wrong? A noise model over out-of-fold scores, and over what reports say.

A case has the finding with a chance that follows its score ``s``, ``q = sigmoid(slope * s +
offset)``. What is on record about it, its label and where there is a report what the report
affirms or denies, is drawn with one set of chances if the finding is there and another if not.
For the label alone this says that the chance to *carry the label* "present" is

    false + (1 - false - missed) * sigmoid(slope * s + offset)

If labels were right, it would run from 0 to 1. Labels that are wrong at random leave plateaus:
even the plainest positives carry the label in only ``1 - missed`` of cases, and even the plainest
negatives in ``false``. Overlap of the classes bends the curve between the plateaus and doesn't
count as noise, which is what separates this estimate from counting confident disagreements.

Nothing is assumed about how label and report hang together: a report that the labels were read
from adds little, one that contradicts them adds as much as the scores of such cases bear out.

A lesion that the model can't see looks like a label that is false: images alone can't tell the
two apart. ``missed`` has no such double.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, softmax

from ctclip.evaluation import bootstrap

PRIOR = 4.0
"""Strength of the prior (1 - false - missed)^PRIOR: where scores tell nothing, assume no noise."""

MIN_AUROC = 0.75
"""Below this AUROC against the inferred truth, the estimate is "can't tell"."""

NUM_BINS = 400

SILENT, DENIED, AFFIRMED = 0, 1, 2
"""What a report says about a finding."""

KINDS = 6
"""Label (0, 1) x report (silent, denied, affirmed): ``kind = label + 2 * reading``."""

IS_PRESENT = np.arange(KINDS) % 2 == 1
"""Kinds whose label says "present"."""

START_CHANCE = 0.01
"""Smallest chance of a kind of record from which a replicate's fit starts."""

SLOPE, OFFSET, LOGIT = (-5.0, 4.0), (-30.0, 30.0), (-12.0, 12.0)
"""Bounds of the parameters, the slope's on its logarithm."""


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """One fitted curve, on standardised scores."""

    slope: float
    offset: float
    if_present: np.ndarray
    """``(KINDS,)`` chance of each kind of record for a case with the finding."""

    if_absent: np.ndarray
    """``(KINDS,)`` the same for a case without it."""

    @property
    def missed(self) -> float:
        """Chance that a case with the finding is labelled absent."""
        return float(self.if_present[~IS_PRESENT].sum())

    @property
    def false(self) -> float:
        """Chance that a case without the finding is labelled present."""
        return float(self.if_absent[IS_PRESENT].sum())

    def present(self, scores: np.ndarray) -> np.ndarray:
        """``(N,)`` chance that the finding is there, from the score alone."""
        chance: np.ndarray = expit(self.slope * scores + self.offset)
        return chance

    def likelihood(self, scores: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """``(N,)`` chance of each case's kind given its score."""
        q = self.present(scores)
        chance: np.ndarray = q * self.if_present[kind] + (1 - q) * self.if_absent[kind]
        return np.clip(chance, 1e-12, 1.0)

    def truth(self, scores: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """``(N,)`` chance that the finding is there, given score, label and report."""
        chance: np.ndarray = self.present(scores) * self.if_present[kind]
        return np.clip(chance / self.likelihood(scores, kind), 0.0, 1.0)

    def wrong(self, scores: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """``(N,)`` chance that the label is wrong, given score, label and report."""
        truth = self.truth(scores, kind)
        return np.where(IS_PRESENT[kind], 1 - truth, truth)


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

    chance: np.ndarray
    """``(N,)`` chance of the finding from the score alone; nan where the label is unknown."""

    @property
    def is_identified(self) -> bool:
        """Whether the scores see enough of the finding for the plateaus to mean anything."""
        return self.auroc_inferred >= MIN_AUROC


def kinds(labels: np.ndarray, readings: np.ndarray | None = None) -> np.ndarray:
    """``(N,)`` kind of record of each case, from known labels and what reports say."""
    found: np.ndarray = (labels == 1.0).astype(np.int64)
    return found if readings is None else found + 2 * readings


def fit(
    scores: np.ndarray,
    kind: np.ndarray,
    weights: np.ndarray | None = None,
    start: NoiseModel | None = None,
) -> NoiseModel:
    """Fit the curve by maximum a posteriori.

    Args:
        scores: ``(N,)`` standardised.
        kind: ``(N,)`` from :func:`kinds`.
        weights: ``(N,)`` case weights.
        start: Where to begin; without one, several starts are tried.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    counts = np.bincount(kind, weights, minlength=KINDS)
    met = np.flatnonzero(counts)  # kinds that never occur have no chance and no parameter
    column = np.searchsorted(met, kind)
    is_present = IS_PRESENT[met]

    def unpack(x: np.ndarray) -> NoiseModel:
        chances = np.zeros((2, KINDS))
        chances[:, met] = softmax(x[2:].reshape(2, -1), axis=1)
        return NoiseModel(float(np.exp(x[0])), float(x[1]), chances[0], chances[1])

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        model = unpack(x)
        truth = model.truth(scores, kind)
        value = -float(weights @ np.log(model.likelihood(scores, kind)))
        bend = weights * (truth - model.present(scores))
        span = max(1.0 - model.false - model.missed, 1e-6)
        gradient = [-(bend @ scores) * model.slope, -bend.sum()]
        sides = (
            (model.if_present[met], truth, ~is_present),
            (model.if_absent[met], 1 - truth, is_present),
        )
        for chance, share, is_wrong in sides:
            total = np.bincount(column, weights * share, minlength=len(met))
            gradient += list(total.sum() * chance - total)
            rate = chance[is_wrong].sum()
            gradient[-len(met) :] += PRIOR / span * chance * (is_wrong - rate)
        return value - PRIOR * np.log(span), np.array(gradient)

    bounds = [SLOPE, OFFSET, *[LOGIT] * (2 * len(met))]
    results = [
        minimize(loss, x, jac=True, method="L-BFGS-B", bounds=bounds)
        for x in _starts(counts[met], is_present, start, met)
    ]
    return unpack(min(results, key=lambda result: float(result.fun)).x)


def _starts(
    counts: np.ndarray, is_present: np.ndarray, start: NoiseModel | None, met: np.ndarray
) -> list[np.ndarray]:
    """Where to climb from: labels almost right or often wrong, curves flat or steep."""
    if start is not None:
        chances = np.stack([start.if_present[met], start.if_absent[met]])
        # off the edge: at a chance of 0 the slope towards any noise is 0 too, and a replicate that
        # starts there stays there
        chances = np.maximum(chances, START_CHANCE)
        return [np.r_[np.log(start.slope), start.offset, np.log(chances).ravel()]]
    share = np.where(is_present, counts / counts[is_present].sum(), 0.0)
    share = np.where(is_present, share, counts / counts[~is_present].sum())
    found = []
    for rate in (0.02, 0.15):
        sides = [np.where(side, 1 - rate, rate) * share for side in (is_present, ~is_present)]
        chances = np.log(np.maximum(sides, 1e-5)).ravel()
        found += [np.r_[log_slope, 0.0, chances] for log_slope in (0.0, 1.5)]
    return found


def estimate(
    scores: np.ndarray,
    labels: np.ndarray,
    patient_id: np.ndarray,
    *,
    readings: np.ndarray | None = None,
    replicates: int = 100,
    seed: int = 0,
) -> NoiseEstimate:
    """Estimate the noise of one finding's labels.

    Args:
        scores: ``(N,)`` out-of-fold log-odds.
        labels: ``(N,)`` 1, 0 or nan.
        patient_id: ``(N,)``.
        readings: ``(N,)`` what each case's report says: ``SILENT``, ``DENIED`` or ``AFFIRMED``.
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
    kind = kinds(label, None if readings is None else readings[mask])

    # a few hundred bins carry the curve, so that the cost doesn't grow with the cohort
    bins = np.array_split(np.argsort(score, kind="stable"), min(NUM_BINS, len(score)))
    cell = np.empty(len(score), dtype=np.int64)
    for index, rows in enumerate(bins):
        cell[rows] = index
    cell += len(bins) * kind
    met, cell = np.unique(cell, return_inverse=True)
    centre = np.array([score[rows].mean() for rows in bins])[met % len(bins)]
    cell_kind = met // len(bins)

    def counted(weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(cell, weights, minlength=len(met)).astype(np.float64)

    model = fit(centre, cell_kind, counted(None))
    draws = bootstrap.draw(patient_id[mask], replicates, seed)
    sampled = []
    for index in range(replicates):
        chunk, column = divmod(index, bootstrap.CHUNK)
        counts = counted(draws.counts[chunk][draws.patient, column])
        positive = IS_PRESENT[cell_kind]
        if min(counts[~positive].sum(), counts[positive].sum()) == 0:
            continue
        found = fit(centre, cell_kind, counts, start=model)
        wrong = np.average(found.wrong(centre, cell_kind), weights=counts)
        lost = _aurocs(found, centre, cell_kind, counts)
        sampled.append((wrong, found.missed, found.false, lost[0] - lost[1]))
    table = np.array(sampled).reshape(-1, 4)
    posterior, chance = np.full((2, len(labels)), np.nan)
    posterior[mask], chance[mask] = model.wrong(score, kind), model.present(score)
    truth = model.truth(score, kind)
    points = (posterior[mask].mean(), model.missed, model.false)
    cases = (len(label), truth.sum(), (1 - truth).sum())
    ends = [
        _ends(table[:, column], point, count)
        for column, (point, count) in enumerate(zip(points, cases, strict=True))
    ]
    inferred, against_labels = _aurocs(model, score, kind, np.ones(len(label)))
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
        auroc_lost_low=min(bootstrap.interval(table[:, 3])[0], inferred - against_labels),
        posterior=posterior,
        chance=chance,
    )


def _ends(replicates: np.ndarray, point: float, cases: float) -> tuple[float, float]:
    """Interval of a share: percentiles, but never below what so many cases can exclude.

    Where no case looks wrong, no replicate does either; the upper end is then that of Clopper and
    Pearson for none among the cases ("rule of three").
    """
    low, high = bootstrap.interval(replicates)
    if np.isnan(low):
        return low, high
    return min(low, point), max(high, point, 1.0 - 0.025 ** (1.0 / max(cases, 1.0)))


def _aurocs(
    model: NoiseModel, scores: np.ndarray, kind: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """Expected AUROC against the inferred truth, and AUROC against the labels."""
    _, rank = np.unique(scores, return_inverse=True)

    def area(chance: np.ndarray) -> float:
        positive = np.bincount(rank, chance * weights)
        negative = np.bincount(rank, (1 - chance) * weights)
        below = np.cumsum(negative) - negative / 2
        return float((positive * below).sum() / max(positive.sum() * negative.sum(), 1e-12))

    return area(model.truth(scores, kind)), area(IS_PRESENT[kind].astype(np.float64))
