"""Is it a chest? Measured from air and tissue alone, so that any scan can be checked in no time.

Lungs are air inside the body: found on a coarse grid, as air that does not reach the border of its
axial slice. Thresholds were set on 8 full chests and 8 scans that are something else (a head, an
abdomen, slabs, crops); they warn, they do not decide.
"""

from dataclasses import dataclass

import numpy as np

from ctclip.data.problems import Note
from ctclip.data.volume import Volume

COARSE_MM = 5.0
"""Grid of the check; lungs need no finer one."""

MAX_COARSE = 96
"""Voxels per axis at most, for scans whose header claims a metre of fine slices."""

LUNG_HU = (-990, -400)
BODY_HU = -400

MIN_LUNG_FRACTION = 0.05
"""Lung per body volume. Full chests 0.09 to 0.35, an abdomen with lung bases 0.02, a head 0."""

MIN_EXTENT_MM = 120.0
"""Head-foot length of a chest scan; children and low-dose screening stay above 150."""

BODY_WIDTH_MM = (180.0, 700.0)
"""Outside of it, the spacing in the header is probably wrong."""


@dataclass(frozen=True)
class ChestCheck:
    """What was measured, and what is odd about it."""

    lung_litres: float
    lung_fraction: float
    """Lung volume per volume of the body, lungs included; independent of the spacing."""

    extent_mm: float
    body_width_mm: float
    notes: tuple[Note, ...]

    @property
    def is_chest(self) -> bool:
        """Whether the scan looks like a whole chest."""
        return not any(note.code in ("not-chest", "partial-chest") for note in self.notes)


def check(volume: Volume) -> ChestCheck:
    """Measure lungs and body, and warn about heads, abdomens, slabs and impossible sizes."""
    coarse, spacing = _coarse(volume)
    body, lung = _body_and_lung(coarse)
    voxel_litres = float(np.prod(spacing)) / 1e6
    lung_litres = float(lung.sum()) * voxel_litres
    body_voxels = int((body | lung).sum())
    fraction = float(lung.sum()) / max(1, body_voxels)
    extent = volume.hu.shape[0] * volume.spacing_mm[0]
    columns = np.flatnonzero((body | lung).any(axis=(0, 1)))
    width = (columns[-1] - columns[0] + 1) * spacing[2] if columns.size else 0.0

    notes = []
    if fraction < MIN_LUNG_FRACTION:
        text = f"lungs fill {100 * fraction:.1f} % of the body ({lung_litres:.2f} l): not a chest?"
        notes.append(Note("not-chest", text, "warn"))
    elif extent < MIN_EXTENT_MM:
        text = f"only {extent:.0f} mm from top to bottom: a slab, not a whole chest"
        notes.append(Note("partial-chest", text, "warn"))
    low, high = BODY_WIDTH_MM
    if not low <= width <= high:
        text = f"the body is {width:.0f} mm wide: the spacing may be wrong, or it is a crop"
        notes.append(Note("body-size", text, "warn"))
    return ChestCheck(lung_litres, fraction, extent, float(width), tuple(notes))


def _coarse(volume: Volume) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Every n-th voxel: enough to tell lungs from bowel gas, and instantaneous."""
    steps = [
        max(1, round(COARSE_MM / spacing), int(np.ceil(size / MAX_COARSE)))
        for spacing, size in zip(volume.spacing_mm, volume.hu.shape, strict=True)
    ]
    d, h, w = steps
    spacing = tuple(step * mm for step, mm in zip(steps, volume.spacing_mm, strict=True))
    return volume.hu[::d, ::h, ::w], spacing  # type: ignore[return-value]


def _body_and_lung(hu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy import ndimage

    tissue = hu > BODY_HU
    labels, num = ndimage.label(tissue)
    if num == 0:
        nothing = np.zeros(hu.shape, dtype=bool)
        return nothing, nothing
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    body = labels == sizes.argmax()
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = ndimage.generate_binary_structure(2, 1)
    air_labels, _ = ndimage.label(~body, structure=in_plane)
    border = np.concatenate(
        [air_labels[:, edge].ravel() for edge in (0, -1)]
        + [air_labels[:, :, edge].ravel() for edge in (0, -1)]
    )
    enclosed = ~np.isin(air_labels, border) & ~body
    lung = enclosed & (hu > LUNG_HU[0]) & (hu < LUNG_HU[1])
    return body | (enclosed & ~lung), lung
