"""Branching pulmonary arteries, veins and bronchi that fill the lungs to their edge.

A tree serves a cloud of end points inside one lung. Each level halves every cloud along its
longest axis and sends a branch towards each half; calibre follows Murray's law from the number of
ends served. All levels are array operations, so a tree of 512 ends costs milliseconds.
"""

import dataclasses

import numpy as np

from ctclip.phantom import anatomy
from ctclip.phantom.anatomy import Patient
from ctclip.phantom.grid import Array, Grid, blend, capsule_box, coverage

MURRAY = 0.37
"""Calibre grows with ends served to this power (1/2.7, pulmonary arteries)."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """Branches in world mm: ``start`` and ``stop`` ``(N, 3)``, ``radius`` ``(N,)``."""

    start: Array
    stop: Array
    radius: Array
    lobe: Array
    """Index into ``anatomy.ALL_LOBES`` of each branch's far end."""

    def subset(self, keep: Array) -> "Tree":
        """The branches where ``keep`` holds."""
        return Tree(self.start[keep], self.stop[keep], self.radius[keep], self.lobe[keep])


@dataclasses.dataclass(frozen=True)
class LungTrees:
    """The three trees of both lungs."""

    arteries: Tree
    veins: Tree
    bronchi: Tree
    """``radius`` is the lumen's; the wall lies outside."""


def lung_points(patient: Patient, rng: np.random.Generator, count: int, depth_mm: float) -> Array:
    """Template points ``(count, 3)`` at least ``depth_mm`` inside the lungs, uniform by volume."""
    low, high = np.array([-185.0, -95.0, -136.0]), np.array([100.0, 98.0, 136.0])
    kept: list[Array] = []
    while sum(map(len, kept)) < count:
        points = rng.uniform(low, high, (6 * count, 3)).astype(np.float32)
        # Most of the box lies outside the cage, which is quick to tell.
        points = points[anatomy.cage(patient, *np.moveaxis(points, -1, 0)) < -depth_mm]
        kept.append(points[lung_depth(patient, points) > depth_mm])
    return np.concatenate(kept)[:count]


def lung_depth(patient: Patient, points: Array) -> Array:
    """Depth below the pleura of template points ``(N, 3)`` in mm, negative outside the lungs."""
    z, y, x = np.moveaxis(points, -1, 0)
    d = anatomy.cage(patient, z, y, x)
    d = np.maximum(d, (anatomy.diaphragm_height(patient, y, x) - z) * 0.75)
    middle = np.minimum(
        anatomy.mediastinum(patient, z, y, x), anatomy.heart(patient, z, y, x) - 2.0
    )
    middle = np.minimum(middle, anatomy.contour_distance(patient, points) - 3.0)
    return -np.maximum(d, -middle)


def _grow(
    root: Array, ends: Array, end_radius: float, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Branches (start, stop, radius) from ``root`` to ``ends``, a power of two of them."""
    groups, node, starts, stops, radii = ends[None], root[None], [], [], []
    while groups.shape[1] > 1:
        groups_n, m, _ = groups.shape
        axis = np.argmax(np.ptp(groups, axis=1), axis=1)
        order = np.argsort(groups[np.arange(groups_n), :, axis], axis=1)
        groups = np.take_along_axis(groups, order[:, :, None], axis=1)
        groups = groups.reshape(2 * groups_n, m // 2, 3)
        parent = np.repeat(node, 2, axis=0)
        centroid = groups.mean(axis=1)
        reach = 0.38 if groups.shape[1] > 1 else 1.0
        node = parent + reach * (centroid - parent)
        if groups.shape[1] > 1:
            length = np.linalg.norm(node - parent, axis=1, keepdims=True)
            node = node + rng.normal(0, 0.07, node.shape).astype(np.float32) * length
        starts.append(parent)
        stops.append(node)
        radii.append(np.full(len(node), end_radius * groups.shape[1] ** MURRAY, np.float32))
    return np.concatenate(starts), np.concatenate(stops), np.concatenate(radii)


HILA = {
    "arteries": {"right": (-24.0, 2.0, -42.0), "left": (-22.0, 14.0, 46.0)},
    "veins": {"right": (-48.0, 2.0, -36.0), "left": (-48.0, 6.0, 40.0)},
}


def grow_trees(patient: Patient, ends: int = 256) -> LungTrees:
    """Arteries, veins and bronchi of both lungs, ``ends`` (a power of two) to a lung and tree."""
    rng = np.random.default_rng(patient.tree_seed)
    trees: dict[str, list[Tree]] = {"arteries": [], "veins": [], "bronchi": []}
    for side, sign in (("right", -1.0), ("left", 1.0)):
        for kind in ("arteries", "veins"):
            points = lung_points(patient, rng, 3 * ends, 3.5)
            points = points[points[:, 2] * sign > 0]
            assert len(points) >= ends
            root = np.array(HILA[kind][side], np.float32)
            end_radius = 0.95 * patient.vessels * (256 / ends) ** MURRAY
            start, stop, radius = _grow(root, points[:ends], end_radius, rng)
            trees[kind].append(_in_world(patient, start, stop, radius))
            if kind == "arteries":
                trees["bronchi"].append(_bronchi(patient, start, stop, radius, side))
    return LungTrees(**{kind: _join(parts) for kind, parts in trees.items()})


def _bronchi(patient: Patient, start: Array, stop: Array, radius: Array, side: str) -> Tree:
    """Airways beside the arteries: same branching, lumen 0.7 of the artery, touching it."""
    keep = radius > 0.8
    start, stop, radius = start[keep], stop[keep], radius[keep]
    lumen = 0.7 * radius
    # One direction for the whole lung keeps parent and child joined.
    aside = np.array([0.35, 0.75, -0.55 if side == "right" else 0.55], np.float32)
    shift = (radius + lumen + 0.9)[:, None] * aside
    parent_shift = shift * 1.25
    start, stop = start + parent_shift, stop + shift
    hilum = anatomy.centrelines(patient)[f"{side} main bronchus"][0][-1]
    start[:2] = hilum
    return _in_world(patient, start, stop, lumen)


def _in_world(patient: Patient, start: Array, stop: Array, radius: Array) -> Tree:
    lobe = anatomy.lobe_index(*np.moveaxis(stop, -1, 0))
    scale = np.float32(patient.mean_scale)
    return Tree(patient.to_world(start), patient.to_world(stop), radius * scale, lobe)


def _join(parts: list[Tree]) -> Tree:
    return Tree(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Tree)
        )
    )


def paint_tree(hu: Array, grid: Grid, tree: Tree, value_hu: float) -> None:
    """Draw branches: thick ones as capsules, those thinner than a voxel by their volume."""
    thin = tree.radius < 0.5 * min(grid.spacing_mm)
    for i in np.flatnonzero(~thin):
        radius = float(tree.radius[i])
        box, d = capsule_box(grid, tree.start[i], tree.stop[i], radius + grid.edge_mm)
        if box is not None and d is not None:
            blend(hu[box], coverage(d - np.float32(radius), grid.edge_mm), value_hu)
    if thin.any():
        splat(hu, grid, tree.subset(thin), value_hu)


def splat(hu: Array, grid: Grid, tree: Tree, value_hu: float) -> None:
    """Add thin branches by volume: a vessel of 0.3 voxels still darkens the voxel it crosses."""
    step = 0.7 * min(grid.spacing_mm)
    length = np.linalg.norm(tree.stop - tree.start, axis=1)
    counts = np.maximum(1, np.ceil(length / step)).astype(int)
    branch = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(branch)) - np.repeat(np.cumsum(counts) - counts, counts)
    t = ((within + 0.5) / counts[branch])[:, None]
    points = tree.start[branch] * (1 - t) + tree.stop[branch] * t
    piece = np.pi * tree.radius**2 * length / counts / np.prod(grid.spacing_mm)
    index = grid.index_of(points)
    low = np.floor(index).astype(int)
    fraction = index - low
    shape = np.array(grid.shape)
    flats, weights = [], []
    for corner in np.ndindex(2, 2, 2):
        at = low + corner
        weight = np.prod(np.where(corner, fraction, 1.0 - fraction), axis=1) * piece[branch]
        ok = np.all((at >= 0) & (at < shape), axis=1)
        flats.append(np.ravel_multi_index(tuple(at[ok].T), grid.shape))
        weights.append(weight[ok])
    touched, inverse = np.unique(np.concatenate(flats), return_inverse=True)
    share = np.bincount(inverse, weights=np.concatenate(weights))
    flat_hu = hu.reshape(-1)
    assert np.shares_memory(flat_hu, hu)
    mix = np.minimum(share, 1.0).astype(np.float32)
    flat_hu[touched] += mix * (value_hu - flat_hu[touched])
