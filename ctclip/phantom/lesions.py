"""Draw one lesion. The same functions paint phantoms and plant lesions into real scans.

Every function takes a :class:`~ctclip.phantom.scene.Scene` and a :class:`Lesion`, which carries
everything random, so the same lesion can be drawn again at another size or on another grid.
Positions and sizes are world millimetres; densities are HU.
"""

import dataclasses
import itertools

import numpy as np

from ctclip.phantom import anatomy, body, trees
from ctclip.phantom.body import FLUID_HU
from ctclip.phantom.grid import (
    Array,
    Box,
    blend,
    coverage,
    ellipsoid,
    raise_to,
)
from ctclip.phantom.scene import Scene

METAL_HU = 3000.0
CALCIUM_HU = 750.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesion:
    """One drawn lesion: what the truth table records of it, and what drawing it needs."""

    finding: str
    """Name in ``ctclip.findings.FINDINGS``."""

    kind: str
    """Variant of the finding, for example ``ground-glass`` for a nodule."""

    side: str
    """``left``, ``right``, ``both`` or ``midline``."""

    lobe: str
    """Lobe or region in words; several joined by ``+``."""

    size_mm: float
    """The size a report would state: diameter, short axis, thickness or length."""

    severity: float
    """Extent from 0 (minimal) to 1 (severe)."""

    points_mm: tuple[tuple[float, float, float], ...] = ()
    """World positions (z, y, x) that the drawing needs: a centre, or a line."""

    seed: int = 0
    """Shape and texture."""

    @property
    def name(self) -> str:
        """Name of the lesion's random fields."""
        return f"{self.finding}/{self.kind}/{self.seed}"

    def rng(self) -> np.random.Generator:
        """The lesion's own generator, fresh on every call: each slab draws the same numbers."""
        return np.random.default_rng([self.seed, 17])


def draw(scene: Scene, lesion: Lesion) -> None:
    """Paint ``lesion`` onto ``scene.hu``, in place."""
    _PAINTERS[lesion.finding](scene, lesion)


# --- shapes that lesions share ----------------------------------


def _around(scene: Scene, centre: Array, reach_mm: float | Array) -> Box | None:
    return scene.grid.box(centre - reach_mm, centre + reach_mm)


def _offsets(scene: Scene, box: Box, centre: Array) -> tuple[Array, Array, Array]:
    z, y, x = scene.axes_in(box)
    return z - centre[0], y - centre[1], x - centre[2]


def _blob(
    scene: Scene, lesion: Lesion, centre: Array, radii: Array, rough: float
) -> tuple[Box, Array] | tuple[None, None]:
    """A lumpy ellipsoid: its surface moves by ``rough`` of the smallest radius."""
    small = float(np.min(radii))
    reach = radii + 2.5 * rough * small
    box = _around(scene, centre, reach + scene.grid.edge_mm)
    if box is None:
        return None, None
    d = ellipsoid(_offsets(scene, box, centre), (float(radii[0]), float(radii[1]), float(radii[2])))
    if rough > 0:
        name = f"{lesion.name}/{centre[0]:.2f}"
        within = np.stack([centre - reach, centre + reach])
        lumps = scene.field(name, max(0.55 * small, 2.0), box, within)
        d = d + np.float32(rough * small) * lumps
    return box, d


def _plate(
    scene: Scene, centre: Array, normal: Array, radius: float, thick: float
) -> tuple[Box, Array] | tuple[None, None]:
    """A disc that thins towards its rim, at least one voxel thick: callers dilute it instead."""
    edge = scene.grid.edge_mm
    box = _around(scene, centre, radius + edge)
    if box is None:
        return None, None
    z, y, x = _offsets(scene, box, centre)
    height = np.abs(z * normal[0] + y * normal[1] + x * normal[2])
    across = np.sqrt(np.maximum(z * z + y * y + x * x - height * height, 0.0))
    half = max(thick, edge) / 2
    rim = half * np.clip(1.5 - across / radius, 0.3, 1.0)
    return box, np.maximum(height - rim, across - radius).astype(np.float32)


def _unit(rng: np.random.Generator) -> Array:
    v = rng.normal(size=3)
    return (v / np.linalg.norm(v)).astype(np.float32)


def _points(lesion: Lesion) -> Array:
    return np.asarray(lesion.points_mm, np.float32)


def _in_lung(scene: Scene, box: Box, margin_mm: float = 0.0) -> Array:
    return coverage(scene.lung[box] + margin_mm, scene.grid.edge_mm)


def _on_side(scene: Scene, box: Box, side: str) -> Array | float:
    """1 on the named side; the scene's template decides where the midline is."""
    if side not in ("left", "right"):
        return 1.0
    x = scene.template_in(box)[2]
    return (x > 0 if side == "left" else x < 0).astype(np.float32)


def _reopen_bronchi(scene: Scene, box: Box, least_mm: float = 0.8) -> None:
    """Airways stay open in airless lung: the air bronchogram."""
    grid = scene.grid.crop(box)
    low = np.array(grid.origin_mm)
    high = low + np.multiply(grid.shape, grid.spacing_mm)
    b = scene.trees.bronchi
    near = np.all((b.stop > low - 15) & (b.start < high + 15), axis=1) & (b.radius > least_mm)
    if near.any():
        part = np.ascontiguousarray(scene.hu[box])
        trees.paint_tree(part, grid, b.subset(near), -950.0)
        scene.hu[box] = part


# --- lungs ------------------------------------------------------


def _nodule(scene: Scene, lesion: Lesion) -> None:
    rng = lesion.rng()
    radius = lesion.size_mm / 2
    stretch = np.exp(rng.normal(0, 0.08, 3))
    radii = (radius * stretch / np.cbrt(np.prod(stretch))).astype(np.float32)
    rough = {"spiculated": 0.22, "ground-glass": 0.15}.get(lesion.kind, 0.06)
    box, d = _blob(scene, lesion, _points(lesion)[0], radii, rough)
    if box is None or d is None:
        return
    # Nodules grow into the lung, not into the chest wall.
    d = np.maximum(d, scene.lung[box] - 0.5)
    edge = scene.grid.edge_mm
    part = scene.hu[box]
    match lesion.kind:
        case "ground-glass":
            raise_to(part, coverage(d, edge + 1.0), -590.0)
        case "part-solid":
            raise_to(part, coverage(d, edge + 1.0), -560.0)
            raise_to(part, coverage(d + 0.5 * radius, edge), 25.0)
        case "calcified":
            blend(part, coverage(d, edge), 480.0)
        case _:
            blend(part, coverage(d, edge), 32.0)
    if lesion.kind == "spiculated":
        for _ in range(12):
            far = _points(lesion)[0] + _unit(rng) * radius * np.float32(rng.uniform(1.4, 2.0))
            body.paint_wire(scene.grid, scene.hu, np.stack([_points(lesion)[0], far]), 0.7, -150.0)


def _opacity(scene: Scene, lesion: Lesion) -> None:
    """Ground glass: hazy, vessels still visible, edges fade over a centimetre."""
    rng = lesion.rng()
    density = rng.uniform(-640, -480)
    for centre in _points(lesion):
        radii = lesion.size_mm / 2 * np.array([1, 0.85, 0.85]) * np.exp(rng.normal(0, 0.15, 3))
        box, d = _blob(scene, lesion, centre, radii.astype(np.float32), 0.30)
        if box is None or d is None:
            continue
        share = coverage(d, max(0.35 * lesion.size_mm, scene.grid.edge_mm))
        within = np.stack([centre - 1.8 * radii, centre + 1.8 * radii])
        share = share * (0.85 + 0.15 * scene.field(lesion.name + "/grain", 5.0, box, within))
        raise_to(scene.hu[box], share * _in_lung(scene, box), density)


def _consolidation(scene: Scene, lesion: Lesion) -> None:
    """Airless but not collapsed: soft tissue with air bronchograms, bounded by fissures."""
    rng = lesion.rng()
    for centre in _points(lesion):
        radii = lesion.size_mm / 2 * np.exp(rng.normal(0, 0.15, 3))
        box, d = _blob(scene, lesion, centre, radii.astype(np.float32), 0.22)
        if box is None or d is None:
            continue
        own = anatomy.lobe_index(*_as_template(scene, centre))
        same = anatomy.lobe_index(*scene.template_in(box)) == own
        lung = _in_lung(scene, box) * same
        halo = coverage(d - 5.0, 10.0)
        raise_to(scene.hu[box], halo * lung, -560.0)
        raise_to(scene.hu[box], coverage(d, max(4.0, scene.grid.edge_mm)) * lung, 38.0)
        _reopen_bronchi(scene, box)


def _as_template(scene: Scene, point: Array) -> tuple[Array, Array, Array]:
    z, y, x = (np.asarray(v, np.float32) for v in point)
    return scene.patient.point_to_template(z, y, x)


def _atelectasis(scene: Scene, lesion: Lesion) -> None:
    """Bands (plates of collapsed lung) or a dependent crescent of compressed lung."""
    if lesion.kind == "dependent":
        box = scene.lung_box
        if box is None:
            return
        thick = _dependent(scene, box, lesion.size_mm * 1.3)
        wavy = thick * (1.0 + 0.25 * scene.field(lesion.name, 18.0, box))
        depth = -scene.lung[box]
        d = np.where(wavy > 1.0, depth - wavy, 50.0).astype(np.float32)
        share = coverage(d, max(3.0, scene.grid.edge_mm)) * _in_lung(scene, box)
        raise_to(scene.hu[box], share * _on_side(scene, box, lesion.side), 28.0)
        return
    rng = lesion.rng()
    for centre in _points(lesion):
        # Near horizontal, rising or falling towards the pleura.
        normal = np.array([1.0, rng.normal(0, 0.35), rng.normal(0, 0.35)], np.float32)
        normal /= np.linalg.norm(normal)
        width_mm = rng.uniform(2.5, 6.0) + 3.0 * lesion.severity
        part, plate = _plate(scene, centre, normal, lesion.size_mm / 2, width_mm)
        if part is not None and plate is not None:
            share = min(1.0, width_mm / scene.grid.edge_mm) * coverage(plate, scene.grid.edge_mm)
            raise_to(scene.hu[part], share * _in_lung(scene, part), 20.0)


def _dependent(scene: Scene, box: Box, thickness_mm: float) -> Array:
    """Thickness of whatever gravity collects in the back and base of a supine chest."""
    z, y, _ = scene.template_in(box)
    # Small amounts lie in the posterior recess; large ones climb to the apex and the flank.
    top = np.float32(-75.0 + 2.6 * thickness_mm)
    front = np.float32(60.0 - 0.9 * thickness_mm)
    low = np.clip((top - z) / 60.0, 0.0, 1.0)
    back = np.clip((y - front) / 45.0, 0.0, 1.0)
    return (np.float32(thickness_mm) * low * back).astype(np.float32)


def _effusion(scene: Scene, lesion: Lesion) -> None:
    """Free pleural fluid: a meniscus in the dependent pleural space, displacing the lung."""
    box = scene.lung_box
    if box is None:
        return
    thick = _dependent(scene, box, lesion.size_mm)
    if lesion.kind == "loculated":
        thick = thick * (0.8 + 0.5 * scene.field(lesion.name, 35.0, box))
    d = np.where(thick > 0.8, -scene.lung[box] - thick, 50.0).astype(np.float32)
    share = coverage(d, scene.grid.edge_mm) * _in_lung(scene, box, margin_mm=-0.5)
    blend(scene.hu[box], share * _on_side(scene, box, lesion.side), FLUID_HU)


def _emphysema(scene: Scene, lesion: Lesion) -> None:
    """Air where lung was: centrilobular holes, subpleural bullae, or a panlobular fading."""
    box = scene.lung_box
    if box is None:
        return
    z, _, _ = scene.template_in(box)
    hu, lung = scene.hu[box], scene.lung[box]
    upper = np.clip((z + 60.0) / 90.0, 0.0, 1.0)
    if lesion.kind in ("centrilobular", "panlobular"):
        reach = (0.25 + 0.75 * upper) if lesion.kind == "centrilobular" else 0.9 + 0.0 * z
        holes = scene.field(lesion.name, lesion.size_mm * 0.9, box)
        clusters = scene.field(lesion.name + "/clusters", 40.0, box)
        level = 1.75 - 1.9 * lesion.severity * reach - 0.35 * clusters
        share = np.clip((holes - level) * 2.2, 0.0, 1.0) * coverage(lung + 3.0, 3.0)
        share = share * (hu < -700.0)
        blend(hu, share, -972.0)
    rng = lesion.rng()
    for centre in _points(lesion):
        radius = np.float32(rng.uniform(0.5, 1.1) * (6.0 + 9.0 * lesion.severity))
        radii = np.array([radius * 1.2, radius, radius], np.float32)
        part, d = _blob(scene, lesion, centre, radii, 0.0)
        if part is None or d is None:
            continue
        inside = _in_lung(scene, part, margin_mm=0.8)
        edge = scene.grid.edge_mm
        wall = coverage(np.abs(d) - 0.5, edge) * min(1.0, 1.0 / edge)
        blend(scene.hu[part], coverage(d, edge) * inside, -985.0)
        raise_to(scene.hu[part], wall * inside, -450.0)


def _mosaic(scene: Scene, lesion: Lesion) -> None:
    """Lobules of darker and brighter lung side by side, with sharp borders."""
    box = scene.lung_box
    if box is None:
        return
    patches = scene.field(lesion.name, lesion.size_mm, box)
    fine = scene.field(lesion.name + "/fine", lesion.size_mm * 0.45, box)
    sign = np.clip((patches + 0.35 * fine) * 7.0, -1.0, 1.0)
    contrast = np.float32(40.0 + 50.0 * lesion.severity)
    lung = coverage(scene.lung[box] + 2.0, 3.0) * (scene.hu[box] < -550.0)
    scene.hu[box] += contrast * sign * lung


def _septal(scene: Scene, lesion: Lesion) -> None:
    """Thickened walls of secondary lobules: polygons of 10-20 mm below the pleura, mostly basal."""
    box = scene.lung_box
    if box is None:
        return
    depth = -scene.lung[box]
    z, _, _ = scene.template_in(box)
    reach = 8.0 + 14.0 * lesion.severity
    basal = np.clip(0.25 - (z + 20.0) / 110.0 + 0.35 * lesion.severity, 0.0, 1.0)
    where = np.flatnonzero((depth > 0.5) & (depth < reach) & (basal > 0.05))
    if not len(where):
        return
    grid = scene.grid.crop(box)
    index = np.unravel_index(where, grid.shape)
    points = np.stack(
        [grid.axes[a].ravel()[index[a]] - scene.extent.origin_mm[a] for a in range(3)], axis=1
    )
    gap = voronoi_gap(points, 13.0, lesion.seed)
    edge = scene.grid.edge_mm
    thick = lesion.size_mm
    half = max(thick, edge) / 2
    share = coverage(gap - np.float32(half), edge) * min(1.0, thick / edge)
    flat = scene.hu[box].ravel()
    fade = np.clip((reach - depth.ravel()[where]) / 8.0, 0.0, 1.0)
    fade = fade * np.broadcast_to(basal, grid.shape).ravel()[where]
    # Oedema is patchy.
    patches = scene.field(lesion.name, 45.0, box).ravel()[where]
    fade = fade * np.clip(0.6 + 0.6 * patches, 0.0, 1.0)
    side = _on_side(scene, box, lesion.side)
    if not isinstance(side, float):
        fade = fade * side.ravel()[where]
    value = flat[where]
    raise_to(value, (share * fade).astype(np.float32), -300.0)
    # Interstitial oedema hazes the lobules a little as well.
    raise_to(value, (0.12 * lesion.severity * fade).astype(np.float32), -620.0)
    flat[where] = value
    scene.hu[box] = flat.reshape(grid.shape)


def voronoi_gap(points: Array, cell_mm: float, seed: int) -> Array:
    """Distance of points ``(N, 3)`` to the nearest wall between random cells of ``cell_mm``.

    Seeds lie one to a lattice cube, so only the 27 cubes around a point can hold its two nearest.
    """
    scaled = points / cell_mm
    base = np.floor(scaled).astype(np.int64)
    low = base.min(axis=0) - 1
    size = base.max(axis=0) + 3 - low
    # Hashing keeps a cube's seed the same whatever slab asks for it.
    cube = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1) + low
    mixed = (cube[..., 0] * 73856093) ^ (cube[..., 1] * 19349663) ^ (cube[..., 2] * 83492791)
    mixed = (mixed + seed * 2654435761) & 0xFFFFFFFF
    jitter = []
    for turn in range(3):
        mixed = (mixed * 1103515245 + 12345 + turn) & 0x7FFFFFFF
        jitter.append((mixed >> 8) % 1000 / 1000.0)
    seeds = (cube + 0.1 + 0.8 * np.stack(jitter, axis=-1)).astype(np.float32)
    first = np.full(len(points), 9.0, np.float32)
    second = np.full(len(points), 9.0, np.float32)
    at = base - low
    for dz, dy, dx in itertools.product((-1, 0, 1), repeat=3):
        delta = seeds[at[:, 0] + dz, at[:, 1] + dy, at[:, 2] + dx] - scaled
        distance = np.sqrt(np.einsum("nk,nk->n", delta, delta))
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    return ((second - first) * (cell_mm / 2)).astype(np.float32)


def _fibrotic(scene: Scene, lesion: Lesion) -> None:
    """Scars: irregular bands that reach the pleura, an apical cap, or reticulation."""
    rng = lesion.rng()
    for centre in _points(lesion):
        box = _around(scene, centre, 34.0)
        if lesion.kind == "apical cap" and box is not None:
            near = ellipsoid(_offsets(scene, box, centre), (26.0, 32.0, 32.0))
            within = np.stack([centre - 34.0, centre + 34.0])
            bumps = scene.field(lesion.name, 7.0, box, within)
            cap = -scene.lung[box] - 2.0 - 0.25 * lesion.size_mm * (1.0 + 0.5 * bumps)
            cap = np.maximum(cap, near)
            share = coverage(cap, scene.grid.edge_mm) * _in_lung(scene, box)
            raise_to(scene.hu[box], share, -40.0)
        for _ in range(2 + round(3 * lesion.severity)):
            normal = _unit(rng)
            shift = rng.normal(0, 5, 3).astype(np.float32)
            radius = lesion.size_mm * rng.uniform(0.6, 1.1)
            thick = rng.uniform(1.2, 3.2)
            part, d = _plate(scene, centre + shift, normal, float(radius), float(thick))
            if part is None or d is None:
                continue
            within = np.stack([centre - 70.0, centre + 70.0])
            d = d + 0.8 * scene.field(lesion.name + "/rough", 5.0, part, within)
            share = min(1.0, thick / scene.grid.edge_mm) * coverage(d, scene.grid.edge_mm)
            raise_to(scene.hu[part], share * _in_lung(scene, part), -30.0)


def _some_bronchi(scene: Scene, lesion: Lesion, low: float, high: float) -> trees.Tree:
    lobes = [anatomy.ALL_LOBES.index(lobe) for lobe in lesion.lobe.split("+")]
    bronchi = scene.trees.bronchi
    calibre = (bronchi.radius > low) & (bronchi.radius < high)
    return bronchi.subset(np.isin(bronchi.lobe, lobes) & calibre)


def _peribronchial(scene: Scene, lesion: Lesion) -> None:
    """Bronchial walls twice to three times as thick, from the hilum outwards."""
    bronchi = _some_bronchi(scene, lesion, 0.8, 4.5)
    body.paint_bronchi(scene.grid, scene.hu, bronchi, lesion.size_mm)


def _bronchiectasis(scene: Scene, lesion: Lesion) -> None:
    """Bronchi wider than their artery (signet ring), not tapering, visible near the pleura."""
    bronchi = _some_bronchi(scene, lesion, 0.8, 1.9)
    factor = 1.5 + 0.8 * lesion.severity
    wide = np.maximum(bronchi.radius * factor, lesion.size_mm / 2 * 0.6).astype(np.float32)
    if lesion.kind == "cystic":
        wide = wide * lesion.rng().uniform(0.9, 1.4, len(wide)).astype(np.float32)
    dilated = trees.Tree(bronchi.start, bronchi.stop, wide, bronchi.lobe)
    body.paint_bronchi(scene.grid, scene.hu, dilated, 0.9)


# --- heart, vessels, mediastinum, devices -----------------------


def _pericardial(scene: Scene, lesion: Lesion) -> None:
    """Fluid around the heart, thickest behind and below a supine patient's ventricles."""
    reach = 100.0 * scene.patient.heart + lesion.size_mm
    box = _around(scene, scene.patient.to_world(anatomy.HEART_CENTRE), reach)
    if box is None:
        return
    z, y, _ = scene.template_in(box)
    gravity = np.clip(0.45 + (y - anatomy.HEART_CENTRE[1]) / 70.0, 0.15, 1.0)
    # The sac ends at the great vessels' roots.
    root = np.clip((-18.0 - z) / 22.0, 0.0, 1.0)
    thick = np.float32(lesion.size_mm) * gravity * root
    sac = scene.sac[box]
    fluid = np.maximum(sac - thick, -sac - 2.5)
    fluid = np.maximum(fluid, 1.0 - scene.dome[box])
    keep = (thick > 1.0) & (scene.hu[box] < 300.0)
    blend(scene.hu[box], coverage(fluid, scene.grid.edge_mm) * keep, FLUID_HU)


def _arterial_calcification(scene: Scene, lesion: Lesion) -> None:
    """Plaques in the wall of the aorta and the arch's branches."""
    points, radii = anatomy.centrelines(scene.patient)["aorta"]
    _plaques(scene, lesion, points, radii, count=round(3 + 22 * lesion.severity), first=0.12)


def _coronary_calcification(scene: Scene, lesion: Lesion) -> None:
    """Bright short segments along the coronary arteries, the descending branch first."""
    rng = lesion.rng()
    vessels = anatomy.coronaries(scene.patient)
    for vessel in lesion.lobe.split("+"):
        world = scene.patient.to_world(vessels[vessel])
        for _ in range(1 + round(4 * lesion.severity)):
            at = rng.uniform(0.05, 0.75) * (len(world) - 1)
            length = rng.uniform(0.25, 0.6 + 1.0 * lesion.severity)
            t = np.linspace(at, min(at + length, len(world) - 1.01), 4)
            line = np.stack([np.interp(t, np.arange(len(world)), world[:, k]) for k in range(3)], 1)
            radius = rng.uniform(0.9, 1.3) * (lesion.size_mm / 3.0)
            body.paint_wire(
                scene.grid, scene.hu, line.astype(np.float32), radius, rng.uniform(500, 1300)
            )


def _plaques(
    scene: Scene, lesion: Lesion, points: Array, radii: Array, count: int, first: float
) -> None:
    rng = lesion.rng()
    world = scene.patient.to_world(points)
    radii = radii * scene.patient.mean_scale
    last = len(world) - 1
    for _ in range(count):
        # Denser on the arch and the descending aorta than on the ascending.
        t = min(last - 0.01, last * (first + (1 - first) * rng.beta(1.6, 1.6)))
        i = int(t)
        f = np.float32(t - i)
        axis = world[i + 1] - world[i]
        axis /= np.linalg.norm(axis)
        out = np.cross(axis, _unit(rng))
        out /= np.linalg.norm(out) + 1e-6
        radius = float(radii[i] * (1 - f) + radii[i + 1] * f)
        centre = world[i] * (1 - f) + world[i + 1] * f + out * np.float32(radius - 0.6)
        half = rng.uniform(1.0, 3.0) * (0.6 + lesion.severity)
        tangent = np.cross(axis, out) * np.float32(rng.normal(0, 0.7)) + axis
        tangent /= np.linalg.norm(tangent)
        line = np.stack([centre - tangent * np.float32(half), centre + tangent * np.float32(half)])
        body.paint_wire(scene.grid, scene.hu, line, rng.uniform(0.8, 1.6), rng.uniform(500, 1100))


def _hiatal_hernia(scene: Scene, lesion: Lesion) -> None:
    """Stomach above the diaphragm: a pouch behind the heart with fluid and an air level."""
    centre = _points(lesion)[0]
    r = lesion.size_mm / 2
    radii = np.array([0.95 * r, 0.9 * r, r], np.float32)
    box, d = _blob(scene, lesion, centre, radii, 0.06)
    if box is None or d is None:
        return
    edge = scene.grid.edge_mm
    # It slides in front of the spine and the aorta, and displaces lung and heart.
    z, y, _ = scene.template_in(box)
    d = np.maximum(d, y - anatomy.spine_y(scene.patient, z) + 19.0)
    part = scene.hu[box]
    blend(part, coverage(d - 2.0, edge), -95.0)
    blend(part, coverage(d, edge), 40.0)
    filling = 15.0 if lesion.kind == "fluid" else -60.0
    blend(part, coverage(d + 4.0, edge), filling)
    level = scene.axes_in(box)[1] - np.float32(centre[1] - 0.25 * r)
    blend(part, coverage(np.maximum(d + 4.0, level), edge), -900.0)


def _lymph_node(scene: Scene, lesion: Lesion) -> None:
    """A bean of soft tissue: the short axis is what reports state."""
    rng = lesion.rng()
    short = lesion.size_mm / 2
    for centre in _points(lesion):
        radii = np.array([short * rng.uniform(1.2, 1.7), short, short * rng.uniform(1.0, 1.2)])
        box, d = _blob(scene, lesion, centre, radii.astype(np.float32), 0.05)
        if box is None or d is None:
            continue
        # Nodes push lung aside but stop at vessels and airways.
        fat = (scene.hu[box] < 10.0) & ((scene.hu[box] > -150.0) | (scene.lung[box] < 1.5))
        blend(scene.hu[box], coverage(d, scene.grid.edge_mm) * fat, 42.0)


def _medical_material(scene: Scene, lesion: Lesion) -> None:
    grid, hu, w = scene.grid, scene.hu, scene.patient.to_world
    lines = anatomy.centrelines(scene.patient)
    match lesion.kind:
        case "sternal wires":
            for z in (30.0, 8.0, -14.0, -36.0, -58.0):
                _, depth, centre = anatomy.cage_radii(scene.patient, np.float32(z))
                angle = np.linspace(0, 2 * np.pi, 13)
                y = float(centre - depth - 5.5) + 8.0 * np.cos(angle)
                ring = np.stack([z + 0 * angle, y, 13.0 * np.sin(angle)], axis=1)
                body.paint_wire(grid, hu, w(ring), 0.7, METAL_HU)
        case "pacemaker":
            pocket = _points(lesion)[0]
            box, d = _blob(scene, lesion, pocket, np.array([24.0, 5.5, 21.0], np.float32), 0.0)
            if box is not None and d is not None:
                blend(hu[box], coverage(d, grid.edge_mm), METAL_HU)
            vein = w(lines["left brachiocephalic vein"][0][::-1])
            cava = w(lines["superior vena cava"][0][::-1])
            tip = w(anatomy.heart_point(scene.patient, 0.75, -1.2, 14.0))
            body.paint_wire(grid, hu, np.stack([pocket, *vein, *cava, tip]), 1.1, 2200.0)
        case "port catheter" | "central venous catheter":
            cava = w(lines["superior vena cava"][0][::-1])
            start = _points(lesion)[0]
            vein = w(lines["right brachiocephalic vein"][0][::-1])
            body.paint_wire(grid, hu, np.stack([start, *vein, *cava]), 1.2, 1300.0)
            if lesion.kind == "port catheter":
                box, d = _blob(scene, lesion, start, np.array([13.0, 7.0, 13.0], np.float32), 0.0)
                if box is not None and d is not None:
                    blend(hu[box], coverage(d, grid.edge_mm), 1800.0)
        case "prosthetic valve":
            root = w(lines["aorta"][0][:2])
            axis = (root[1] - root[0]) / np.linalg.norm(root[1] - root[0])
            one = np.cross(axis, [0.0, 0.0, 1.0])
            one /= np.linalg.norm(one)
            two = np.cross(axis, one)
            angle = np.linspace(0, 2 * np.pi, 17)[:, None]
            ring = root[0] + 12.0 * (np.cos(angle) * one + np.sin(angle) * two)
            body.paint_wire(grid, hu, ring.astype(np.float32), 1.4, METAL_HU)
        case "coronary stent":
            line = w(anatomy.coronaries(scene.patient)["left anterior descending"][1:5])
            body.paint_wire(grid, hu, line, 1.5, 1500.0)
        case "nasogastric tube":
            body.paint_wire(grid, hu, w(lines["oesophagus"][0]), 2.2, 900.0)
        case "tracheostomy tube":
            tube = w(np.array([[140.0, 0, 0], [60, 8, -1], [35, 11, -1]]))
            body.paint_wire(grid, hu, tube, 5.5, 350.0)
            body.paint_tube(grid, hu, tube, np.full(3, 3.8), -1000.0)
        case "chest tube":
            body.paint_tube(grid, hu, _points(lesion), np.full(len(lesion.points_mm), 4.0), 900.0)
            body.paint_tube(grid, hu, _points(lesion), np.full(len(lesion.points_mm), 2.6), -950.0)
        case _:
            raise ValueError(f"Medical material has no kind {lesion.kind!r}")


def _cardiomegaly(scene: Scene, lesion: Lesion) -> None:
    """Drawn as anatomy in phantoms; a real scan's heart is stretched from inside.

    Space around the heart's centre is magnified up to the pericardium and compressed beyond it.
    """
    if lesion.kind != "planted":
        return
    from scipy.ndimage import map_coordinates

    centre = scene.patient.to_world(anatomy.HEART_CENTRE)
    reach = np.float32(115.0 * scene.patient.mean_scale)
    box = _around(scene, centre, reach)
    if box is None:
        return
    z, y, x = _offsets(scene, box, centre)
    t = np.clip(np.sqrt(z * z + y * y + x * x) / reach, 0.0, 1.0)
    shrink = 1.0 + (1.0 / (1.0 + lesion.severity) - 1.0) * (1.0 - t * t) ** 2
    index = [
        ((offset * shrink + centre[a] - scene.grid.origin_mm[a]) / scene.grid.spacing_mm[a])
        for a, offset in enumerate((z, y, x))
    ]
    scene.hu[box] = map_coordinates(scene.hu, index, order=1, mode="nearest")


_PAINTERS = {
    "Medical material": _medical_material,
    "Arterial wall calcification": _arterial_calcification,
    "Cardiomegaly": _cardiomegaly,
    "Pericardial effusion": _pericardial,
    "Coronary artery wall calcification": _coronary_calcification,
    "Hiatal hernia": _hiatal_hernia,
    "Lymphadenopathy": _lymph_node,
    "Emphysema": _emphysema,
    "Atelectasis": _atelectasis,
    "Lung nodule": _nodule,
    "Lung opacity": _opacity,
    "Pulmonary fibrotic sequela": _fibrotic,
    "Pleural effusion": _effusion,
    "Mosaic attenuation pattern": _mosaic,
    "Peribronchial thickening": _peribronchial,
    "Consolidation": _consolidation,
    "Bronchiectasis": _bronchiectasis,
    "Interlobular septal thickening": _septal,
}
