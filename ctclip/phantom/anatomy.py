"""Who the patient is and where everything lies: pose, cage, diaphragm, heart, lungs, lobes.

A patient is a handful of numbers. Shapes are written once, in the frame of a template adult
(carina at the origin, mm), and the pose maps the scanner's millimetres into that frame. Distances
are first-order signed distances: exact at the surface, close to it within a few mm.
"""

import dataclasses
import math

import numpy as np

from ctclip.phantom.grid import Array, Grid, capsule_box, ellipsoid, smooth_min

SEXES = ("M", "F")
FAR_MM = np.float32(1e3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patient:
    """One body, before any disease. Lengths in mm, densities in HU."""

    sex: str
    age: int
    scale: tuple[float, float, float]
    """Size against the template (z, y, x)."""

    position_mm: tuple[float, float, float]
    """World position of the carina (z, y, x)."""

    roll_rad: float
    """Rotation about the body's axis."""

    lean: tuple[float, float]
    """Shift of y and x per mm of z: pitch and tilt, and scoliosis' simplest form."""

    breath_mm: float
    """How far the diaphragm lies below the template's: inspiration is positive."""

    barrel: float
    """Roundness of the rib cage against the template's, about 1."""

    fat_mm: float
    """Subcutaneous fat at the flank."""

    muscle: float
    """Girth of the chest wall's muscles against the template's."""

    breast_mm: float
    """Breast tissue in front of the pectoral muscle, 0 for most men."""

    heart: float = 1.0
    """Linear size of the heart; about 1.1 and below is normal, cardiomegaly starts at 1.18."""

    heart_turn_rad: float = 0.0
    """Rotation of the heart's long axis about z: lying or upright hearts."""

    aorta: float = 1.0
    """Calibre of the aorta."""

    kyphosis_mm: float = 0.0
    """How far mid-thoracic vertebrae lie behind the line through the first and the last."""

    lung_hu: float = -865.0
    lung_gradient: float = 0.22
    """How much denser aerated lung becomes per mm towards the table (HU/mm)."""

    dependent_hu: float = 0.0
    """Extra density of the lung at the pleura that lies on the table, fading within 2 cm."""

    airway_wall: float = 1.0
    """Thickness of the bronchial walls against a healthy adult's."""

    vessels: float = 1.0
    """Calibre of the pulmonary vessels."""

    blood_hu: float = 42.0
    """Unenhanced 35-50; with contrast medium up to 250."""

    marrow_hu: float = 180.0
    cortex_hu: float = 650.0
    liver_hu: float = 58.0
    tree_seed: int = 0

    @property
    def mean_scale(self) -> float:
        """Geometric mean of the three scales, for calibres and edges."""
        return float(np.cbrt(np.prod(self.scale)))

    def to_template(self, grid: Grid) -> tuple[Array, Array, Array]:
        """Template coordinates of a grid's voxels: z ``(D,1,1)``, y and x ``(D,H,W)``."""
        z, y, x = grid.axes
        return self.point_to_template(z, y, x)

    def point_to_template(self, z: Array, y: Array, x: Array) -> tuple[Array, Array, Array]:
        """World to template, for arrays that broadcast."""
        cos, sin = np.float32(np.cos(self.roll_rad)), np.float32(np.sin(self.roll_rad))
        z = (z - np.float32(self.position_mm[0])) / np.float32(self.scale[0])
        y = y - np.float32(self.position_mm[1]) - np.float32(self.lean[0]) * z
        x = x - np.float32(self.position_mm[2]) - np.float32(self.lean[1]) * z
        return (
            z,
            (cos * y - sin * x) / np.float32(self.scale[1]),
            (sin * y + cos * x) / np.float32(self.scale[2]),
        )

    def to_world(self, points: Array) -> Array:
        """World position of template points ``(..., 3)``."""
        points = np.asarray(points, np.float32)
        z, y, x = np.moveaxis(points, -1, 0)
        y, x = y * self.scale[1], x * self.scale[2]
        cos, sin = np.cos(self.roll_rad), np.sin(self.roll_rad)
        back = (
            z * self.scale[0] + self.position_mm[0],
            cos * y + sin * x + self.lean[0] * z + self.position_mm[1],
            -sin * y + cos * x + self.lean[1] * z + self.position_mm[2],
        )
        return np.stack(back, axis=-1).astype(np.float32)


def sample_patient(rng: np.random.Generator, age: int, sex: str) -> Patient:
    """Draw a body. Nothing here depends on disease except through age and sex."""
    size = (0.99 if sex == "M" else 0.91) * float(np.exp(rng.normal(0, 0.04)))
    scale = tuple(float(size * np.exp(rng.normal(0, 0.03))) for _ in range(3))
    contrast = rng.random() < 0.15
    return Patient(
        sex=sex,
        age=age,
        scale=(scale[0], scale[1], scale[2]),
        position_mm=(0.0, float(rng.normal(0, 8)), float(rng.normal(0, 7))),
        roll_rad=float(rng.normal(0, 0.045)),
        lean=(float(rng.normal(0, 0.035)), float(rng.normal(0, 0.02))),
        breath_mm=float(np.clip(rng.normal(0, 13), -32, 28)),
        barrel=float(np.clip(rng.normal(1, 0.05), 0.88, 1.14)),
        fat_mm=float(np.clip(rng.lognormal(2.65, 0.45), 4, 45)),
        muscle=float(np.clip(rng.normal(1.05, 0.06), 0.97, 1.18)),
        breast_mm=float(np.clip(rng.normal(22, 9), 0, 45)) if sex == "F" else 0.0,
        heart=float(np.clip(rng.normal(1.0, 0.065), 0.84, 1.10)),
        heart_turn_rad=float(rng.normal(0, 0.14)),
        aorta=float(np.clip(rng.normal(1.0, 0.08), 0.82, 1.25)),
        kyphosis_mm=float(np.clip(rng.normal(8, 5), 0, 22)),
        lung_hu=float(np.clip(rng.normal(-850, 45), -915, -720)),
        lung_gradient=float(np.clip(rng.normal(0.3, 0.25), 0.0, 1.0)),
        dependent_hu=float(min(rng.exponential(80.0), 300.0)),
        airway_wall=float(np.clip(np.exp(rng.normal(0, 0.2)), 0.65, 1.5)),
        vessels=float(np.exp(rng.normal(0, 0.08))),
        blood_hu=float(rng.uniform(110, 240) if contrast else rng.normal(42, 4)),
        marrow_hu=float(np.clip(rng.normal(185, 45), 90, 300)),
        liver_hu=float(np.clip(rng.normal(57, 8), 20, 75)) + (40.0 if contrast else 0.0),
        tree_seed=int(rng.integers(2**31)),
        cortex_hu=float(np.clip(rng.normal(650, 130), 380, 950)),
    )


def reposition(patient: Patient, rng: np.random.Generator) -> Patient:
    """The same body on the table another day: other pose and breath, slightly other weight."""
    return dataclasses.replace(
        patient,
        position_mm=(0.0, float(rng.normal(0, 8)), float(rng.normal(0, 7))),
        roll_rad=float(rng.normal(0, 0.045)),
        lean=(float(rng.normal(0, 0.035)), float(rng.normal(0, 0.02))),
        breath_mm=float(np.clip(patient.breath_mm + rng.normal(0, 6), -28, 24)),
        fat_mm=float(np.clip(patient.fat_mm * np.exp(rng.normal(0, 0.08)), 4, 45)),
        age=patient.age + int(rng.integers(0, 3)),
    )


# --- the rib cage and what it holds -----------------------------

APEX_MM, WAIST_MM = 102.0, -80.0
HALF_WIDTH_MM, HALF_DEPTH_MM = 134.0, 93.0


def cage_radii(patient: Patient, z: Array) -> tuple[Array, Array, Array]:
    """Half width, half depth and y of the centre of the pleural cavity at height ``z``."""
    t = np.clip((z - WAIST_MM) / (APEX_MM - WAIST_MM), 0.0, 0.9995)
    dome = np.sqrt(1.0 - t * t)
    low = np.clip((WAIST_MM - z) / 120.0, 0.0, 1.5)
    width = HALF_WIDTH_MM / math.sqrt(patient.barrel) * dome * (1.0 - 0.04 * low * low)
    depth = HALF_DEPTH_MM * patient.barrel * dome
    return width, depth, 27.0 * t * t


def cage(patient: Patient, z: Array, y: Array, x: Array) -> Array:
    """Signed distance to the inner surface of the rib cage (the parietal pleura)."""
    width, depth, centre = cage_radii(patient, z)
    y = y - centre
    x = x * (1.0 - 0.11 * np.clip(y / depth, -1.0, 1.0)) / width
    u, v = np.abs(x), np.abs(y / depth)
    level = (u * u * np.sqrt(u) + v * v * np.sqrt(v)) ** np.float32(0.4)
    radius = np.sqrt((x * width) ** 2 + y * y)
    inside = radius * (1.0 - 1.0 / np.maximum(level, 1e-3))
    # Below the apex the cage closes as a dome, where the in-plane distance overestimates.
    return np.maximum(inside, (level - 1.0) * 60.0, out=inside, where=level < 1.0)


def diaphragm_height(patient: Patient, y: Array, x: Array) -> Array:
    """Z of the diaphragm's upper surface: two domes and the tendon below the heart."""
    right = -104.0 - 58.0 * ((x + 68.0) / 82.0) ** 2 - 52.0 * ((y + 12.0) / 84.0) ** 2
    left = -116.0 - 58.0 * ((x - 70.0) / 80.0) ** 2 - 52.0 * ((y + 8.0) / 84.0) ** 2
    middle = -124.0 - 30.0 * ((x - 5.0) / 60.0) ** 2 - 40.0 * ((y + 20.0) / 60.0) ** 2
    return -smooth_min(-smooth_min_pair(right, left), -middle, 14.0) - patient.breath_mm


def smooth_min_pair(a: Array, b: Array) -> Array:
    """Upper envelope of two heights with a soft valley between them."""
    return -smooth_min(-a, -b, 14.0)


def spine_y(patient: Patient, z: Array) -> Array:
    """Y of the centre of the vertebral bodies: kyphotic."""
    return 47.0 + patient.kyphosis_mm * (1.0 - ((z + 30.0) / 110.0) ** 2)


# --- the heart --------------------------------------------------

HEART_CENTRE = np.array([-72.0, -27.0, 20.0], np.float32)


def heart_axes(patient: Patient) -> Array:
    """Rows: long axis (base to apex), the axis to the patient's left-back, the third."""
    turn = 0.90 + patient.heart_turn_rad
    long = np.array([-0.46, -0.89 * np.cos(turn), 0.89 * np.sin(turn)])
    side = np.cross(long, [1.0, 0.0, 0.0])
    side /= np.linalg.norm(side)
    return np.stack([long / np.linalg.norm(long), side, np.cross(long, side)]).astype(np.float32)


def heart(patient: Patient, z: Array, y: Array, x: Array) -> Array:
    """Signed distance to the pericardium: ventricles, right atrium, left atrium."""
    s = np.float32(patient.heart)
    # The heart rests on the diaphragm: it follows the breath, and grows upwards and sideways.
    drop = 0.6 * patient.breath_mm
    p = (z - HEART_CENTRE[0] + drop, y - HEART_CENTRE[1], x - HEART_CENTRE[2])
    axes = heart_axes(patient)
    local = tuple(a[0] * p[0] + a[1] * p[1] + a[2] * p[2] for a in axes)
    ventricles = ellipsoid((local[0], local[1], local[2]), (62 * s, 45 * s, 47 * s))
    right = ellipsoid((p[0] - 8 * s, p[1] - 16 * s, p[2] + 33 * s), (39 * s, 30 * s, 30 * s))
    left = ellipsoid((p[0] - 25 * s, p[1] - 33 * s, p[2] + 13 * s), (22 * s, 21 * s, 33 * s))
    return smooth_min(smooth_min(ventricles, right, 16.0), left, 12.0)


def heart_point(patient: Patient, along: float, angle_rad: float, depth_mm: float = 4.0) -> Array:
    """Template position on the ventricles' surface.

    Args:
        patient: Whose heart.
        along: Latitude from the base (-1) to the apex (1).
        angle_rad: Longitude about the long axis, 0 towards the patient's left-back.
        depth_mm: Below the pericardium: where the epicardial fat carries the coronaries.
    """
    radii = np.array([62.0, 45.0, 47.0]) * patient.heart - depth_mm
    ring = np.sqrt(max(0.0, 1.0 - along * along))
    local = radii * np.array([along, ring * np.cos(angle_rad), ring * np.sin(angle_rad)])
    centre = HEART_CENTRE - np.array([0.6 * patient.breath_mm, 0, 0], np.float32)
    return (centre + local @ heart_axes(patient)).astype(np.float32)


def coronaries(patient: Patient) -> dict[str, Array]:
    """Template polylines of the left anterior descending, circumflex and right coronary."""
    groove = -0.42
    lad = [heart_point(patient, a, -2.15 + 0.25 * a) for a in np.linspace(-0.5, 0.92, 12)]
    lcx = [heart_point(patient, groove, a) for a in np.linspace(-2.1, 0.55, 10)]
    rca = [heart_point(patient, groove, a, 3.0) for a in np.linspace(-2.6, -4.9, 10)]
    return {
        "left anterior descending": np.stack(lad),
        "circumflex": np.stack(lcx),
        "right coronary": np.stack(rca),
    }


# --- great vessels, airways, oesophagus as centrelines (template


def centrelines(patient: Patient) -> dict[str, tuple[Array, Array]]:
    """Name to (points ``(N, 3)``, radii ``(N,)``) of the tubes of the mediastinum."""
    a = patient.aorta
    d = 0.6 * patient.breath_mm
    back = float(spine_y(patient, np.float32(-100.0))) - 52.0
    tubes: dict[str, list[tuple[float, float, float, float]]] = {
        "aorta": [
            (-48 - d, -22, 2, 16 * a),
            (-25, -32, -12, 17 * a),
            (0, -30, -17, 16.5 * a),
            (18, -20, -12, 15.5 * a),
            (28, -3, 2, 14.5 * a),
            (27, 15, 14, 13.5 * a),
            (14, 30, 22, 13 * a),
            (-10, 37, 25, 12.5 * a),
            (-60, 38 + back, 22, 12 * a),
            (-120, 38 + back, 14, 11.5 * a),
            (-230, 34 + back, 6, 10.5 * a),
        ],
        "brachiocephalic artery": [(30, -8, -4, 6.5), (55, -12, -14, 6), (90, -8, -26, 5)],
        "left carotid": [(30, 2, 6, 4.5), (60, 2, 14, 4), (130, 0, 30, 3.5)],
        "left subclavian": [(28, 14, 15, 5.5), (65, 18, 24, 5), (92, 10, 62, 4.5)],
        "superior vena cava": [(-48 - d, -14, -26, 10), (-10, -14, -30, 10), (32, -20, -26, 8.5)],
        "left brachiocephalic vein": [(32, -20, -26, 7), (38, -36, 0, 6.5), (62, -26, 36, 6)],
        "right brachiocephalic vein": [(32, -20, -26, 8), (68, -14, -40, 7)],
        "azygos": [(-150, 38, -6, 3.5), (-20, 36, -8, 4), (2, 20, -18, 4.5), (2, -6, -28, 4.5)],
        "inferior vena cava": [(-90 - d, 0, -22, 11), (-135 - d, 8, -26, 12), (-240, 20, -28, 11)],
        "pulmonary trunk": [(-50 - d, -52, 16, 14), (-28, -36, 20, 14), (-14, -14, 22, 12.5)],
        "left pulmonary artery": [(-14, -14, 22, 11.5), (-12, 6, 40, 9.5), (-22, 14, 46, 8)],
        "right pulmonary artery": [(-16, -14, 20, 11), (-20, -4, -12, 10.5), (-24, 2, -42, 8.5)],
        "trachea": [(140, 2, 0, 8.8), (60, 8, -1, 8.6), (0, 15, -1, 8.6)],
        "right main bronchus": [(1, 15, -3, 7.4), (-17, 15, -27, 6.9), (-24, 13, -36, 6.0)],
        "left main bronchus": [(1, 15, 2, 6.8), (-15, 17, 24, 6.3), (-24, 18, 42, 5.6)],
        "oesophagus": [
            (140, 18, 4, 7),
            (60, 24, 7, 7),
            (0, 32, 4, 7),
            (-60, 30 + back * 0.5, 3, 7.5),
            (-105, 26 + back * 0.5, 12, 8),
            (-128 - patient.breath_mm, 12, 22, 8.5),
            (-142 - patient.breath_mm, 4, 40, 9),
        ],
    }
    return {
        name: (np.array([p[:3] for p in rows], np.float32), np.array([p[3] for p in rows]))
        for name, rows in tubes.items()
    }


def lower_to_tube(
    distance: Array, patient: Patient, grid: Grid, name: str, margin_mm: float
) -> None:
    """Lower a distance field over ``grid``, in place, to one tube's surface and its margin."""
    points, radii = centrelines(patient)[name]
    world = patient.to_world(points)
    radii = radii * patient.mean_scale
    for i in range(len(world) - 1):
        radius = float(radii[i] + radii[i + 1]) / 2
        box, d = capsule_box(grid, world[i], world[i + 1], radius + margin_mm)
        if box is not None and d is not None:
            np.minimum(distance[box], d - np.float32(radius), out=distance[box])


# --- lungs -------------------------------------------------------

CONTOUR = (
    "aorta",
    "superior vena cava",
    "left brachiocephalic vein",
    "pulmonary trunk",
    "left pulmonary artery",
    "right pulmonary artery",
    "trachea",
)
"""Tubes that shape the lungs' medial surface; a few mm of fat covers them."""


def mediastinum(patient: Patient, z: Array, y: Array, x: Array) -> Array:
    """Signed distance to the column between the lungs, spine included, heart and vessels not."""
    width = np.interp(
        z, [-260, -130, -60, -30, 0, 30, 60, 95, 130], [32, 30, 24, 24, 22, 21, 25, 42, 60]
    ).astype(np.float32)
    # The lungs nearly meet in front of the ascending aorta: the anterior junction.
    front = np.clip((-y - 30.0) / 40.0, 0.0, 1.0)
    column = np.abs(x - 1.0) - width * (1.0 - 0.72 * front)
    column += np.float32(0.18) * np.clip(y - 12.0, -40.0, 20.0)
    centre = spine_y(patient, z)
    body = np.sqrt(x * x + np.minimum(y - centre, 0.0) ** 2) - 23.0
    gutter = np.abs(x) - 22.0 - 0.4 * np.maximum(y - centre, 0.0)
    return smooth_min(column, np.where(y > centre, gutter, body), 8.0)


def contour_distance(patient: Patient, points: Array) -> Array:
    """Distance of template points ``(N, 3)`` to the nearest contour tube's surface."""
    nearest = np.full(len(points), FAR_MM, np.float32)
    tubes = centrelines(patient)
    for name in CONTOUR:
        line, radii = tubes[name]
        for i in range(len(line) - 1):
            along = line[i + 1] - line[i]
            offset = points - line[i]
            t = np.clip(offset @ along / (along @ along), 0.0, 1.0)
            gap = np.linalg.norm(offset - t[:, None] * along, axis=1)
            np.minimum(nearest, gap - (radii[i] + radii[i + 1]) / 2, out=nearest)
    return nearest


LOBES = {
    "right": ("right upper lobe", "right middle lobe", "right lower lobe"),
    "left": ("left upper lobe", "lingula", "left lower lobe"),
}
ALL_LOBES = LOBES["right"] + LOBES["left"]


def oblique_fissure(y: Array, z: Array) -> Array:
    """Height above the major fissure, which falls from behind-above to front-below (mm)."""
    return (z + 34.0 + 0.98 * y) / np.float32(1.4)


def lobe_index(z: Array, y: Array, x: Array) -> Array:
    """Index into ``ALL_LOBES`` of template points (meaningful inside the lungs)."""
    upper = oblique_fissure(y, z) > 0
    middle = upper & (z < np.where(x < 0, -38.0, -52.0))
    within = np.where(upper, np.where(middle, 1, 0), 2)
    return (within + np.where(x < 0, 0, 3)).astype(np.int8)
