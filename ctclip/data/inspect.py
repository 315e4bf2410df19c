"""What ctclip sees in a scan: one screen of facts, and a picture to compare with a viewer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.data import checked, dicom
from ctclip.data.chest import ChestCheck
from ctclip.data.problems import Note, VolumeError
from ctclip.data.volume import Volume

if TYPE_CHECKING:
    from rich.console import RenderableType

LUNG_WINDOW_HU = (-1350.0, 150.0)
SOFT_WINDOW_HU = (-160.0, 240.0)
"""The two windows that a radiologist opens a chest CT with."""


@dataclass
class InspectResult:
    """What was found in one scan; ``error`` is set where it can't be used."""

    path: Path
    volume: Volume | None = None
    chest: ChestCheck | None = None
    error: VolumeError | None = None
    series: list[str] = field(default_factory=list)
    """For a DICOM folder, the series in it."""

    @property
    def notes(self) -> list[Note]:
        """Everything that was applied or noticed."""
        found = list(self.volume.notes) if self.volume else []
        return found + list(self.chest.notes if self.chest else ())

    @property
    def is_usable(self) -> bool:
        """Whether ``ctclip-prepare`` would take this scan into a cohort."""
        return self.error is None and all(note.level != "hold" for note in self.notes)

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of everything measured, in reading order."""
        rows = [("file", str(self.path))]
        rows += [("series", text) for text in self.series]
        if self.volume is None:
            return rows
        hu = self.volume.hu
        percentiles = np.percentile(hu[::2, ::2, ::2], [1, 50, 99])
        rows += [
            ("shape", f"{_times(hu.shape)} (superior x posterior x left)"),
            ("spacing", f"{_times(f'{mm:.3f}' for mm in self.volume.spacing_mm)} mm"),
            ("extent", f"{_times(f'{n * mm:.0f}' for n, mm in self._axes())} mm"),
            ("HU", f"{hu.min():.0f} to {hu.max():.0f}"),
            ("HU 1 / 50 / 99 %", " / ".join(f"{value:.0f}" for value in percentiles)),
        ]
        if self.chest is not None:
            rows += [
                ("lungs", f"{self.chest.lung_litres:.2f} l"),
                ("lungs / body", f"{100 * self.chest.lung_fraction:.1f} %"),
                ("body width", f"{self.chest.body_width_mm:.0f} mm"),
                ("whole chest", "yes" if self.chest.is_chest else "no"),
            ]
        return rows

    def _axes(self) -> zip:
        assert self.volume is not None
        return zip(self.volume.hu.shape, self.volume.spacing_mm, strict=True)


def inspect(
    path: str | Path,
    series: str | None = None,
    rescale: tuple[float, float] | None = None,
) -> InspectResult:
    """Read and check one scan or DICOM folder; a bad scan gives a result with its error.

    Args:
        path: A scan, or a folder of DICOM files.
        series: SeriesInstanceUID to take from a folder.
        rescale: Slope and intercept, applied only if the file does not hold HU.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
    """
    path = Path(path)
    result = InspectResult(path)
    try:
        if path.is_dir():
            result.series = [one.describe() for one in dicom.find_series(path)]
        found = checked.look(path, series=series, rescale=rescale)
    except VolumeError as error:
        result.error = error
        return result
    result.volume, result.chest = found.volume, found.chest
    return result


def render(result: InspectResult) -> "RenderableType":
    """The facts and notes as a table for ``rich``."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    for name, value in result.facts():
        facts.add_row(Text(name, style="bold"), Text(value))
    styles = {"info": "dim", "note": "cyan", "warn": "yellow", "hold": "bold red"}
    lines = [
        Text(f"{note.level:>4}  {note.text}  [{note.code}]", style=styles[note.level])
        for note in result.notes
    ]
    if result.error is not None:
        verdict = Text(f"refused: {result.error.detail} [{result.error.code}]", style="bold red")
    elif not result.is_usable:
        advice = "; ".join(note.advice for note in result.notes if note.level == "hold")
        verdict = Text(f"held back: {advice}", style="bold red")
    elif any(note.level == "warn" for note in result.notes):
        verdict = Text("usable, with warnings", style="yellow")
    else:
        verdict = Text("usable", style="green")
    return Group(facts, *lines, verdict)


def save_picture(result: InspectResult, path: str | Path) -> Path:
    """Draw axial, coronal and sagittal slices in a lung and a soft-tissue window.

    Args:
        result: Of a scan that could be read.
        path: PNG to write.

    Returns:
        The path.

    Raises:
        ValueError: If the scan could not be read.
    """
    if result.volume is None:
        raise ValueError(f"{result.path} could not be read: {result.error}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    hu, (mm_d, mm_h, mm_w) = result.volume.hu, result.volume.spacing_mm
    d, h, w = _centre(hu)
    # Every plane as a radiologist sees it: feet and front towards the viewer, left on the right.
    planes = [
        ("axial", hu[d], mm_h / mm_w, "A", "P", "R", "L"),
        ("coronal", hu[::-1, h], mm_d / mm_w, "S", "I", "R", "L"),
        ("sagittal", hu[::-1, :, w], mm_d / mm_h, "S", "I", "A", "P"),
    ]
    figure = Figure(figsize=(12, 8), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    for row, (low, high) in enumerate((LUNG_WINDOW_HU, SOFT_WINDOW_HU)):
        for column, (name, plane, aspect, top, bottom, left, right) in enumerate(planes):
            axes = figure.add_subplot(2, 3, 3 * row + column + 1)
            axes.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=aspect)
            axes.set_axis_off()
            axes.set_title(f"{name}, {low:.0f} to {high:.0f} HU", color="white", fontsize=9)
            for letter, x, y in (
                (top, 0.5, 0.97),
                (bottom, 0.5, 0.03),
                (left, 0.02, 0.5),
                (right, 0.98, 0.5),
            ):
                axes.text(
                    x, y, letter, color="yellow", transform=axes.transAxes, ha="center", va="center"
                )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, facecolor="black")
    return path


def _centre(hu: np.ndarray) -> tuple[int, int, int]:
    """The middle of the body, not of the array: a wide field of view puts patients off-centre."""
    steps = [max(1, n // 64) for n in hu.shape]
    tissue = hu[:: steps[0], :: steps[1], :: steps[2]] > -400
    middle = []
    for axis in range(3):
        profile = tissue.sum(axis=tuple(other for other in range(3) if other != axis))
        weights = np.cumsum(profile)
        index = int(np.searchsorted(weights, weights[-1] / 2)) if weights[-1] else len(profile) // 2
        middle.append(min(index * steps[axis], hu.shape[axis] - 1))
    return middle[0], middle[1], middle[2]


def _times(values: object) -> str:
    return " x ".join(str(value) for value in values)  # type: ignore[attr-defined]
