"""From a body to a scan: field of view, voxels, blur, noise, and the loop that renders them.

Scanner and kernel are drawn independently of disease, in the proportions of CT-RATE.
"""

import csv
import dataclasses
import functools
import importlib.resources

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from ctclip.phantom import anatomy, body
from ctclip.phantom.anatomy import Patient
from ctclip.phantom.grid import Array, Grid
from ctclip.phantom.lesions import Lesion, draw
from ctclip.phantom.scene import Scene

SLAB_VOXELS = 700_000
"""Rendered at a time: small enough that a slab's fields stay near the processor's cache."""

LEAST_SLICES = 6
"""Thinner slabs would spend more on looking for what crosses them than on drawing it."""

SEEN_HU = 20.0
"""A voxel belongs to a lesion's bounding box when drawing the lesion changed it by this much."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scanner:
    """One reconstruction's machine and kernel."""

    manufacturer: str
    model: str
    kernel: str
    sharp: bool
    slice_mm: float
    partner: str
    """Kernel of the same machine's other reconstruction."""


@functools.cache
def scanners() -> tuple[tuple[Scanner, ...], tuple[float, ...]]:
    """The machines of the cohort and their shares (sum 1)."""
    text = importlib.resources.files("ctclip.phantom").joinpath("data/scanners.csv")
    with text.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    total = sum(float(row["share"]) for row in rows)
    machines = tuple(
        Scanner(
            manufacturer=row["manufacturer"],
            model=row["model"],
            kernel=row["kernel"],
            sharp=row["sharp"] == "1",
            slice_mm=float(row["slice_mm"]),
            partner=row["partner"],
        )
        for row in rows
    )
    return machines, tuple(float(row["share"]) / total for row in rows)


def sample_scanners(rng: np.random.Generator, count: int) -> list[Scanner]:
    """One machine and its ``count`` (1 or 2) reconstructions, the second with its other kernel."""
    machines, shares = scanners()
    first = machines[int(rng.choice(len(machines), p=shares))]
    second = next(m for m in machines if m.model == first.model and m.kernel == first.partner)
    return [first, second][:count]


def field_of_view(patient: Patient, rng: np.random.Generator) -> tuple[Array, Array]:
    """World corners (z, y, x) of a scan that covers the lungs with a technician's margins."""
    low_z = (-178.0 - patient.breath_mm) * patient.scale[0] - rng.uniform(2, 55)
    high_z = anatomy.APEX_MM * patient.scale[0] + rng.uniform(6, 32)
    width = (
        2
        * (158.0 * patient.muscle / np.sqrt(patient.barrel) + patient.fat_mm + 3.0)
        * patient.scale[2]
    )
    side = float(np.clip(width * rng.uniform(0.97, 1.15), 290, 500))
    y = patient.position_mm[1] + 8.0 + rng.normal(0, 6)
    x = patient.position_mm[2] + rng.normal(0, 5)
    low = np.array([low_z, y - side / 2, x - side / 2], np.float32)
    return low, np.array([high_z, y + side / 2, x + side / 2], np.float32)


def make_grid(
    low_mm: Array,
    high_mm: Array,
    scanner: Scanner,
    shape: tuple[int, int, int] | None,
    spacing_mm: tuple[float, float, float] | None,
) -> Grid:
    """Voxels over a field of view: a fixed shape, a fixed spacing, or the scanner's own.

    With neither given, the scanner's: 512 x 512 at 0.6-0.9 mm and slices of 1-3 mm.
    """
    size = np.asarray(high_mm - low_mm, np.float64)
    if spacing_mm is None:
        if shape is not None:
            spacing_mm = tuple(size / shape)
        else:
            pixel = float(np.clip(size[1] / 512, 0.6, 0.9))
            spacing_mm, shape = (scanner.slice_mm, pixel, pixel), None
    if shape is None:
        shape = tuple(round(n) for n in size / spacing_mm)
    middle = (low_mm + high_mm) / 2
    origin = middle - (np.array(shape) - 1) / 2 * np.array(spacing_mm)
    return Grid(
        (int(shape[0]), int(shape[1]), int(shape[2])),
        (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2])),
        (float(origin[0]), float(origin[1]), float(origin[2])),
    )


def render(
    patient: Patient, lesions: list[Lesion], grid: Grid
) -> tuple[Array, list[tuple[NDArray[np.int64], NDArray[np.int64]] | None]]:
    """Draw a body and its lesions, free of blur and noise.

    Args:
        patient: The body.
        lesions: Drawn in this order.
        grid: Voxels of the scan.

    Returns:
        HU ``(D, H, W)`` float32, and per lesion the first and last voxel (inclusive) that it
        changed, or None where it is too small or outside the field of view.
    """
    hu = np.full(grid.shape, -1000.0, np.float32)
    boxes: list[tuple[NDArray[np.int64], NDArray[np.int64]] | None] = [None] * len(lesions)
    whole = Scene(patient, grid)
    step = max(LEAST_SLICES, SLAB_VOXELS // (grid.shape[1] * grid.shape[2]))
    for start in range(0, grid.shape[0], step):
        stop = min(start + step, grid.shape[0])
        scene = Scene(
            patient,
            grid.slab(start, stop),
            extent=grid,
            hu=hu[start:stop],
            lung_trees=whole.trees,
        )
        body.paint_body(scene)
        for i, lesion in enumerate(lesions):
            before = scene.hu.copy()
            draw(scene, lesion)
            if lesion.finding == "Cardiomegaly":
                boxes[i] = _merge(boxes[i], _bounds(scene.sac < 0), start)
                continue
            touched = np.flatnonzero((scene.hu != before).any(axis=(1, 2)))
            if len(touched):
                part = slice(int(touched[0]), int(touched[-1]) + 1)
                changed = np.abs(scene.hu[part] - before[part]) > SEEN_HU
                boxes[i] = _merge(boxes[i], _bounds(changed), start + part.start)
    return hu, boxes


def _bounds(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    if not mask.any():
        return None
    low, high = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low[axis], high[axis] = hit[0], hit[-1]
    return low, high


def _merge(
    old: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    new: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    start: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    if new is None:
        return old
    shift = np.array([start, 0, 0])
    low, high = new[0] + shift, new[1] + shift
    return (low, high) if old is None else (np.minimum(old[0], low), np.maximum(old[1], high))


def scan(
    hu: Array, grid: Grid, scanner: Scanner, rng: np.random.Generator, dose: float = 1.0
) -> NDArray[np.int16]:
    """Blur, noise and rounding of one reconstruction.

    Args:
        hu: Ideal voxels ``(D, H, W)``.
        grid: Their grid.
        scanner: Kernel and slice thickness.
        rng: Noise.
        dose: Relative to standard; noise goes with its square root.

    Returns:
        HU as int16, not below -1024.
    """
    pixel = grid.spacing_mm[1]
    blur_mm = (0.4 if scanner.sharp else 0.75, 0.35 * scanner.slice_mm)
    sigma = (blur_mm[1] / grid.spacing_mm[0], blur_mm[0] / pixel, blur_mm[0] / pixel)
    out = hu
    for axis in range(3):
        if sigma[axis] > 0.25:
            out = gaussian_filter1d(out, sigma[axis], axis=axis)
    if scanner.sharp and 1.2 / pixel > 0.6:
        for slices in out:
            slices += 0.45 * (slices - gaussian_filter(slices, 1.2 / pixel))
    # Standard deviations measured on real scans at about 0.7 x 0.7 x 1.5 mm; averaging over
    # larger voxels removes noise, but less than if it were white.
    level = (41.0 if scanner.sharp else 22.0) * float(np.exp(rng.normal(0, 0.2))) / np.sqrt(dose)
    level *= float(np.clip((0.735 / np.prod(grid.spacing_mm)) ** 0.5, 0.22, 1.3))
    _, y, x = grid.axes
    centre = (y - y.mean()) ** 2 + (x - x.mean()) ** 2
    profile = (0.65 + 0.6 * np.exp(-centre / 110.0**2))[0]
    grain = 0.45 if scanner.sharp else 0.85
    result = np.empty(grid.shape, np.int16)
    for d in range(grid.shape[0]):
        noise = rng.standard_normal(grid.shape[1:], dtype=np.float32)
        noise = gaussian_filter(noise, grain)
        noise *= level / max(float(noise.std()), 1e-6) * profile
        result[d] = np.clip(np.rint(out[d] + noise), -1024, 3071)
    return result
