"""Choose a patient's lesions: kind, side, lobe, size and severity, as textbooks describe them.

Sides, lobes and sizes follow what 1,000 CT-RATE reports state about each finding. The drawing
itself is in :mod:`ctclip.phantom.lesions`.
"""

import dataclasses

import numpy as np

from ctclip.findings import FINDINGS
from ctclip.phantom import anatomy, trees
from ctclip.phantom.anatomy import ALL_LOBES, LOBES, Patient
from ctclip.phantom.body import NODE_SITES
from ctclip.phantom.grid import Array
from ctclip.phantom.lesions import Lesion

RIGHT_UPPER, RIGHT_MIDDLE, RIGHT_LOWER, LEFT_UPPER, LINGULA, LEFT_LOWER = ALL_LOBES
NO_LOBE = "-"


class Sites:
    """Places in a patient's lungs where lesions can start."""

    def __init__(self, patient: Patient, rng: np.random.Generator) -> None:
        self.patient = patient
        self.rng = rng
        points = trees.lung_points(patient, rng, 900, 1.0)
        self.points = points
        self.depth_mm = trees.lung_depth(patient, points) * patient.mean_scale
        self.lobe = anatomy.lobe_index(*np.moveaxis(points, -1, 0))

    def pick(
        self,
        lobes: tuple[str, ...] | list[str] = ALL_LOBES,
        depth_mm: tuple[float, float] = (2.0, 80.0),
        height: tuple[float, float] = (-200.0, 120.0),
    ) -> tuple[tuple[float, float, float], str]:
        """A world point and its lobe; wishes are relaxed where the lung offers no such place."""
        wanted = np.isin(self.lobe, [ALL_LOBES.index(lobe) for lobe in lobes])
        deep = (self.depth_mm > depth_mm[0]) & (self.depth_mm < depth_mm[1])
        high = (self.points[:, 0] > height[0]) & (self.points[:, 0] < height[1])
        for keep in (wanted & deep & high, wanted & deep, wanted, deep):
            found = np.flatnonzero(keep)
            if len(found):
                break
        i = int(self.rng.choice(found))
        return _point(self.patient.to_world(self.points[i])), ALL_LOBES[int(self.lobe[i])]


def _point(world: Array) -> tuple[float, float, float]:
    z, y, x = (float(v) for v in world)
    return z, y, x


def _side_of(lobes: list[str]) -> str:
    sides = {side for side, names in LOBES.items() for lobe in lobes if lobe in names}
    return "both" if len(sides) == 2 else sides.pop()


def _lognormal(
    rng: np.random.Generator, median: float, p90: float, low: float, high: float
) -> float:
    sigma = np.log(p90 / median) / 1.2816
    return float(np.clip(median * np.exp(rng.normal(0, sigma)), low, high))


def _severity(rng: np.random.Generator, minimal: float = 0.35) -> float:
    """0 to 1; ``minimal`` is the share that reports call minimal (below 0.25)."""
    return float(rng.uniform(0.02, 0.25) if rng.random() < minimal else rng.uniform(0.25, 1.0))


def _choose(rng: np.random.Generator, weights: dict[str, float]) -> str:
    p = np.array(list(weights.values()))
    return str(rng.choice(list(weights), p=p / p.sum()))


def _sides(rng: np.random.Generator, both: float, right: float, left: float) -> list[str]:
    side = _choose(rng, {"both": both, "right": right, "left": left})
    return ["right", "left"] if side == "both" else [side]


def sample_lesions(
    present: dict[str, bool], patient: Patient, rng: np.random.Generator
) -> tuple[Patient, list[Lesion]]:
    """Turn a patient's findings into lesions.

    Args:
        present: Finding to presence.
        patient: The healthy body.
        rng: The patient's generator.

    Returns:
        The patient with the anatomy that disease changes (heart size), and the lesions.
    """
    lesions: list[Lesion] = []
    if present["Cardiomegaly"]:
        severity = _severity(rng, 0.25)
        patient = dataclasses.replace(patient, heart=1.19 + 0.25 * severity)
        width = 122.0 * patient.heart * patient.scale[2]
        lesions.append(
            Lesion(
                finding="Cardiomegaly",
                kind="global",
                side="midline",
                lobe="heart",
                size_mm=round(width, 1),
                severity=round(severity, 3),
            )
        )
    sites = Sites(patient, rng)
    for finding in FINDINGS:
        if present[finding] and finding != "Cardiomegaly":
            lesions.extend(SAMPLERS[finding](finding, sites, rng))
    return patient, lesions


def _lesion(
    finding: str,
    rng: np.random.Generator,
    kind: str,
    side: str,
    lobe: str,
    size_mm: float,
    severity: float,
    points: list[tuple[float, float, float]] | None = None,
) -> Lesion:
    return Lesion(
        finding=finding,
        kind=kind,
        side=side,
        lobe=lobe,
        size_mm=round(size_mm, 1),
        severity=round(severity, 3),
        points_mm=tuple(points or ()),
        seed=int(rng.integers(2**31)),
    )


def _nodules(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    lesions = []
    count = 1 + min(int(rng.geometric(0.42)) - 1, 7)
    for i in range(count):
        # The largest first: a rare mass among many small nodules.
        size = _lognormal(rng, 5.0, 12.0, 2.0, 60.0) * (1.0 if i == 0 else 0.8)
        size = max(size, 2.0)
        weights = {"solid": 0.62, "ground-glass": 0.14, "part-solid": 0.06, "calcified": 0.12}
        if size > 8:
            weights["spiculated"] = 0.35
        near = (1.0 + size / 2, 6.0 + size / 2) if rng.random() < 0.3 else (size / 2, 80.0)
        point, lobe = sites.pick(depth_mm=near)
        lesions.append(
            _lesion(
                finding,
                rng,
                _choose(rng, weights),
                _side_of([lobe]),
                lobe,
                size,
                size / 30,
                [point],
            )
        )
    return lesions


def _opacities(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    lesions = []
    severity = _severity(rng, 0.3)
    for side in _sides(rng, 0.76, 0.10, 0.14):
        lobes = [lobe for lobe in LOBES[side] if rng.random() < 0.35 + 0.5 * severity]
        lobes = lobes or [LOBES[side][2]]
        for lobe in lobes:
            count = 1 + int(rng.poisson(1.2 + 2.0 * severity))
            size = _lognormal(rng, 22.0 + 16.0 * severity, 60.0, 8.0, 90.0)
            depth = (2.0, 14.0) if rng.random() < 0.6 else (4.0, 80.0)
            points = [sites.pick((lobe,), depth)[0] for _ in range(count)]
            lesions.append(
                _lesion(finding, rng, "ground-glass", side, lobe, size, severity, points)
            )
    return lesions


def _consolidations(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    lesions = []
    severity = _severity(rng, 0.2)
    for side in _sides(rng, 0.55, 0.21, 0.24):
        upper, middle, lower = LOBES[side]
        lobe = _choose(rng, {upper: 0.28, middle: 0.15, lower: 0.57})
        size = _lognormal(rng, 30.0 + 15.0 * severity, 68.0, 10.0, 95.0)
        count = 1 + int(rng.poisson(0.4 + 1.2 * severity))
        points = [sites.pick((lobe,), (2.0, 22.0))[0] for _ in range(count)]
        kind = "lobar" if size > 55 else "patchy"
        lesions.append(_lesion(finding, rng, kind, side, lobe, size, severity, points))
    return lesions


def _atelectases(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    lesions = []
    severity = _severity(rng, 0.25)
    kind = _choose(rng, {"linear": 0.62, "dependent": 0.38})
    for side in _sides(rng, 0.70, 0.15, 0.15):
        upper, middle, lower = LOBES[side]
        if kind == "dependent":
            size = 7.0 + 15.0 * severity
            lesions.append(_lesion(finding, rng, kind, side, lower, size, severity))
            continue
        lobe = _choose(rng, {upper: 0.16, middle: 0.34, lower: 0.50})
        size = _lognormal(rng, 34.0, 58.0, 15.0, 80.0)
        points = [sites.pick((lobe,), (2.0, 20.0))[0] for _ in range(1 + int(rng.poisson(1.2)))]
        lesions.append(_lesion(finding, rng, kind, side, lobe, size, severity, points))
    return lesions


def _effusions(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    lesions = []
    kind = "loculated" if rng.random() < 0.1 else "free"
    size = _lognormal(rng, 22.0, 52.0, 6.0, 70.0)
    for side in _sides(rng, 0.74, 0.15, 0.11):
        own = float(np.clip(size * np.exp(rng.normal(0, 0.3)), 5.0, 75.0))
        lesions.append(
            _lesion(finding, rng, kind, side, f"{side} pleural space", own, min(1.0, own / 70.0))
        )
    return lesions


def _emphysemas(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    severity = _severity(rng, 0.33)
    kind = _choose(rng, {"centrilobular": 0.62, "paraseptal": 0.25, "panlobular": 0.13})
    bullae = int(rng.poisson(1.0 + 3.0 * severity))
    if kind == "paraseptal":
        bullae += 4 + int(rng.poisson(8.0 * severity))
    uppers = (RIGHT_UPPER, LEFT_UPPER)
    points = [sites.pick(uppers, (3.0, 9.0), (-10.0, 120.0))[0] for _ in range(bullae)]
    size = float(rng.uniform(5.0, 9.0))
    lobe = "+".join(ALL_LOBES if kind == "panlobular" else uppers)
    return [_lesion(finding, rng, kind, "both", lobe, size, severity, points)]


def _scars(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    lesions = []
    severity = _severity(rng, 0.3)
    for side in _sides(rng, 0.7, 0.15, 0.15):
        upper, middle, lower = LOBES[side]
        lobe = _choose(rng, {upper: 0.5, middle: 0.25, lower: 0.25})
        size = _lognormal(rng, 13.0, 26.0, 6.0, 40.0)
        if lobe == upper and rng.random() < 0.6:
            point, _ = sites.pick((lobe,), (1.0, 10.0), (70.0, 120.0))
            lesions.append(_lesion(finding, rng, "apical cap", side, lobe, size, severity, [point]))
        else:
            points = [sites.pick((lobe,), (1.5, 14.0))[0] for _ in range(1 + int(rng.poisson(0.8)))]
            lesions.append(_lesion(finding, rng, "bands", side, lobe, size, severity, points))
    return lesions


def _mosaics(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    size, severity = float(rng.uniform(14.0, 28.0)), _severity(rng, 0.15)
    return [_lesion(finding, rng, "air trapping", "both", "+".join(ALL_LOBES), size, severity)]


def _septa(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    severity = _severity(rng, 0.2)
    sides = _sides(rng, 0.86, 0.06, 0.08)
    side = "both" if len(sides) == 2 else sides[0]
    lobes = [RIGHT_LOWER, LEFT_LOWER] if side == "both" else [LOBES[side][2]]
    return [_lesion(finding, rng, "smooth", side, "+".join(lobes), 1.1 + 1.0 * severity, severity)]


def _walls(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    severity = _severity(rng, 0.4)
    lobes: list[str] = []
    for side in _sides(rng, 0.8, 0.08, 0.12):
        upper, middle, lower = LOBES[side]
        lobes += [lower] + [lobe for lobe in (upper, middle) if rng.random() < 0.3 + 0.4 * severity]
    size = 1.8 + 1.6 * severity
    return [_lesion(finding, rng, "diffuse", _side_of(lobes), "+".join(lobes), size, severity)]


def _bronchiectases(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    severity = _severity(rng, 0.45)
    lobes: list[str] = []
    for side in _sides(rng, 0.72, 0.12, 0.16):
        upper, middle, lower = LOBES[side]
        lobes.append(_choose(rng, {upper: 0.25, middle: 0.25, lower: 0.5}))
        if rng.random() < severity:
            lobes.append(_choose(rng, {lobe: 1.0 for lobe in LOBES[side] if lobe != lobes[-1]}))
    kind = "cystic" if severity > 0.8 else ("varicose" if severity > 0.6 else "cylindrical")
    size = 4.0 + 7.0 * severity
    return [_lesion(finding, rng, kind, _side_of(lobes), "+".join(lobes), size, severity)]


def _pericardial(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    size = _lognormal(rng, 11.0, 24.0, 4.0, 34.0)
    return [_lesion(finding, rng, "free", "midline", "pericardium", size, min(1.0, size / 28.0))]


def _aortic_plaques(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    severity = _severity(rng, 0.3)
    return [_lesion(finding, rng, "plaques", "midline", "aorta", 4.0 + 14.0 * severity, severity)]


def _coronary_plaques(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    severity = _severity(rng, 0.25)
    vessels = ["left anterior descending"]
    vessels += [v for v in ("circumflex", "right coronary") if rng.random() < 0.15 + severity]
    size = 2.6 + 2.2 * severity
    return [_lesion(finding, rng, "plaques", "midline", "+".join(vessels), size, severity)]


def _hernias(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    severity = _severity(rng, 0.3)
    size = 26.0 + 56.0 * severity
    patient = sites.patient
    centre = np.array([-122.0 - patient.breath_mm + 0.42 * size, 20.0, 14.0], np.float32)
    kind = _choose(rng, {"fluid": 0.5, "fat and stomach": 0.5})
    point = _point(patient.to_world(centre))
    return [_lesion(finding, rng, kind, "midline", "oesophageal hiatus", size, severity, [point])]


STATIONS: dict[str, tuple[str, float]] = {
    "right paratracheal": ("right", 0.22),
    "left paratracheal": ("left", 0.10),
    "aortopulmonary window": ("left", 0.14),
    "prevascular": ("midline", 0.10),
    "subcarinal": ("midline", 0.18),
    "right hilar": ("right", 0.10),
    "left hilar": ("left", 0.06),
    "right axillary": ("right", 0.05),
    "left axillary": ("left", 0.05),
}
"""Lymph node station to side and share of enlarged nodes."""


def _nodes(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    lesions = []
    shares = {name: share for name, (_, share) in STATIONS.items()}
    chosen = {_choose(rng, shares) for _ in range(1 + int(rng.poisson(1.4)))}
    for name in sorted(chosen):
        side, centre = STATIONS[name][0], NODE_SITES[name]
        size = _lognormal(rng, 12.0, 20.0, 10.0, 36.0)
        count = 1 + int(rng.poisson(0.6))
        points = [
            _point(
                sites.patient.to_world(np.array(centre) + rng.normal(0, 0.35 * size, 3) * (i > 0))
            )
            for i in range(count)
        ]
        lesions.append(_lesion(finding, rng, "enlarged", side, name, size, size / 36.0, points))
    return lesions


def _devices(finding: str, sites: Sites, rng: np.random.Generator) -> list[Lesion]:
    w = sites.patient.to_world
    kind = _choose(
        rng,
        {
            "sternal wires": 0.26,
            "port catheter": 0.18,
            "central venous catheter": 0.16,
            "pacemaker": 0.14,
            "coronary stent": 0.07,
            "prosthetic valve": 0.06,
            "nasogastric tube": 0.06,
            "chest tube": 0.04,
            "tracheostomy tube": 0.03,
        },
    )
    side, size, points = "midline", 30.0, []
    front = -float(sites.patient.barrel) * 105.0
    match kind:
        case "pacemaker":
            side, size = "left", 48.0
            points = [_point(w(np.array([38.0, front + 16.0, 92.0])))]
        case "port catheter":
            side, size = "right", 26.0
            points = [_point(w(np.array([34.0, front + 14.0, -78.0])))]
        case "central venous catheter":
            side, size = "right", 150.0
            points = [_point(w(np.array([125.0, -4.0, -38.0])))]
        case "chest tube":
            side, size = _choose(rng, {"right": 0.5, "left": 0.5}), 120.0
            sign = -1.0 if side == "right" else 1.0
            path = [(-60, 10, 150), (-50, 30, 118), (0, 58, 90), (50, 50, 62)]
            points = [_point(w(np.array([z, y, sign * x]))) for z, y, x in path]
    return [_lesion(finding, rng, kind, side, NO_LOBE, size, 0.5, points)]


SAMPLERS = {
    "Medical material": _devices,
    "Arterial wall calcification": _aortic_plaques,
    "Pericardial effusion": _pericardial,
    "Coronary artery wall calcification": _coronary_plaques,
    "Hiatal hernia": _hernias,
    "Lymphadenopathy": _nodes,
    "Emphysema": _emphysemas,
    "Atelectasis": _atelectases,
    "Lung nodule": _nodules,
    "Lung opacity": _opacities,
    "Pulmonary fibrotic sequela": _scars,
    "Pleural effusion": _effusions,
    "Mosaic attenuation pattern": _mosaics,
    "Peribronchial thickening": _walls,
    "Consolidation": _consolidations,
    "Bronchiectasis": _bronchiectases,
    "Interlobular septal thickening": _septa,
}
