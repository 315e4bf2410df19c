"""What painters paint on: a patient on a grid, with the fields that every painter shares.

A scene may be one slab of a large scan. Random fields depend on a name and the patient's seed,
not on the order of calls, so slabs join without seams.
"""

import functools
import zlib

import numpy as np

from ctclip.phantom import anatomy, trees
from ctclip.phantom.anatomy import FAR_MM, Patient
from ctclip.phantom.grid import Array, Box, Grid, smooth_field, smooth_min


class Scene:
    """Voxels in HU and the anatomy beneath them.

    Args:
        patient: The body that lies on the grid; for a real scan, the template fitted to it.
        grid: Voxels of this scene (all of the scan or a slab).
        extent: Grid of the whole scan.
        hu: Voxels to paint on; air when not given.
        lung: Signed distance to the lungs in mm; computed from the patient when not given.
        lung_trees: Vessels and airways; grown when first needed.
    """

    def __init__(
        self,
        patient: Patient,
        grid: Grid,
        *,
        extent: Grid | None = None,
        hu: Array | None = None,
        lung: Array | None = None,
        lung_trees: trees.LungTrees | None = None,
    ) -> None:
        self.patient = patient
        self.grid = grid
        self.extent = extent or grid
        self.hu = np.full(grid.shape, -1000.0, np.float32) if hu is None else hu
        if lung is not None:
            self.lung = lung
        if lung_trees is not None:
            self.trees = lung_trees

    @functools.cached_property
    def template(self) -> tuple[Array, Array, Array]:
        """Template coordinates (z, y, x) of every voxel; z is ``(D, 1, 1)``."""
        return self.patient.to_template(self.grid)

    @functools.cached_property
    def cage(self) -> Array:
        """Signed distance to the inner rib cage, template mm."""
        return anatomy.cage(self.patient, *self.template)

    @functools.cached_property
    def dome(self) -> Array:
        """Signed distance to the diaphragm's upper surface, negative below it, template mm."""
        z, y, x = self.template
        # 0.75: the diaphragm's slope turns a height into a distance.
        return (z - anatomy.diaphragm_height(self.patient, y, x)) * np.float32(0.75)

    @functools.cached_property
    def sac(self) -> Array:
        """Signed distance to the pericardium in template mm, large far from the heart."""
        distance = np.full(self.grid.shape, FAR_MM, np.float32)
        reach = 108.0 * self.patient.heart
        centre = self.patient.to_world(anatomy.HEART_CENTRE)
        box = self.grid.box(centre - reach, centre + reach)
        if box is not None:
            distance[box] = anatomy.heart(self.patient, *self.template_in(box))
        return distance

    @functools.cached_property
    def lung(self) -> Array:
        """Signed distance to the lungs' surface (visceral pleura), world mm."""
        middle = anatomy.mediastinum(self.patient, *self.template)
        middle = smooth_min(middle, self.sac - 2.0, 10.0)
        tubes = np.full(self.grid.shape, FAR_MM, np.float32)
        for name in anatomy.CONTOUR:
            anatomy.lower_to_tube(tubes, self.patient, self.grid, name, 12.0)
        middle = smooth_min(middle, tubes - 3.0, 8.0)
        distance = np.maximum(np.maximum(self.cage, -self.dome), -middle)
        return distance * np.float32(self.patient.mean_scale)

    @functools.cached_property
    def trees(self) -> trees.LungTrees:
        """Vessels and airways, finer on finer grids."""
        ends = 128 if self.grid.edge_mm > 2.5 else (512 if self.grid.edge_mm > 1.2 else 1024)
        return trees.grow_trees(self.patient, ends)

    @functools.cached_property
    def lung_box(self) -> Box | None:
        """The voxels around both lungs, or None where the scene holds no lung."""
        inside = self.lung < self.grid.edge_mm
        ranges = []
        for axis in range(3):
            hit = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
            if not len(hit):
                return None
            ranges.append(slice(int(hit[0]), int(hit[-1]) + 1))
        return ranges[0], ranges[1], ranges[2]

    def template_in(self, box: Box) -> tuple[Array, Array, Array]:
        """Template coordinates of a box of voxels."""
        z, y, x = self.template
        return z[box[0]], y[box], x[box]

    def axes_in(self, box: Box) -> tuple[Array, Array, Array]:
        """World coordinates (z, y, x) of a box of voxels, ready to broadcast."""
        z, y, x = self.grid.axes
        return z[box[0]], y[:, box[1]], x[:, :, box[2]]

    def field(
        self, name: str, scale_mm: float, box: Box | None = None, within: Array | None = None
    ) -> Array:
        """A random field of unit variance, named so that every slab sees the same one.

        Args:
            name: Fields of different names are independent.
            scale_mm: Length over which the field varies.
            box: Voxels to evaluate it on; all of them by default.
            within: World corners ``(2, 3)`` of the region that needs it, the same for every
                slab; the whole scan by default.
        """
        rng = np.random.default_rng([self.patient.tree_seed, zlib.crc32(name.encode())])
        grid = self.grid if box is None else self.grid.crop(box)
        if within is None:
            low = np.asarray(self.extent.origin_mm)
            within = np.stack([low, low + np.multiply(self.extent.shape, self.extent.spacing_mm)])
        return smooth_field(grid, scale_mm, rng, within[0], within[1])
