"""Thresholds and what follows from them: sensitivity, specificity, F1, precision, accuracy.

A threshold belongs to a development split. Choosing it on the evaluated cases, as CT-CLIP's
published tables do, is available and marked as optimistic wherever its numbers appear.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from ctclip.evaluation import metrics
from ctclip.evaluation.scores import ScoreTable

Rule = Literal["youden", "corner", "specificity-90", "f1"]
RULES: tuple[Rule, ...] = ("youden", "corner", "specificity-90", "f1")
CT_CLIP_GRID = np.linspace(0, 1, 100)
"""The thresholds that CT-CLIP's script tries."""


@dataclass(frozen=True, kw_only=True)
class Operating:
    """Numbers at one threshold; a case is called positive when its score is *above* it."""

    threshold: float
    sensitivity: float
    specificity: float
    precision: float
    """Positive predictive value; nan where nothing is called positive."""

    f1: float
    """Of the positive class."""

    balanced_accuracy: float
    accuracy: float
    f1_weighted: float
    """Mean F1 of both classes weighted by their size, which is what CT-CLIP's tables call F1.
    For a rare finding it is high even for a model that never finds one."""


def choose(labels: np.ndarray, scores: np.ndarray, rule: Rule = "youden") -> float:
    """Pick a threshold on development data.

    Args:
        labels: ``(N,)`` 1, 0 or nan.
        scores: ``(N,)``.
        rule: ``youden`` maximises sensitivity + specificity, ``corner`` minimises the distance
            to the ROC's upper left corner, ``specificity-90`` is the lowest threshold with at
            least 90 % specificity, ``f1`` maximises the positive class's F1.

    Returns:
        The threshold, half-way between two neighbouring scores; nan where one class lacks.
    """
    label, score = metrics.known(labels, scores)
    if label.all() or not label.any():
        return float("nan")
    values = np.unique(score)
    cuts = np.concatenate([[values[0] - 1e-6], (values[1:] + values[:-1]) / 2, [values[-1]]])
    positive, negative = np.sort(score[label]), np.sort(score[~label])
    hits = len(positive) - np.searchsorted(positive, cuts, side="right")
    alarms = len(negative) - np.searchsorted(negative, cuts, side="right")
    sensitivity, false_alarm = hits / len(positive), alarms / len(negative)
    if rule == "specificity-90":
        return float(cuts[np.flatnonzero(1 - false_alarm >= 0.9 - 1e-12)[0]])
    goodness = {
        "youden": sensitivity - false_alarm,
        "corner": -np.hypot(1 - sensitivity, false_alarm),
        "f1": 2 * hits / (len(positive) + hits + alarms),
    }[rule]
    return float(cuts[int(np.argmax(goodness))])


def choose_like_ct_clip(labels: np.ndarray, scores: np.ndarray) -> float:
    """CT-CLIP's rule: the grid point nearest the ROC's corner, the largest where several are.

    Its scripts apply it to the evaluated cases themselves, which is optimistic.
    """
    label, score = metrics.known(labels, scores)
    if label.all() or not label.any():
        return float("nan")
    called = score[None, :] > CT_CLIP_GRID[:, None]
    sensitivity = called[:, label].mean(axis=1)
    false_alarm = called[:, ~label].mean(axis=1)
    distance = np.sqrt((1 - sensitivity) ** 2 + false_alarm**2)
    return float(CT_CLIP_GRID[np.flatnonzero(distance == distance.min())[-1]])


def at(labels: np.ndarray, scores: np.ndarray, threshold: float) -> Operating:
    """Everything that follows from a threshold; nan where it isn't defined."""
    label, score = metrics.known(labels, scores)
    called = score > threshold
    tp, fp = int((called & label).sum()), int((called & ~label).sum())
    fn, tn = int((~called & label).sum()), int((~called & ~label).sum())
    if np.isnan(threshold):
        tp = fp = fn = tn = 0
    sensitivity, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    f1 = _ratio(2 * tp, 2 * tp + fp + fn)
    f1_negative = _ratio(2 * tn, 2 * tn + fp + fn)
    cases = tp + fp + fn + tn
    weighted = _ratio((tp + fn) * np.nan_to_num(f1) + (tn + fp) * np.nan_to_num(f1_negative), cases)
    return Operating(
        threshold=float(threshold),
        sensitivity=sensitivity,
        specificity=specificity,
        precision=_ratio(tp, tp + fp),
        f1=f1,
        balanced_accuracy=(sensitivity + specificity) / 2,
        accuracy=_ratio(tp + tn, cases),
        f1_weighted=weighted,
    )


def operating_table(table: ScoreTable, thresholds: Mapping[str, float]) -> pd.DataFrame:
    """One row per finding at the given thresholds."""
    rows = []
    for k, finding in enumerate(table.findings):
        point = at(table.labels[:, k], table.scores[:, k], thresholds.get(finding, float("nan")))
        rows.append({"finding": finding, **vars(point)})
    return pd.DataFrame(rows)


def from_development(table: ScoreTable, rule: Rule = "youden") -> dict[str, float]:
    """A threshold per finding from development cases."""
    return {
        finding: choose(table.labels[:, k], table.scores[:, k], rule)
        for k, finding in enumerate(table.findings)
    }


def optimistic(table: ScoreTable) -> dict[str, float]:
    """CT-CLIP's thresholds, picked on the very cases that they are then judged on.

    Its grid is one of probabilities; other scores get the same rule on their own values.
    """
    known = table.scores[~np.isnan(table.scores)]
    are_probabilities = bool(len(known)) and 0 <= known.min() <= known.max() <= 1
    if not are_probabilities:
        return from_development(table, "corner")
    return {
        finding: choose_like_ct_clip(table.labels[:, k], table.scores[:, k])
        for k, finding in enumerate(table.findings)
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
