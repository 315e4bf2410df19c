"""Paint a healthy chest: table, skin, fat, muscle, bones, abdomen, lungs, mediastinum, heart.

Painted from the outside inwards, each structure over the last. Grey values are those measured on
real scans: muscle and organs 40-60 HU, fat about -100, lung about -860, cortical bone 500-1000.
"""

import itertools

import numpy as np

from ctclip.phantom import anatomy, trees
from ctclip.phantom.anatomy import Patient
from ctclip.phantom.grid import (
    Array,
    Grid,
    blend,
    capsule_box,
    coverage,
    ellipsoid,
    raise_to,
    smooth_min,
)
from ctclip.phantom.scene import Scene

AIR_HU, FAT_HU, MUSCLE_HU, SKIN_HU, FLUID_HU = -1000.0, -102.0, 52.0, 20.0, 12.0
CARTILAGE_HU, DISC_HU = 110.0, 85.0
VERTEBRA_MM = 24.5
"""Height of one vertebra with its disc: ribs follow the same rhythm."""


def skin(patient: Patient, z: Array, y: Array, x: Array) -> tuple[Array, Array]:
    """Signed distances to the skin and to the outer surface of the muscles (template mm)."""
    heights = [-260.0, -130.0, -60.0, 0.0, 45.0, 85.0, 125.0, 160.0]
    width = np.interp(z, heights, [146, 154, 156, 158, 164, 176, 160, 120])
    depth = np.interp(z, heights, [100, 106, 109, 107, 99, 87, 76, 70])
    centre = np.interp(z, heights, [2, 3, 3, 3, 7, 14, 20, 24]).astype(np.float32)
    width = (width * patient.muscle / np.sqrt(patient.barrel)).astype(np.float32)
    depth = (depth * patient.muscle * patient.barrel).astype(np.float32)
    depth = np.broadcast_to(depth, z.shape)
    y = y - centre
    u, v = np.abs(x) / width, np.abs(y) / depth
    level = (u * u * np.sqrt(u) + v * v * np.sqrt(v)) ** np.float32(0.4)
    radius = np.sqrt(x * x + y * y)
    muscle = radius * (1.0 - 1.0 / np.maximum(level, 1e-3))
    # Fat is thick at the flank and belly, thin over the spine and the sternum.
    fat = patient.fat_mm * (0.75 + 0.35 * np.clip((-z - 20.0) / 120.0, -0.5, 1.0))
    outer = muscle - fat * (0.65 + 0.35 * u / np.maximum(level, 0.2)) - 2.0
    if patient.breast_mm > 1.0:
        # The breasts lie in front of this row and these slices only.
        rows = slice(0, int(np.max(np.flatnonzero((y < -20.0).any(axis=(0, 2))), initial=0)) + 1)
        near = np.flatnonzero(np.abs(z.ravel() + 52.0) < 110.0)
        if len(near):
            box = (slice(int(near[0]), int(near[-1]) + 1), rows)
            zb, yb, xb, chest = z[box[0]], y[box], x[box], outer[box]
            back = yb + depth[box[0]] * np.float32(0.80)
            r = patient.breast_mm
            for side in (-1.0, 1.0):
                breast = ellipsoid((zb + 52.0, back, xb - side * 72.0), (62.0, 18.0 + r, 58.0))
                chest = smooth_min(chest, breast, 20.0)
            outer[box] = chest
    return outer.astype(np.float32), muscle


NODE_SITES: dict[str, tuple[float, float, float]] = {
    "right paratracheal": (16.0, 4.0, -19.0),
    "left paratracheal": (14.0, 4.0, 15.0),
    "aortopulmonary window": (4.0, -4.0, 29.0),
    "prevascular": (12.0, -52.0, 4.0),
    "subcarinal": (-18.0, 20.0, 4.0),
    "right hilar": (-20.0, 10.0, -44.0),
    "left hilar": (-18.0, 16.0, 46.0),
    "right axillary": (38.0, -2.0, -141.0),
    "left axillary": (38.0, -2.0, 141.0),
}
"""Lymph node stations, template (z, y, x)."""


def paint_body(scene: Scene) -> None:
    """Paint everything that a healthy chest shows."""
    _paint_table(scene)
    _paint_wall(scene)
    _paint_inside(scene)
    _paint_small_nodes(scene)
    paint_trees(scene)


def _paint_table(scene: Scene) -> None:
    """The room's air and the table: a curved shell around foam, fixed to the scanner."""
    patient, grid, hu = scene.patient, scene.grid, scene.hu
    _, y, x = grid.axes
    _, back, _ = patient.to_world(
        np.array([-60.0, 112.0 * patient.muscle + 0.75 * patient.fat_mm, 0.0])
    )
    sag = np.float32(back) + 5.0 - 0.00095 * x * x
    upper, lower = sag - y, y - (sag + 26.0 - 0.0004 * x * x)
    inside = np.maximum(np.maximum(upper, lower), np.abs(x) - 215.0)
    blend(hu, coverage(inside, grid.edge_mm), -960.0)
    shell = np.maximum(np.abs(np.maximum(upper, lower)) - 1.2, np.abs(x) - 215.0)
    blend(hu, coverage(shell, grid.edge_mm), -420.0)


def _paint_wall(scene: Scene) -> None:
    """Skin, fat, muscles with the fat between them, ribs, sternum, spine, shoulder girdle."""
    patient, hu, cage = scene.patient, scene.hu, scene.cage
    edge = scene.grid.edge_mm / patient.mean_scale
    z, y, x = scene.template
    outer, muscle = skin(patient, z, y, x)
    blend(hu, coverage(outer, edge), SKIN_HU)
    blend(hu, coverage(outer + 2.2, edge), FAT_HU)
    if patient.breast_mm > 1.0:
        rows = int(np.max(np.flatnonzero((y < -75.0).any(axis=(0, 2))), initial=0)) + 1
        box = (slice(0, len(z)), slice(0, rows), slice(0, x.shape[2]))
        share = np.clip(scene.field("gland", 9.0, box) - 0.2, 0.0, 0.8)
        share *= coverage(np.abs(z + 55.0) - 45.0, 20.0) * coverage(y[box] + 88.0, 10.0)
        blend(hu[box], share * coverage(outer[box] + 12.0, 8.0), 30.0)
    blend(hu, coverage(muscle, edge), MUSCLE_HU)
    # Fat planes between intercostals, serratus and the superficial muscles; fat in the axilla.
    wavy = scene.field("plane", 26.0)
    plane = np.abs(cage - 15.0 - 2.5 * wavy) - 1.0
    second = np.maximum(np.abs(cage - 27.0 + 3.5 * wavy) - 1.2, -z - 60.0)
    plane = np.maximum(np.minimum(plane, second), muscle + 2.0)
    blend(hu, 0.85 * coverage(plane, edge), FAT_HU)
    level = np.flatnonzero(np.abs(z.ravel() - 38.0) < 62.0)
    if len(level):
        part = slice(int(level[0]), int(level[-1]) + 1)
        place = (z[part] - 38.0, y[part] + 2.0, np.abs(x[part]) - 141.0)
        axilla = ellipsoid(place, (46.0, 26.0, 17.0)) + 4.0 * wavy[part]
        axilla = np.maximum(np.maximum(axilla, 11.0 - cage[part]), muscle[part] + 4.0)
        blend(hu[part], coverage(axilla, 3.0), FAT_HU)
    _paint_ribs(patient, hu, cage, edge, z, y, x)
    _paint_spine(patient, hu, edge, z, y, x)
    _paint_girdle(patient, scene.grid, hu)


def _paint_ribs(
    patient: Patient, hu: Array, cage: Array, edge: float, z: Array, y: Array, x: Array
) -> None:
    """Twelve pairs of ribs as one periodic function on the shell outside the pleura."""
    near = np.flatnonzero((cage > -1.0 - edge) & (cage < 11.0 + edge))
    if not len(near):
        return
    shell = cage.ravel()[near] - 5.2
    zs = np.broadcast_to(z, cage.shape).ravel()[near]
    ys, xs = y.ravel()[near], x.ravel()[near]
    centre = 27.0 * np.clip((zs + 80.0) / 182.0, 0.0, 1.0) ** 2
    angle = np.arctan2(np.abs(xs), ys - centre)  # 0 at the spine, pi at the sternum
    fall = 46.0 * (1.0 - np.cos(angle))
    phase = (76.0 - zs - fall) / VERTEBRA_MM
    number = np.clip(np.round(phase), 0, 11)
    across = (phase - number) * VERTEBRA_MM
    # Ribs 1-7 reach the sternum through cartilage; 11 and 12 float.
    ribs = [0, 6, 9, 10, 11]
    ends = np.interp(number, ribs, [3.2, 3.2, 2.5, 1.75, 1.2]).astype(np.float32)
    bony = np.interp(number, ribs, [2.35, 2.2, 2.1, 1.7, 1.15]).astype(np.float32)
    outline = (np.hypot(shell / 4.0, across / 6.6) - 1.0) * 4.2
    outline = np.maximum(outline, (angle - ends) * 90.0)
    bone = np.clip((bony - angle) * 12.0 + 0.5, 0.0, 1.0)
    flat = hu.reshape(-1)
    value = flat[near]
    blend(value, coverage(outline, edge), bone * patient.cortex_hu + (1 - bone) * CARTILAGE_HU)
    marrow = coverage(outline + 1.6, edge) * bone
    blend(value, marrow, patient.marrow_hu * 0.8)
    flat[near] = value


def _paint_spine(patient: Patient, hu: Array, edge: float, z: Array, y: Array, x: Array) -> None:
    """Vertebral bodies and discs, the canal with the cord, arches and processes."""
    columns = np.flatnonzero((np.abs(x) < 46.0).any(axis=(0, 1)))
    if not len(columns):
        return
    part = (slice(None), slice(None), slice(columns[0], columns[-1] + 1))
    target, y, x = hu[part], y[part], x[part]
    behind = y - anatomy.spine_y(patient, z)
    level = (z - 76.0) / VERTEBRA_MM
    within = (level - np.round(level)) * VERTEBRA_MM  # 0 at the middle of a vertebra
    radius = 16.5 - z / 60.0
    body = np.sqrt((x / 1.12) ** 2 + behind**2) - radius + 1.6 * (1 - (within / 9.0) ** 2)
    blend(target, coverage(body, edge), DISC_HU)
    bone = np.maximum(body, np.abs(within) - 9.8)
    blend(target, coverage(bone, edge), 420.0)
    blend(target, coverage(bone + 2.0, edge), patient.marrow_hu)
    # The arch: a ring around the canal, with transverse and spinous processes once a vertebra.
    canal = np.sqrt(x * x + (behind - 25.0) ** 2)
    arch = np.maximum(np.abs(canal - 11.5) - 3.0, np.abs(within + 1.0) - 8.5)
    spinous = np.maximum(np.abs(x) - 3.0, np.abs(behind - 44.0 + 0.4 * within) - 10.0)
    spinous = np.maximum(spinous, np.abs(within + 4.0) - 6.5)
    transverse = np.maximum(np.abs(behind - 24.0 - 0.28 * np.abs(x)) - 4.2, np.abs(x) - 36.0)
    transverse = np.maximum(np.maximum(transverse, 10.0 - np.abs(x)), np.abs(within - 3.0) - 5.0)
    posterior = smooth_min(np.minimum(arch, spinous), transverse, 3.0)
    blend(target, coverage(posterior, edge), 480.0)
    blend(target, coverage(posterior + 2.0, edge), patient.marrow_hu)
    blend(target, coverage(canal - 8.5, edge), 5.0)
    blend(target, coverage(canal - 5.0, edge), 38.0)


def _bone_capsule(
    patient: Patient,
    grid: Grid,
    hu: Array,
    start: Array,
    stop: Array,
    radius: float,
    core_hu: float,
) -> None:
    box, d = capsule_box(grid, start, stop, radius + grid.edge_mm)
    if box is not None and d is not None:
        blend(hu[box], coverage(d - np.float32(radius), grid.edge_mm), patient.cortex_hu)
        blend(hu[box], coverage(d - np.float32(radius - 1.8), grid.edge_mm), core_hu)


def _paint_girdle(patient: Patient, grid: Grid, hu: Array) -> None:
    """Sternum, clavicles, scapulae (blade, spine) and humeral heads."""
    w = patient.to_world
    marrow = patient.marrow_hu * 0.7
    box = grid.box(w(np.array([-125.0, -130, -40])), w(np.array([70.0, -40, 40])))
    if box is not None:
        z, y, x = (axis[tuple(s)] for axis, s in zip(grid.axes, _broadcast(box), strict=True))
        z, y, x = patient.point_to_template(z, y, x)
        _, depth, centre = anatomy.cage_radii(patient, z)
        front = y - (centre - depth - 5.5)
        half = np.interp(z, [-110, -95, -60, 10, 22, 48], [4, 9, 17, 12, 22, 26])
        across = np.abs(x) / half.astype(np.float32)
        plate = np.maximum(np.abs(front) - 5.5 * np.sqrt(np.maximum(1.05 - across**4, 0.0)), -5.5)
        plate = np.maximum(plate, (across - 1.0) * 12.0)
        plate = np.maximum(plate, np.abs(z + 30.0) - 78.0)
        blend(hu[box], coverage(plate, grid.edge_mm), patient.cortex_hu * 0.7)
        blend(hu[box], coverage(plate + 1.8, grid.edge_mm), marrow)
    for side in (-1.0, 1.0):
        inner, outer = np.array([54.0, -52, 20 * side]), np.array([92.0, -12, 150 * side])
        middle = np.array([72.0, -50, 80 * side])
        _bone_capsule(patient, grid, hu, w(inner), w(middle), 6.0, marrow)
        _bone_capsule(patient, grid, hu, w(middle), w(outer), 5.5, marrow)
        head = np.array([96.0, 8, 163 * side])
        _bone_capsule(
            patient, grid, hu, w(head), w(head + np.array([26.0, -8, 16 * side])), 21.0, marrow
        )
        _paint_scapula(patient, grid, hu, side)


def _broadcast(box: tuple[slice, slice, slice]) -> list[tuple[slice, slice, slice]]:
    full = slice(None)
    return [(box[0], full, full), (full, box[1], full), (full, full, box[2])]


def _paint_scapula(patient: Patient, grid: Grid, hu: Array, side: float) -> None:
    """A thin blade on the posterolateral rib cage, its spine and the glenoid."""
    low = patient.to_world(np.array([-50.0, 20, min(50 * side, 175 * side)])) - 8
    high = patient.to_world(np.array([100.0, 125, max(50 * side, 175 * side)])) + 8
    box = grid.box(low, high)
    if box is None:
        return
    z, y, x = (axis[tuple(s)] for axis, s in zip(grid.axes, _broadcast(box), strict=True))
    z, y, x = patient.point_to_template(z, y, x)
    x = x * np.float32(side)
    # Blade: a triangle in the (across, z) plane, tilted 35 degrees off the sagittal.
    across = (x - 118.0) * 0.82 - (y - 68.0) * 0.57
    normal = (x - 118.0) * 0.57 + (y - 68.0) * 0.82 + 0.004 * (across**2)
    inner = -34.0 - 0.0 * z
    outer = np.interp(z, [-45, 20, 75], [-26, 10, 40]).astype(np.float32)
    blade = np.maximum(np.maximum(inner - across, across - outer), np.abs(z - 18.0) - 60.0)
    rim = 1.3 + 2.0 * np.exp(-((across - outer) ** 2) / 30.0)
    blade = np.maximum(blade, np.abs(normal) - rim)
    blend(hu[box], coverage(blade, grid.edge_mm), patient.cortex_hu * 0.85)
    ridge = np.maximum(np.abs(z - 55.0 - 0.25 * across) - 2.5, np.abs(normal - 9.0) - 11.0)
    ridge = np.maximum(ridge, np.abs(across) - 36.0)
    blend(hu[box], coverage(ridge, grid.edge_mm), patient.cortex_hu * 0.7)
    glenoid = np.sqrt((across - 42.0) ** 2 + (normal - 2.0) ** 2 + (z - 72.0) ** 2) - 12.0
    blend(hu[box], coverage(glenoid, grid.edge_mm), 320.0)


def _paint_inside(scene: Scene) -> None:
    """Abdomen, mediastinal fat, heart, lungs with their fissures, great vessels."""
    patient, hu = scene.patient, scene.hu
    edge = scene.grid.edge_mm / patient.mean_scale
    z, y, x = scene.template
    centre = anatomy.spine_y(patient, z)
    spine = np.where(y > centre, np.abs(x) - 26.0, np.sqrt(x * x + (y - centre) ** 2) - 21.0)
    cavity = np.maximum(scene.cage + 0.8, -spine)
    blend(hu, coverage(cavity, edge), FAT_HU)
    _paint_abdomen(scene, cavity, edge)
    _paint_heart(scene)
    air = patient.lung_hu + np.float32(patient.lung_gradient) * (y + 10.0) - 0.12 * (z + 40.0)
    air += 14.0 * scene.field("lung", 14.0)
    # Lung under its own weight: normal, and no radiologist reports it.
    weight = np.clip((y - 15.0) / 55.0, 0.0, 1.0) * np.exp(np.clip(scene.lung, -60.0, 0.0) / 9.0)
    air += np.float32(patient.dependent_hu) * weight.astype(np.float32)
    blend(hu, coverage(scene.lung, scene.grid.edge_mm), air)
    _paint_fissures(scene)
    _paint_tubes(scene)


def _paint_abdomen(scene: Scene, cavity: Array, edge: float) -> None:
    """Diaphragm muscle, liver, spleen and stomach with its bubble, in abdominal fat."""
    patient = scene.patient
    below = np.flatnonzero((scene.dome < 6.0).any(axis=(1, 2)))
    if not len(below):
        return
    part = slice(0, int(below[-1]) + 1)
    hu, cavity, dome = scene.hu[part], cavity[part], scene.dome[part]
    z, y, x = (axis[part] for axis in scene.template)
    blend(hu, coverage(np.maximum(cavity, dome), edge), MUSCLE_HU)
    inside = np.maximum(cavity + 2.0, dome + 4.5)
    blend(hu, coverage(inside, edge), FAT_HU)
    low = patient.breath_mm
    liver = ellipsoid((z + 165.0 + low, y + 8.0, x + 58.0), (75.0, 92.0, 92.0))
    left_lobe = ellipsoid((z + 150.0 + low, y + 40.0, x - 15.0), (42.0, 44.0, 62.0))
    liver = np.maximum(smooth_min(liver, left_lobe, 18.0), inside)
    blend(hu, coverage(liver, edge), patient.liver_hu)
    stomach = ellipsoid((z + 152.0 + low, y + 12.0, x - 72.0), (40.0, 55.0, 42.0))
    stomach = np.maximum(stomach, np.maximum(inside + 0.7, 2.0 - liver))
    blend(hu, coverage(stomach, edge), 40.0)
    blend(hu, coverage(stomach + 4.0, edge), 18.0)
    # Supine: gas collects in front.
    bubble = np.maximum(stomach + 4.5, y + 22.0)
    blend(hu, coverage(bubble, edge), -930.0)
    spleen = ellipsoid((z + 158.0 + low, y - 42.0, x - 98.0), (45.0, 44.0, 26.0))
    spleen = np.maximum(np.maximum(spleen, inside), 2.0 - stomach)
    blend(hu, coverage(spleen, edge), patient.liver_hu * 0.88)


def _paint_heart(scene: Scene) -> None:
    """Pericardium, epicardial fat with the coronaries, myocardium, blood."""
    patient, grid = scene.patient, scene.grid
    reach = 95.0 * patient.heart
    centre = patient.to_world(anatomy.HEART_CENTRE)
    box = grid.box(centre - reach, centre + reach)
    if box is None:
        return
    z, y, x = scene.template_in(box)
    edge = grid.edge_mm / patient.mean_scale
    part = scene.hu[box]
    sac = np.maximum(scene.sac[box], 1.5 - scene.dome[box])
    blend(part, coverage(sac, edge), 30.0)
    blend(part, coverage(sac + 1.6, edge), FAT_HU)
    long, side, _ = anatomy.heart_axes(patient)
    middle = anatomy.HEART_CENTRE - np.array([0.6 * patient.breath_mm, 0, 0], np.float32)
    offset = (z - middle[0], y - middle[1], x - middle[2])
    along = long[0] * offset[0] + long[1] * offset[1] + long[2] * offset[2]
    along /= 62.0 * patient.heart
    # Fat fills the atrioventricular groove, thins over the ventricles, thickens at the apex.
    groove = np.exp(-(((along + 0.42) / 0.12) ** 2))
    lumpy = np.clip(0.6 + 0.7 * scene.field("epicardium", 16.0, box), 0.1, 2.5)
    fat = 6.5 * groove + lumpy * (1.6 + 2.0 * np.clip(along, 0, 1) + 2.0 * (offset[1] < -15.0))
    muscle = sac + 1.6 + fat
    wall_hu = 50.0 + 0.35 * max(0.0, patient.blood_hu - 45.0)
    blend(part, coverage(muscle, edge), wall_hu)
    # Ventricular walls and septum around the blood, visible with contrast medium only.
    across = side[0] * offset[0] + side[1] * offset[1] + side[2] * offset[2]
    septum = 5.0 - np.abs(across + 6.0 - 10.0 * along * along) - 4.0 * np.maximum(-along, 0.0)
    ventricle = np.where(across > -6.0, np.float32(10.0), np.float32(4.0))
    wall = np.where(along > -0.4, np.maximum(muscle + ventricle, septum), muscle + 3.0)
    blend(part, coverage(wall, edge), patient.blood_hu)
    for points in anatomy.coronaries(patient).values():
        paint_wire(grid, scene.hu, patient.to_world(points), 1.7, patient.blood_hu)


def paint_wire(
    grid: Grid,
    hu: Array,
    world: Array,
    radius_mm: float,
    value_hu: float,
    below_hu: float = np.inf,
) -> None:
    """A polyline that may be thinner than a voxel: thickened to be seen, diluted to be right.

    Voxels already at ``below_hu`` or denser are left alone.
    """
    radius = max(radius_mm, grid.edge_mm / 2)
    share = (radius_mm / radius) ** 2
    for start, stop in itertools.pairwise(world):
        box, d = capsule_box(grid, start, stop, radius + grid.edge_mm)
        if box is not None and d is not None:
            paint = share * coverage(d - np.float32(radius), grid.edge_mm)
            blend(hu[box], paint * (hu[box] < below_hu), value_hu)


def _paint_small_nodes(scene: Scene) -> None:
    """Normal lymph nodes of 3-7 mm in mediastinum and axillae: everybody has some."""
    rng = np.random.default_rng([scene.patient.tree_seed, 5])
    count = int(rng.integers(6, 16))
    sites = np.array(list(NODE_SITES.values()))[rng.integers(len(NODE_SITES), size=count)]
    for centre in scene.patient.to_world(sites + rng.normal(0, 5.0, (count, 3))):
        short = float(rng.uniform(1.5, 3.5))
        bean = np.stack([centre, centre + short * rng.normal(0, 1.0, 3).astype(np.float32)])
        paint_wire(scene.grid, scene.hu, bean, short, 38.0, below_hu=10.0)


def _paint_fissures(scene: Scene) -> None:
    """Fissures: 1 mm of pleura between lobes, so faint at coarse voxels as in real scans."""
    box, edge = scene.lung_box, scene.grid.edge_mm
    if box is None:
        return
    z, y, x = scene.template_in(box)
    oblique = anatomy.oblique_fissure(y, z)
    width = np.float32(max(0.5, edge / 2))
    line = coverage(np.abs(oblique) - width, edge)
    minor = np.maximum(np.maximum(np.abs(z + 38.0) - width, -oblique), x)
    line = np.maximum(line, coverage(minor, edge)) * coverage(scene.lung[box] + 1.0, edge)
    raise_to(scene.hu[box], 0.35 * min(1.0, 1.0 / edge) * line, -500.0)


def _paint_tubes(scene: Scene) -> None:
    """Great vessels, oesophagus, trachea and main bronchi with their walls."""
    patient, grid, hu = scene.patient, scene.grid, scene.hu
    for name, (points, radii) in anatomy.centrelines(patient).items():
        world, radii = patient.to_world(points), radii * patient.mean_scale
        if name == "trachea" or "bronchus" in name:
            paint_tube(grid, hu, world, radii + 1.4, 20.0)
            paint_tube(grid, hu, world, radii, AIR_HU)
        elif name == "oesophagus":
            paint_tube(grid, hu, world, radii, 35.0)
            paint_tube(grid, hu, world[:4], radii[:4] * 0.3, -350.0)
        else:
            paint_tube(grid, hu, world, radii, patient.blood_hu)


def paint_tube(grid: Grid, hu: Array, world: Array, radii: Array, value_hu: float) -> None:
    """A tube of varying calibre through world points; one painting, so joints don't add up."""
    low = (world - np.max(radii)).min(axis=0) - grid.edge_mm
    high = (world + np.max(radii)).max(axis=0) + grid.edge_mm
    box = grid.box(low, high)
    if box is None:
        return
    local = grid.crop(box)
    d = np.full(local.shape, anatomy.FAR_MM, np.float32)
    for i in range(len(world) - 1):
        pieces = max(1, round(abs(float(radii[i + 1] - radii[i])) / 0.8))
        for k in range(pieces):
            a, b = k / pieces, (k + 1) / pieces
            start = world[i] * (1 - a) + world[i + 1] * a
            stop = world[i] * (1 - b) + world[i + 1] * b
            radius = float(radii[i] + (radii[i + 1] - radii[i]) * (a + b) / 2)
            part, dist = capsule_box(local, start, stop, radius + grid.edge_mm)
            if part is not None and dist is not None:
                np.minimum(d[part], dist - np.float32(radius), out=d[part])
    blend(hu[box], coverage(d, grid.edge_mm), value_hu)


def paint_trees(scene: Scene) -> None:
    """Pulmonary vessels and bronchi."""
    trees.paint_tree(scene.hu, scene.grid, scene.trees.arteries, scene.patient.blood_hu)
    trees.paint_tree(scene.hu, scene.grid, scene.trees.veins, scene.patient.blood_hu)
    wall_mm = 0.9 * scene.patient.airway_wall
    paint_bronchi(scene.grid, scene.hu, scene.trees.bronchi, wall_mm)


def paint_bronchi(grid: Grid, hu: Array, bronchi: trees.Tree, wall_mm: float) -> None:
    """Airways: all walls, then all lumens, so that branches open into each other.

    ``wall_mm`` holds for a lumen of 3 mm radius; smaller airways have thinner walls.
    """
    wall = wall_mm * np.clip(bronchi.radius / 3.0, 0.45, 1.2)
    outer = trees.Tree(bronchi.start, bronchi.stop, bronchi.radius + wall, bronchi.lobe)
    trees.paint_tree(hu, grid, outer, 0.0)
    trees.paint_tree(hu, grid, bronchi, -990.0)
