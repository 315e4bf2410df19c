"""Resample, crop and pad in one pass, slice by slice.

Trilinear with half-voxel alignment (the two grids cover the same box, as in
``torch.nn.functional.interpolate(align_corners=False)``), computed only where the result is kept.
One source slice is in float32 at a time, so a 1024 x 1024 x 400 scan needs little more memory than
its own int16 voxels.
"""

from dataclasses import dataclass

import numpy as np

HEADER_ROUNDING = 1e-4
"""Voxels by which a length may miss a whole number and still be it.

A NIfTI header holds 0.9 mm as a float32 just below it: 400 such slices are 239.999994 of 1.5 mm,
and cut down to 239 they would be another volume than the same scan's DICOM files make.
"""


@dataclass(frozen=True)
class AxisPlan:
    """How one axis of the result is made from one axis of the source."""

    index: np.ndarray
    """``(kept, taps)`` source positions that each kept output position averages."""

    weight: np.ndarray
    """``(kept, taps)`` float64, each row summing to 1."""

    before: int
    """Padding in front of the kept positions."""

    first: float
    """Source coordinate of output position 0 (may be negative when the output is padded)."""

    step: float
    """Source voxels per output voxel."""


def plan_axis(
    size: int, source_mm: float, target_mm: float, num_out: int, antialias: bool
) -> AxisPlan:
    """Plan one axis: resample to the target spacing, then crop or pad about the centre.

    Args:
        size: Voxels in the source.
        source_mm: Their spacing.
        target_mm: Wanted spacing; met exactly up to truncation to whole voxels.
        num_out: Voxels in the result.
        antialias: Average over what a target voxel covers where it is larger than a source voxel;
            otherwise two-tap interpolation, which skips source voxels beyond a factor of two.
    """
    resampled = max(1, int(size * source_mm / target_mm + HEADER_ROUNDING))
    step = size / resampled
    crop = max((resampled - num_out) // 2, 0)
    kept = min(num_out, resampled)
    before = (num_out - kept) // 2
    centre = (np.arange(crop, crop + kept) + 0.5) * step - 0.5
    if antialias and step > 1:
        taps = int(np.ceil(2 * step))  # whole numbers inside an open interval of that length
        lowest = np.floor(centre - step).astype(int) + 1
        index = lowest[:, None] + np.arange(taps)
        weight = np.clip(1 - np.abs(index - centre[:, None]) / step, 0, None)
        weight[(index < 0) | (index >= size)] = 0
    else:
        inside = np.clip(centre, 0, size - 1)
        lowest = np.floor(inside).astype(int)
        index = lowest[:, None] + np.arange(2)
        weight = np.stack([1 - (inside - lowest), inside - lowest], axis=1)
    weight /= weight.sum(axis=1, keepdims=True)
    first = (crop - before + 0.5) * step - 0.5
    return AxisPlan(np.clip(index, 0, size - 1), weight, before, first, step)


def resample(
    hu: np.ndarray,
    source_mm: tuple[float, float, float],
    target_mm: tuple[float, float, float],
    size: tuple[int, int, int],
    *,
    clip_hu: tuple[float, float] | None,
    fill_hu: float,
    antialias: bool,
    precision: type[np.floating] = np.float32,
    dtype: type[np.generic] = np.int16,
) -> np.ndarray:
    """Bring a scan to a fixed spacing and size.

    Values are clipped before interpolation, so that padding of -3024 or a metal voxel of 32767
    can't bleed into its neighbours.

    Args:
        hu: ``(D, H, W)`` int16 or float32; any strides, left unchanged.
        source_mm: Spacing of ``hu``.
        target_mm: Wanted spacing.
        size: Wanted ``(D, H, W)``; the scan is cropped or padded about its centre.
        clip_hu: Lowest and highest value that is kept; None leaves all.
        fill_hu: Value of padding.
        antialias: See :func:`plan_axis`.
        precision: Of the arithmetic.
        dtype: Of the result.

    Returns:
        ``size`` HU, rounded to the nearest if ``dtype`` is an integer.
    """
    depth, height, width = (
        plan_axis(n, source, target, out, antialias)
        for n, source, target, out in zip(hu.shape, source_mm, target_mm, size, strict=True)
    )
    result = np.full(size, fill_hu, dtype=dtype)
    rows = slice(int(height.index.min()), int(height.index.max()) + 1)
    columns = slice(int(width.index.min()), int(width.index.max()) + 1)
    row_index, column_index = height.index - rows.start, width.index - columns.start
    target_rows = slice(height.before, height.before + len(height.index))
    target_columns = slice(width.before, width.before + len(width.index))
    row_weight, column_weight = height.weight.astype(precision), width.weight.astype(precision)
    # Buffers are reused for every slice: allocating them anew costs as much as the arithmetic.
    source = _Planes(hu[:, rows, columns], clip_hu, precision)
    mixed, mixed_tap = _pair(source.shape, precision)
    tall, tall_tap = _pair((len(row_index), mixed.shape[1]), precision)
    small, small_tap = _pair((len(row_index), len(column_index)), precision)
    for position, (indices, weights) in enumerate(
        zip(depth.index, depth.weight.astype(precision), strict=True)
    ):
        source.forget_below(indices[0])
        taps = [(index, w) for index, w in zip(indices.tolist(), weights, strict=True) if w != 0]
        for number, (index, weight) in enumerate(taps):
            np.multiply(source[index], weight, out=mixed_tap if number else mixed)
            if number:
                mixed += mixed_tap
        _weighted(mixed, row_index, row_weight, 0, tall, tall_tap)
        _weighted(tall, column_index, column_weight, 1, small, small_tap)
        if np.issubdtype(dtype, np.integer):
            np.rint(small, out=small)
        result[depth.before + position, target_rows, target_columns] = small
    return result


class _Planes:
    """Source slices in floating point, made when first asked for and forgotten when passed."""

    def __init__(
        self,
        hu: np.ndarray,
        clip_hu: tuple[float, float] | None,
        precision: type[np.floating],
    ) -> None:
        self.shape: tuple[int, int] = hu.shape[1:]  # type: ignore[assignment]
        self._hu, self._clip_hu, self._precision = hu, clip_hu, precision
        self._held: dict[int, np.ndarray] = {}
        self._free: list[np.ndarray] = []

    def __getitem__(self, index: int) -> np.ndarray:
        if index not in self._held:
            plane = self._free.pop() if self._free else np.empty(self.shape, self._precision)
            if self._clip_hu is None:
                plane[...] = self._hu[index]
            else:
                np.clip(self._hu[index], *self._clip_hu, out=plane, casting="unsafe")
            self._held[index] = plane
        return self._held[index]

    def forget_below(self, index: int) -> None:
        for passed in [held for held in self._held if held < index]:
            self._free.append(self._held.pop(passed))


def _pair(shape: tuple[int, int], precision: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
    return np.empty(shape, precision), np.empty(shape, precision)


def _weighted(
    plane: np.ndarray,
    index: np.ndarray,
    weight: np.ndarray,
    axis: int,
    total: np.ndarray,
    part: np.ndarray,
) -> None:
    """Write into ``total`` the weighted sum over taps of the rows or columns of ``plane``."""
    for tap in range(index.shape[1]):
        out = total if tap == 0 else part
        np.take(plane, index[:, tap], axis=axis, out=out, mode="clip")
        out *= weight[:, tap] if axis == 1 else weight[:, tap : tap + 1]
        if tap:
            total += part


def resampled_affine(
    affine: np.ndarray,
    shape: tuple[int, ...],
    source_mm: tuple[float, float, float],
    target_mm: tuple[float, float, float],
    size: tuple[int, int, int],
) -> np.ndarray:
    """Index-to-mm affine of what :func:`resample` returns, half-voxel shift and crop included."""
    plans = [
        plan_axis(n, source, target, out, antialias=False)
        for n, source, target, out in zip(shape, source_mm, target_mm, size, strict=True)
    ]
    matrix = np.diag([*(plan.step for plan in plans), 1.0])
    matrix[:3, 3] = [plan.first for plan in plans]
    return affine @ matrix
