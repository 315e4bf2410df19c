"""Figures of an evaluation. Each function returns a Figure; nothing is shown or kept open."""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from ctclip.evaluation import calibration, metrics
from ctclip.evaluation.scores import ScoreTable

COLOURS = ("#1f5fa8", "#d9772b", "#3d8f5f", "#8a4fa3", "#b8433f", "#5f6b76")
"""One per model: blue, orange, green, violet, red, grey; told apart in greyscale as well."""

INK = "#22303c"
FAINT = "#c9d1d9"
CHANCE = "#9aa5b1"


def roc_grid(tables: Sequence[ScoreTable], evaluations: Sequence[metrics.Evaluation]) -> Figure:
    """One small ROC per finding, all models in each; findings that can't be measured say why.

    Args:
        tables: One per model, all with the same findings.
        evaluations: Theirs, in the same order.
    """
    findings = tables[0].findings
    columns = 6 if len(findings) > 6 else max(len(findings), 1)
    rows = -(-len(findings) // columns)
    figure = Figure(figsize=(2.35 * columns, 2.65 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for k, axis in enumerate(axes.flat):
        if k >= len(findings):
            axis.set_visible(False)
            continue
        frame(axis, findings[k])
        if any(not np.isnan(evaluation.findings[k].auroc) for evaluation in evaluations):
            axis.plot([0, 1], [0, 1], color=CHANCE, lw=0.8, ls=(0, (4, 3)))
        for m, (table, evaluation) in enumerate(zip(tables, evaluations, strict=True)):
            result = evaluation.findings[k]
            if np.isnan(result.auroc):
                axis.text(0.5, 0.5, result.note.replace(": ", ":\n"), ha="center", va="center",
                          fontsize=7, color=INK)  # fmt: skip
                continue
            label, score = metrics.known(table.labels[:, k], table.scores[:, k])
            fpr, tpr, _ = roc_curve(label, score)
            colour = COLOURS[m % len(COLOURS)]
            axis.plot(fpr, tpr, color=colour, lw=1.4)
            text = f"{result.auroc:.2f}"
            if not np.isnan(result.auroc_low):
                text += f" [{result.auroc_low:.2f}, {result.auroc_high:.2f}]"
            axis.text(0.97, 0.05 + 0.105 * (len(tables) - 1 - m), text, ha="right", fontsize=7.5,
                      color=colour)  # fmt: skip
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set_aspect("equal")
    if len(tables) > 1:
        _legend(figure, [evaluation.model for evaluation in evaluations])
    figure.supxlabel("1 − specificity", fontsize=9, color=INK)
    figure.supylabel("sensitivity", fontsize=9, color=INK)
    return figure


def uncertain_roc(table: ScoreTable, hedged: np.ndarray, shown: Sequence[int]) -> Figure:
    """One ROC per finding, three curves each: hedged cases as present, as absent, left out.

    Args:
        table: Scores.
        hedged: ``(N, K)`` bool, see :mod:`ctclip.evaluation.uncertain`.
        shown: Columns of findings.
    """
    from ctclip.evaluation import uncertain

    columns = min(len(shown), 6)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.35 * columns, 2.65 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, k in itertools.zip_longest(axes.flat, shown):
        if k is None:
            axis.set_visible(False)
            continue
        frame(axis, table.findings[k])
        axis.plot([0, 1], [0, 1], color=CHANCE, lw=0.8, ls=(0, (4, 3)))
        readings = uncertain.relabelled(table.labels[:, k], hedged[:, k])
        for m, (name, labels) in enumerate(readings.items()):
            label, score = metrics.known(labels, table.scores[:, k])
            if label.all() or not label.any():
                continue
            fpr, tpr, _ = roc_curve(label, score)
            axis.plot(fpr, tpr, color=COLOURS[m], lw=1.3)
            text = f"{name} {metrics.auroc(labels, table.scores[:, k]):.2f}"
            axis.text(0.97, 0.26 - 0.105 * m, text, ha="right", fontsize=7, color=COLOURS[m])
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set_aspect("equal")
    return figure


def auc_bars(evaluations: Sequence[metrics.Evaluation]) -> Figure:
    """AUROC per finding and macro with 95 % intervals, one bar per model.

    Bars start at 0.5, so that their length is the gain over chance.
    """
    names = [result.finding for result in evaluations[0].findings]
    order = sorted(
        range(len(names)), key=lambda k: np.nan_to_num(evaluations[0].findings[k].auroc, nan=-1)
    )
    height = 0.26 + 0.2 * len(evaluations)
    figure = Figure(figsize=(7.4, 1.3 + height * (len(names) + 1)), layout="constrained")
    axis = figure.subplots()
    thickness = 0.78 / len(evaluations)
    for m, evaluation in enumerate(evaluations):
        colour = COLOURS[m % len(COLOURS)]
        macro = evaluation.macro
        bars = [(macro["auroc"], macro["auroc_low"], macro["auroc_high"], "")]
        results = [evaluation.findings[k] for k in order]
        bars += [(r.auroc, r.auroc_low, r.auroc_high, r.note) for r in results]
        for row, (value, low, high, note) in enumerate(bars):
            y = row + 0.39 - thickness * (m + 0.5)
            if np.isnan(value):
                axis.text(0.505, y, note, va="center", fontsize=7.5, color=INK, style="italic")
                continue
            shade = 1.0 if row == 0 else 0.72
            axis.barh(y, value - 0.5, thickness * 0.86, left=0.5, color=colour, alpha=shade)
            if not np.isnan(low):
                axis.plot([low, high], [y, y], color=INK, lw=1.1, solid_capstyle="butt")
            axis.text(1.01, y, f"{value:.3f}", va="center", fontsize=7.5, color=colour)
    measured = int(evaluations[0].macro["num_findings"])
    axis.set_yticks(range(len(names) + 1), [f"macro ({measured})", *(names[k] for k in order)])
    axis.axvline(0.5, color=INK, lw=0.8)
    lows = [r.auroc_low for e in evaluations for r in e.findings if not np.isnan(r.auroc_low)]
    axis.set_xlim(min([0.4, *lows]) - 0.02, 1.0)
    axis.set_ylim(-0.6, len(names) + 0.6)
    frame(axis, "")
    axis.tick_params(axis="y", labelsize=8.5, length=0)
    axis.set_xlabel(
        "AUROC; bars start at chance, lines are 95 % intervals (patients resampled)",
        fontsize=8.5,
        color=INK,
    )
    if len(evaluations) > 1:
        _legend(figure, [evaluation.model for evaluation in evaluations])
    return figure


def reliability_grid(tables: Sequence[ScoreTable]) -> Figure:
    """Predicted against observed probability, one small plot per finding."""
    findings = tables[0].findings
    columns = 6 if len(findings) > 6 else max(len(findings), 1)
    rows = -(-len(findings) // columns)
    figure = Figure(figsize=(2.35 * columns, 2.65 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for k, axis in enumerate(axes.flat):
        if k >= len(findings):
            axis.set_visible(False)
            continue
        frame(axis, findings[k])
        axis.plot([0, 1], [0, 1], color=CHANCE, lw=0.8, ls=(0, (4, 3)))
        for m, table in enumerate(tables):
            label, score = metrics.known(table.labels[:, k], table.scores[:, k])
            if not len(label):
                continue
            found = calibration.reliability(label.astype(float), score)
            colour = COLOURS[m % len(COLOURS)]
            axis.plot(found.predicted, found.observed, color=colour, lw=1.2, marker="o", ms=3)
            axis.text(0.03, 0.92 - 0.105 * m, f"ECE {found.ece:.2f}", fontsize=7.5, color=colour)
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set_aspect("equal")
    if len(tables) > 1:
        _legend(figure, [table.name for table in tables])
    figure.supxlabel("mean score of a tenth of the cases", fontsize=9, color=INK)
    figure.supylabel("share of positives", fontsize=9, color=INK)
    return figure


def differences(found: Sequence[Any], title: str) -> Figure:
    """Differences with 95 % intervals, one row each (objects with finding, difference, low, high).

    Filled where the interval leaves zero out.
    """
    rows = [row for row in found if not np.isnan(row.difference)]
    figure = Figure(figsize=(7.4, 1.2 + 0.27 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(reversed(rows)):
        is_clear = row.low > 0 or row.high < 0
        colour = COLOURS[0] if row.difference > 0 else COLOURS[1]
        axis.plot([row.low, row.high], [y, y], color=colour, lw=1.6)
        axis.plot([row.difference], [y], marker="o", ms=5.5, color=colour,
                  mfc=colour if is_clear else "white")  # fmt: skip
    axis.set_yticks(range(len(rows)), [row.finding for row in reversed(rows)])
    axis.axvline(0, color=INK, lw=0.8)
    frame(axis, title)
    axis.tick_params(axis="y", labelsize=8.5, length=0)
    axis.set_xlabel("difference of AUROC with 95 % interval", fontsize=8.5, color=INK)
    return figure


def fit_overview(judgements: Sequence[Any]) -> Figure:
    """Training, development and test AUROC of every disease in one figure, with its verdict.

    Args:
        judgements: :class:`ctclip.evaluation.verdicts.Judgement` of each disease.
    """
    figure = Figure(figsize=(11.0, 1.3 + 0.36 * len(judgements)), layout="constrained")
    axis = figure.subplots()
    order = sorted(judgements, key=lambda j: np.nan_to_num(j.evidence.train.auroc, nan=-1.0))
    for y, judgement in enumerate(order):
        evidence = judgement.evidence
        marks = [(evidence.train, COLOURS[0], "o", 0.16), (evidence.test, COLOURS[1], "s", -0.16)]
        if evidence.development is not None:
            marks.append((evidence.development, COLOURS[2], "D", 0.0))
        for fit, colour, marker, shift in marks:
            if np.isnan(fit.auroc):
                continue
            axis.plot([fit.low, fit.high], [y + shift] * 2, color=colour, lw=1.3, alpha=0.7)
            axis.plot([fit.auroc], [y + shift], marker=marker, ms=5, color=colour)
        if not np.isnan(evidence.probe):
            axis.plot([evidence.probe], [y + 0.16], marker="|", ms=9, mew=1.6, color=INK)
        axis.text(1.015, y, judgement.verdict.value, va="center", fontsize=8, color=INK)
        axis.axhline(y + 0.5, color=FAINT, lw=0.4)
    axis.set_yticks(range(len(order)), [judgement.evidence.finding for judgement in order])
    axis.axvline(0.5, color=INK, lw=0.8)
    axis.set_xlim(0.38, 1.008)
    frame(axis, "")
    axis.tick_params(axis="y", labelsize=8.5, length=0)
    axis.set_xlabel("AUROC with 95 % interval", fontsize=8.5, color=INK)
    from matplotlib.lines import Line2D

    entries = [("training", "o", COLOURS[0]), ("development", "D", COLOURS[2]),
               ("test", "s", COLOURS[1]), ("probe, left-out patients", "|", INK)]  # fmt: skip
    handles = [Line2D([], [], color=c, marker=m, lw=0, label=n) for n, m, c in entries]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=8.5)
    return figure


def loss_curve(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Training curves.

    Args:
        curves: Name to (steps, values); several share one axis.
    """
    figure = Figure(figsize=(7.4, 2.8), layout="constrained")
    axis = figure.subplots()
    for m, (name, (steps, values)) in enumerate(curves.items()):
        colour = COLOURS[m % len(COLOURS)]
        axis.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
        axis.plot(steps, _smooth(np.asarray(values, float)), color=colour, lw=1.6, label=name)
    frame(axis, "")
    axis.set_xlabel("step", fontsize=8.5, color=INK)
    axis.legend(frameon=False, fontsize=8.5)
    return figure


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write ``<stem>.png`` and ``<stem>.svg``."""
    paths = [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def data_uri(picture: Figure | np.ndarray) -> str:
    """A figure, or a grey ``(H, W)`` or RGB ``(H, W, 3)`` uint8 image, as an inline PNG."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=130)
    else:
        from PIL import Image

        Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a thirtieth of the run; shorter at the ends."""
    half = max(len(values) // 60, 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    smoothed: np.ndarray = (total[high] - total[low]) / np.maximum(high - low, 1)
    return smoothed


def frame(axis: Axes, title: str = "") -> None:
    """The house frame: two thin spines, small ticks."""
    axis.set_title(title, fontsize=8.5, color=INK)
    axis.tick_params(labelsize=7.5, colors=INK, length=2.5)
    for side, spine in axis.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(FAINT)


def _legend(figure: Figure, names: Sequence[str]) -> Any:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[m % len(COLOURS)], lw=2.5) for m in range(len(names))]
    return figure.legend(
        handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9
    )
