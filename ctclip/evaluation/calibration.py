"""Do the probabilities mean what they say? ECE, Brier, reliability, and how to mend them.

Temperature and Platt scaling are fitted on development cases and applied to others; fitted on
the evaluated cases they would always look good.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from ctclip.evaluation import metrics

EDGE = 1e-6
"""Probabilities are kept this far from 0 and 1 before their logit is taken."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """Calibration of one finding's scores, read as probabilities."""

    predicted: np.ndarray
    """``(bins,)`` mean score in each bin of equally many cases."""

    observed: np.ndarray
    """``(bins,)`` share of positives there."""

    cases: np.ndarray
    ece: float
    """Expected calibration error: mean |observed - predicted|, weighted by cases."""

    brier: float
    """Mean squared error of the probability."""

    brier_of_prevalence: float
    """What always answering the prevalence would get: a useful model is below it."""


@dataclass(frozen=True)
class Scaling:
    """``p -> sigmoid(slope * logit(p) + intercept)``."""

    slope: float
    intercept: float

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Calibrate; the order of the cases, and so the AUROC, stays (slope > 0)."""
        scaled: np.ndarray = expit(self.slope * _logit(probabilities) + self.intercept)
        return scaled


def reliability(labels: np.ndarray, scores: np.ndarray, bins: int = 10) -> Reliability:
    """Compare scores with outcomes in bins of equally many cases.

    Args:
        labels: ``(N,)`` 1, 0 or nan.
        scores: ``(N,)`` probabilities.
        bins: Number of bins; fewer where there are fewer cases.

    Raises:
        ValueError: If a score is outside [0, 1] or nothing is known.
    """
    label, score = metrics.known(labels, scores)
    if not len(label):
        raise ValueError("no case with a known label: calibration can't be measured")
    if score.min() < 0 or score.max() > 1:
        raise ValueError(
            f"scores from {score.min():.3g} to {score.max():.3g} are no probabilities; "
            "fit a scaling first or score with `score: softmax`"
        )
    groups = np.array_split(np.argsort(score, kind="stable"), min(bins, len(label)))
    predicted = np.array([score[group].mean() for group in groups])
    observed = np.array([label[group].mean() for group in groups])
    cases = np.array([len(group) for group in groups])
    rate = label.mean()
    return Reliability(
        predicted=predicted,
        observed=observed,
        cases=cases,
        ece=float(np.average(np.abs(predicted - observed), weights=cases)),
        brier=float(((score - label) ** 2).mean()),
        brier_of_prevalence=float(rate * (1 - rate)),
    )


def fit(
    labels: np.ndarray, scores: np.ndarray, kind: Literal["temperature", "platt"] = "platt"
) -> Scaling:
    """Fit a scaling on development cases by maximum likelihood.

    Platt's targets (not quite 0 and 1) keep it finite where the classes are separated.

    Args:
        labels: ``(N,)`` 1, 0 or nan.
        scores: ``(N,)`` probabilities.
        kind: ``temperature`` fits the slope alone, ``platt`` the intercept too, which a model
            trained at another prevalence needs.

    Raises:
        ValueError: If only one class is known.
    """
    label, score = metrics.known(labels, scores)
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        raise ValueError(f"a scaling needs both classes, got {positives} and {negatives}")
    target = np.where(label, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    x = _logit(score)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_slope = parameters[0]
        intercept = parameters[1] if kind == "platt" else 0.0
        z = np.exp(log_slope) * x + intercept
        error = expit(z) - target
        value = np.logaddexp(0, z).mean() - (target * z).mean()
        gradient = [float((error * x).mean() * np.exp(log_slope)), float(error.mean())]
        return float(value), np.array(gradient[: len(parameters)])

    start = np.zeros(2 if kind == "platt" else 1)
    bounds = [(-8.0, 8.0), (-50.0, 50.0)][: len(start)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return Scaling(float(np.exp(found[0])), float(found[1]) if kind == "platt" else 0.0)


def _logit(probabilities: np.ndarray) -> np.ndarray:
    values: np.ndarray = logit(np.clip(probabilities, EDGE, 1 - EDGE))
    return values
