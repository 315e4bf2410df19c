"""The query's slices beside its similar cases' slices, as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LUNG_HU = (-1350.0, 150.0)
SOFT_TISSUE_HU = (-160.0, 240.0)
"""Window level 40 and width 400, as on a scanner's console."""

MAX_NAMES = 6
"""Findings written below a case before the rest is counted."""

ROW_NAMES = ("axial, lung", "axial, soft tissue", "coronal, lung")


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One column of the picture."""

    title: str
    hu: np.ndarray | None
    """``(D, H, W)`` oriented SPL; None leaves the column to its text."""

    spacing_mm: tuple[float, float, float]
    shared: Sequence[str] = ()
    """Findings in common with the query."""

    other: Sequence[str] = ()
    """Findings of this case alone; for the query, all of its findings."""


def save(panels: Sequence[Panel], path: str | Path) -> None:
    """Draw the panels into a PNG or PDF file; see :func:`draw`."""
    draw(panels).savefig(path, dpi=100)


def draw(panels: Sequence[Panel], row_names: Sequence[str] = ROW_NAMES) -> "Figure":
    """Draw one column per case: axial in the lung and soft-tissue windows, and coronal.

    Radiological view: the patient's left is on the right, anterior is up.

    Args:
        panels: The query first.
        row_names: What to write beside the rows; empty for a picture without words.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.3 * len(panels), 7.4), facecolor="white", layout="constrained")
    axes = figure.subplots(3, len(panels), squeeze=False, height_ratios=[1, 1, 1])
    for column, panel in enumerate(panels):
        axes[0, column].set_title(panel.title, fontsize=9, weight="bold" if column == 0 else None)
        for row in range(3):
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            axes[row, column].spines[:].set_visible(False)
        if panel.hu is not None:
            for row, (image, aspect, window) in enumerate(_views(panel.hu, panel.spacing_mm)):
                low, high = window
                axes[row, column].imshow(
                    image, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="bilinear"
                )
        most = len(panel.other) if column == 0 else MAX_NAMES
        axes[2, column].set_xlabel(_findings(panel, most), fontsize=7, loc="left")
    for row, label in enumerate(row_names):
        axes[row, 0].set_ylabel(label, fontsize=8)
    return figure


def _views(
    hu: np.ndarray, spacing_mm: tuple[float, float, float]
) -> list[tuple[np.ndarray, float, tuple[float, float]]]:
    depth, height, _ = hu.shape
    axial, coronal = hu[depth // 2], hu[::-1, height // 2]
    in_plane, along = spacing_mm[1] / spacing_mm[2], spacing_mm[0] / spacing_mm[2]
    return [
        (axial, in_plane, LUNG_HU),
        (axial, in_plane, SOFT_TISSUE_HU),
        (coronal, along, LUNG_HU),
    ]


def _findings(panel: Panel, most: int) -> str:
    def listed(names: Sequence[str], mark: str) -> list[str]:
        more = [f"{mark} {len(names) - most} more"] if len(names) > most else []
        return [f"{mark} {name}" for name in names[:most]] + more

    return "\n".join(listed(panel.shared, "=") + listed(panel.other, "·"))
