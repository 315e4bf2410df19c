"""Voxel grids in millimetres, and painting implicit shapes onto them without staircases.

World axes are (z, y, x) = (superior, posterior, left) in mm, the order of the array axes
(D, H, W). A shape is a signed distance in mm, negative inside; painting blends over about one
voxel, which is the partial volume that a scanner would record at the edge.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Box = tuple[slice, slice, slice]


@dataclasses.dataclass(frozen=True)
class Grid:
    """An axis-aligned lattice of voxel centres."""

    shape: tuple[int, int, int]
    """Voxels (D, H, W)."""

    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres (D, H, W)."""

    origin_mm: tuple[float, float, float]
    """World position (z, y, x) of voxel (0, 0, 0)."""

    @functools.cached_property
    def axes(self) -> tuple[Array, Array, Array]:
        """World coordinates shaped to broadcast: ``(D,1,1)``, ``(1,H,1)``, ``(1,1,W)``."""
        z, y, x = (
            (start + step * np.arange(n)).astype(np.float32)
            for start, step, n in zip(self.origin_mm, self.spacing_mm, self.shape, strict=True)
        )
        return z[:, None, None], y[None, :, None], x[None, None, :]

    @property
    def edge_mm(self) -> float:
        """Width over which an edge is blended: the side of a cube of the voxel's volume."""
        return float(np.cbrt(np.prod(self.spacing_mm)))

    @property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4, index (d, h, w) to RAS mm."""
        affine = np.zeros((4, 4))
        z, y, x = self.origin_mm
        affine[0, 2], affine[1, 1], affine[2, 0] = (
            -self.spacing_mm[2],
            -self.spacing_mm[1],
            self.spacing_mm[0],
        )
        affine[:, 3] = (-x, -y, z, 1.0)
        return affine

    def crop(self, box: Box) -> "Grid":
        """The sub-grid of a box of slices."""
        z, y, x = (
            start + part.start * step
            for start, part, step in zip(self.origin_mm, box, self.spacing_mm, strict=True)
        )
        shape = tuple(part.stop - part.start for part in box)
        return Grid((shape[0], shape[1], shape[2]), self.spacing_mm, (z, y, x))

    def slab(self, start: int, stop: int) -> "Grid":
        """The sub-grid of slices ``start:stop``."""
        return self.crop((slice(start, stop), slice(0, self.shape[1]), slice(0, self.shape[2])))

    def box(self, low_mm: NDArray[np.floating], high_mm: NDArray[np.floating]) -> Box | None:
        """Slices of the voxels between two world corners, or None where there is none."""
        slices = []
        for low, high, start, step, n in zip(
            low_mm, high_mm, self.origin_mm, self.spacing_mm, self.shape, strict=True
        ):
            first = max(0, int(np.ceil((low - start) / step)))
            last = min(n, int(np.floor((high - start) / step)) + 1)
            if first >= last:
                return None
            slices.append(slice(first, last))
        return slices[0], slices[1], slices[2]

    def index_of(self, point_mm: NDArray[np.floating]) -> NDArray[np.float64]:
        """Fractional voxel index of world points ``(..., 3)``."""
        return (np.asarray(point_mm) - np.asarray(self.origin_mm)) / np.asarray(self.spacing_mm)


def coverage(distance: Array, edge_mm: float) -> Array:
    """Share of a voxel inside a shape, from the signed distance at its centre."""
    share = distance * np.float32(-1.0 / edge_mm)
    share += np.float32(0.5)
    return np.clip(share, 0.0, 1.0, out=share)


def blend(hu: Array, share: Array | float, value: Array | float) -> None:
    """Mix ``value`` into ``hu`` in place, ``share`` of each voxel."""
    hu += share * (value - hu)


def smooth_min(a: Array, b: Array, radius_mm: float) -> Array:
    """Union of two signed distances with a fillet of about ``radius_mm``."""
    gap = a - b
    np.abs(gap, out=gap)
    np.subtract(np.float32(radius_mm), gap, out=gap)
    np.maximum(gap, 0.0, out=gap)
    gap *= gap
    gap *= np.float32(0.25 / radius_mm)
    return np.subtract(np.minimum(a, b), gap, out=gap)


def ellipsoid(points: tuple[Array, Array, Array], radii_mm: tuple[float, float, float]) -> Array:
    """Signed distance (first order, exact at the surface) to an ellipsoid at the origin."""
    # Squares of the broadcast axes first: only the sums are as large as the box.
    q = [
        (axis * np.float32(1.0 / radius)) ** 2
        for axis, radius in zip(points, radii_mm, strict=True)
    ]
    level = np.sqrt(q[0] + q[1] + q[2])
    slope = q[0] * np.float32(radii_mm[0] ** -2) + q[1] * np.float32(radii_mm[1] ** -2)
    slope = slope + q[2] * np.float32(radii_mm[2] ** -2)
    np.sqrt(slope, out=slope)
    np.maximum(slope, 1e-6, out=slope)
    return level * (level - np.float32(1.0)) / slope


def capsule_box(
    grid: Grid, start: Array, stop: Array, radius_mm: float
) -> tuple[Box, Array] | tuple[None, None]:
    """Distance to the segment ``start``-``stop`` (z, y, x) inside its own bounding box."""
    box = grid.box(np.minimum(start, stop) - radius_mm, np.maximum(start, stop) + radius_mm)
    if box is None:
        return None, None
    z, y, x = grid.axes
    z, y, x = z[box[0]] - start[0], y[:, box[1]] - start[1], x[:, :, box[2]] - start[2]
    along = (stop - start).astype(np.float32)
    length2 = float(along @ along)
    square = z * z + y * y + x * x
    if length2 > 0:
        projection = z * along[0] + y * along[1] + x * along[2]
        t = np.clip(projection / length2, 0.0, 1.0)
        square += t * (t * length2 - 2.0 * projection)
    return box, np.sqrt(np.maximum(square, 0.0))


def raise_to(hu: Array, share: Array | float, value: Array | float) -> None:
    """Like :func:`blend`, but never darkens: vessels stay visible through ground glass."""
    hu += share * np.maximum(value - hu, 0.0)


def smooth_field(
    grid: Grid, scale_mm: float, rng: np.random.Generator, low_mm: Array, high_mm: Array
) -> Array:
    """Random field of unit variance that varies over ``scale_mm``, the same in every slab.

    Normal numbers on a coarse lattice between two world corners (of the scan or the lesion),
    interpolated along one axis at a time: three small matrix products, not a lookup per voxel.
    """
    counts = np.ceil((np.asarray(high_mm) - low_mm) / scale_mm).astype(int) + 2
    field = rng.standard_normal(tuple(counts)).astype(np.float32)
    for axis in range(3):
        position = (grid.axes[axis].ravel() - low_mm[axis]) / scale_mm
        position = np.clip(position, 0.0, counts[axis] - 1.001)
        low = position.astype(int)
        t = (position - low).astype(np.float32)
        t = t * t * (3.0 - 2.0 * t)
        weights = np.zeros((len(position), counts[axis]), np.float32)
        rows = np.arange(len(position))
        weights[rows, low] = 1.0 - t
        weights[rows, low + 1] += t
        field = np.moveaxis(np.tensordot(weights, field, axes=(1, axis)), 0, axis)
    return field / np.float32(0.62)
