"""Where voxels lie: orientation, spacing, shear, and resampling onto the network's grid.

Everything here works on one array at a time and on slabs of it, in numpy: a worker that prepares a
cohort needs neither torch nor a second copy of a scan in memory.
"""

from pathlib import Path

import numpy as np
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    io_orientation,
    ornt_transform,
)

from ctclip.data.problems import Note, VolumeError
from ctclip.data.table import ClaimedSpacing

HOUSE_AXES = ("S", "P", "L")
"""D runs towards superior, H towards posterior, W towards the patient's left."""

MIN_SLICES = 8
"""Fewer slices along any axis is a picture, not a volume."""

SPACING_RANGE_MM = (0.02, 30.0)
"""CT voxels are 0.1 to 10 mm; phantoms and block averages reach a little further."""

MAX_EXTENT_MM = 2500.0
"""Longer than a whole-body scan."""

MAX_SHEAR = 0.02
"""Cosine between two axes above which a grid counts as sheared (1.1 degrees)."""

MAX_TILT = 0.64
"""Cosine at 50 degrees; a gantry tilts by 30 at most, more is a broken affine."""

OBLIQUE_DEGREES = 1.0


def orient(
    voxels: np.ndarray, affine: np.ndarray, axes: tuple[str, str, str] = HOUSE_AXES
) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip axes to an orientation, without interpolation and without a copy.

    Args:
        voxels: ``(i, j, k)`` in any axis order.
        affine: ``(4, 4)`` index to RAS mm.
        axes: Direction in which each axis of the result runs.

    Returns:
        A view of the voxels and the affine that belongs to it.
    """
    transform = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    oriented = apply_orientation(voxels, transform)
    matrix = np.eye(4)
    matrix[:3, :3] = 0
    for source, (target, flip) in enumerate(transform.astype(int)):
        matrix[source, target] = flip
        matrix[source, 3] = voxels.shape[source] - 1 if flip < 0 else 0
    return oriented, affine @ matrix


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size along each array axis, from the affine's columns."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return (float(lengths[0]), float(lengths[1]), float(lengths[2]))


def check_grid(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Refuse grids that no CT has.

    Raises:
        VolumeError: If an axis is too short, or the spacing or the extent is impossible.
    """
    if min(shape) < MIN_SLICES:
        raise VolumeError(
            path, "too-small", f"{shape} voxels; at least {MIN_SLICES} per axis are needed"
        )
    spacing = spacing_mm(affine)
    low, high = SPACING_RANGE_MM
    if not all(low <= step <= high for step in spacing):
        shown = " x ".join(f"{step:.4g}" for step in spacing)
        raise VolumeError(
            path, "bad-spacing", f"spacing {shown} mm is outside {low} to {high} mm; check units"
        )
    extent = max(size * step for size, step in zip(shape, spacing, strict=True))
    if extent > MAX_EXTENT_MM:
        raise VolumeError(
            path, "bad-extent", f"{extent:.0f} mm long; a scan ends at {MAX_EXTENT_MM:.0f} mm"
        )


def describe(affine: np.ndarray) -> list[Note]:
    """Note how the scan was stored: axis codes, obliqueness, slice direction."""
    codes = aff2axcodes(affine)
    notes = [Note("stored-axes", f"stored {''.join(codes)}, read as {''.join(HOUSE_AXES)}")]
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosine = np.clip(np.abs(directions).max(axis=0).min(), 0, 1)
    degrees = float(np.degrees(np.arccos(cosine)))
    if degrees > OBLIQUE_DEGREES:
        text = f"grid is up to {degrees:.1f} degrees off the body's axes; kept the closest axes"
        notes.append(Note("oblique", text, "note"))
    steps = spacing_mm(affine)
    if codes[int(np.argmax(steps))] not in "IS" and max(steps) > 1.3 * sorted(steps)[1]:
        text = "thickest axis is not head-foot: a coronal or sagittal reformat"
        notes.append(Note("reformat", text, "note"))
    return notes


def handedness(affine: np.ndarray) -> list[Note]:
    """Note axes that form a left-handed system: readers that ignore the affine mirror such a scan.

    Args:
        affine: ``(4, 4)`` from the file's own (i, j, k) to RAS mm.
    """
    if np.linalg.det(affine[:3, :3]) > 0:
        return []
    text = "stored left-handed; read by its affine, so that left stays left"
    return [Note("left-handed", text, "note")]


def unshear(
    path: Path, voxels: np.ndarray, affine: np.ndarray, fill: float
) -> tuple[np.ndarray, np.ndarray, list[Note]]:
    """Straighten a volume whose slices are stacked askew, as with a tilted gantry.

    Each axial slice is moved within its plane until the stack is perpendicular to it, so that the
    spacing along D becomes the true distance between slices.

    Args:
        path: Named in errors.
        voxels: ``(D, H, W)`` in house orientation.
        affine: ``(4, 4)`` index to RAS mm.
        fill: Value where a moved slice leaves a gap.

    Raises:
        VolumeError: If the axes inside a slice are not perpendicular, or the tilt is absurd.
    """
    columns = affine[:3, :3]
    unit = columns / np.linalg.norm(columns, axis=0)
    if abs(unit[:, 1] @ unit[:, 2]) > MAX_SHEAR:
        raise VolumeError(
            path, "sheared-slices", "rows and columns of a slice are not at 90 degrees"
        )
    normal = np.cross(unit[:, 1], unit[:, 2])
    normal *= np.sign(normal @ unit[:, 0])
    tilt = float(np.sqrt(max(0.0, 1 - (normal @ unit[:, 0]) ** 2)))
    if tilt <= MAX_SHEAR:
        return voxels, affine, []
    if tilt > MAX_TILT:
        raise VolumeError(path, "bad-affine", "slices are stacked more than 40 degrees askew")

    from scipy import ndimage

    step = float(columns[:, 0] @ normal)
    drift = columns[:, 0] - step * normal
    per_slice = np.array(
        [drift @ unit[:, axis] / np.linalg.norm(columns[:, axis]) for axis in (1, 2)]
    )
    middle = (voxels.shape[0] - 1) / 2
    straight = np.empty(voxels.shape, dtype=np.float32)
    for index, plane in enumerate(voxels):
        shift = per_slice * (index - middle)
        ndimage.shift(plane.astype(np.float32), shift, output=straight[index], order=1, cval=fill)
    straightened = affine.copy()
    straightened[:3, 0] = step * normal
    straightened[:3, 3] = affine[:3, 3] + middle * drift
    degrees = float(np.degrees(np.arcsin(tilt)))
    text = f"slices stacked {degrees:.1f} degrees askew (gantry tilt); straightened"
    return straight, straightened, [Note("tilt", text, "warn")]


def compare_spacing(found_mm: tuple[float, float, float], claimed_mm: ClaimedSpacing) -> list[Note]:
    """Note where a table's spacing is more than 1 % off the file's; the file is believed."""
    pairs = zip(found_mm, claimed_mm, strict=True)
    worst = max((abs(f - c) / f for f, c in pairs if c is not None), default=0.0)
    if not worst > 0.01:
        return []
    shown = [
        " x ".join("?" if step is None else f"{step:.4g}" for step in steps)
        for steps in (found_mm, claimed_mm)
    ]
    text = f"the file says {shown[0]} mm (D x H x W), the table {shown[1]} mm; used the file's"
    return [Note("spacing-conflict", text, "warn")]
