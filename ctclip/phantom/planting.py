"""Plant findings into real scans, with the functions that draw them into phantoms.

Lungs are segmented by threshold, the template body is fitted to their bounding box, and lesions
of the lung go where the real lung is. Mediastinal findings go where the fitted template has the
organ, which is near, not exact: good for sensitivity curves, not for teaching anatomy.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ctclip.findings import FINDINGS
from ctclip.phantom import anatomy
from ctclip.phantom.anatomy import Patient
from ctclip.phantom.findings import SAMPLERS, Sites
from ctclip.phantom.grid import Array, Grid
from ctclip.phantom.lesions import Lesion, draw
from ctclip.phantom.scene import Scene

LUNG_HU = -400.0
WORKING_MM = 2.5
"""Segmentation runs at about this voxel size."""

TEMPLATE_LUNGS_MM = np.array([[-176.0, -86.0, -131.0], [100.0, 90.0, 131.0]])
"""Bounding box (z, y, x) of the template's lungs."""


class PlantingError(ValueError):
    """A volume in which no lungs are found, or a place outside it."""


def scene_of_scan(
    hu: NDArray[np.generic], spacing_mm: tuple[float, float, float], seed: int = 0
) -> Scene:
    """Find the lungs of a scan and fit the template body to them.

    Args:
        hu: ``(D, H, W)`` in HU, oriented SPL; copied, never changed.
        spacing_mm: Voxel size (D, H, W).
        seed: Texture of whatever is planted.

    Returns:
        A scene whose voxels are a float32 copy of ``hu``; world (0, 0, 0) is voxel (0, 0, 0).

    Raises:
        PlantingError: If the volume holds no two litres-sized air spaces inside a body.
    """
    voxels = np.array(hu, np.float32)
    depth, height, width = voxels.shape
    grid = Grid((depth, height, width), spacing_mm, (0.0, 0.0, 0.0))
    steps = [max(1, round(WORKING_MM / step)) for step in spacing_mm]
    coarse = voxels[:: steps[0], :: steps[1], :: steps[2]]
    coarse_mm = [n * step for n, step in zip(steps, spacing_mm, strict=True)]
    mask = _lung_mask(coarse, coarse_mm)
    inside = ndimage.distance_transform_edt(mask, sampling=coarse_mm)
    outside = ndimage.distance_transform_edt(~mask, sampling=coarse_mm)
    signed = (outside - inside).astype(np.float32)
    # Half a voxel: distances run between centres, the surface lies between them.
    signed += np.where(mask, 0.5, -0.5).astype(np.float32) * np.float32(np.cbrt(np.prod(coarse_mm)))
    for axis in range(3):
        signed = _stretch(signed, axis, np.arange(voxels.shape[axis]) / steps[axis])
    where = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    low = np.array([hit[0] for hit in where]) * coarse_mm
    high = np.array([hit[-1] + 1 for hit in where]) * coarse_mm
    return Scene(_fit(low, high, seed), grid, hu=voxels, lung=signed)


def _lung_mask(hu: Array, spacing_mm: list[float]) -> NDArray[np.bool_]:
    """Air spaces inside the body, vessels filled in."""
    labels, count = ndimage.label(hu < LUNG_HU)
    # The room touches the sides of the image; lungs may touch its first and last slice.
    rim = np.concatenate(
        [labels[:, [0, -1]].ravel(), labels[:, :, 0].ravel(), labels[:, :, -1].ravel()]
    )
    litres = np.bincount(labels.ravel(), minlength=count + 1) * np.prod(spacing_mm) / 1e6
    litres[0] = 0.0
    litres[np.unique(rim)] = 0.0
    keep = litres > 0.25
    if not keep.any():
        raise PlantingError(
            f"no lungs found: no air space above 0.25 litres inside a body in a volume of shape "
            f"{hu.shape} at {tuple(round(s, 2) for s in spacing_mm)} mm; expected a chest CT in HU"
        )
    ball = [max(1, round(4.0 / step)) for step in spacing_mm]
    return ndimage.binary_closing(keep[labels], np.ones([2 * n + 1 for n in ball]))


def _stretch(field: Array, axis: int, index: NDArray[np.floating]) -> Array:
    """Linear interpolation along one axis at fractional ``index``."""
    index = np.clip(index, 0, field.shape[axis] - 1)
    low = np.minimum(index.astype(int), max(field.shape[axis] - 2, 0))
    t = np.expand_dims(index - low, tuple({0, 1, 2} - {axis})).astype(np.float32)
    high = np.minimum(low + 1, field.shape[axis] - 1)
    return np.take(field, low, axis) * (1 - t) + np.take(field, high, axis) * t


def _fit(low_mm: Array, high_mm: Array, seed: int) -> Patient:
    scale = (high_mm - low_mm) / (TEMPLATE_LUNGS_MM[1] - TEMPLATE_LUNGS_MM[0])
    position = low_mm - TEMPLATE_LUNGS_MM[0] * scale
    return Patient(
        sex="M",
        age=60,
        scale=(float(scale[0]), float(scale[1]), float(scale[2])),
        position_mm=(float(position[0]), float(position[1]), float(position[2])),
        roll_rad=0.0,
        lean=(0.0, 0.0),
        breath_mm=0.0,
        barrel=1.0,
        fat_mm=15.0,
        muscle=1.0,
        breast_mm=0.0,
        tree_seed=seed,
    )


class ScanSites(Sites):
    """Places in the lungs of a real scan."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.patient = scene.patient
        self.rng = rng
        inside = np.flatnonzero(scene.lung < -1.0)
        index = np.unravel_index(rng.choice(inside, min(2000, len(inside))), scene.grid.shape)
        self.depth_mm = -scene.lung[index]
        z, y, x = (axis.ravel()[i] for axis, i in zip(scene.grid.axes, index, strict=True))
        self.points = np.stack(scene.patient.point_to_template(z, y, x), axis=1)
        self.lobe = anatomy.lobe_index(*np.moveaxis(self.points, -1, 0))


def sample_finding(scene: Scene, finding: str, rng: np.random.Generator) -> list[Lesion]:
    """Lesions of one finding for the lungs of a scan.

    Raises:
        ValueError: If ``finding`` is none of the 18.
    """
    if finding not in FINDINGS:
        raise ValueError(f"unknown finding {finding!r}; expected one of {', '.join(FINDINGS)}")
    if finding == "Cardiomegaly":
        severity = float(rng.uniform(0.15, 0.4))
        return [
            Lesion(
                finding=finding,
                kind="planted",
                side="midline",
                lobe="heart",
                size_mm=122.0 * (1 + severity),
                severity=severity,
            )
        ]
    return SAMPLERS[finding](finding, ScanSites(scene, rng), rng)


def plant(scene: Scene, lesions: list[Lesion], seed: int = 0) -> Array:
    """Draw lesions into a scan, and give them the scan's own noise.

    Args:
        scene: From :func:`scene_of_scan`; its voxels are left as they are.
        lesions: From :func:`sample_finding`, or made by hand.
        seed: Noise of the planted voxels.

    Returns:
        ``(D, H, W)`` float32 in HU.
    """
    before = scene.hu
    planted = Scene(scene.patient, scene.grid, hu=before.copy(), lung=scene.lung)
    for lesion in lesions:
        draw(planted, lesion)
    changed = np.abs(planted.hu - before)
    # Painting replaces tissue and its noise; a smooth lesion would give itself away.
    box = ndimage.find_objects((changed > 10.0).astype(np.int8))
    if box:
        rng = np.random.default_rng([seed, 23])
        noise = rng.standard_normal(changed[box[0]].shape, dtype=np.float32)
        noise = ndimage.gaussian_filter(noise, (0.0, 0.7, 0.7))
        noise *= noise_hu(before) / max(float(noise.std()), 1e-6)
        planted.hu[box[0]] += noise * np.clip(changed[box[0]] / 400.0, 0.0, 1.0)
    return planted.hu


def noise_hu(hu: Array) -> float:
    """Noise of a scan: the 20th percentile of local standard deviations in soft tissue."""
    middle = hu[hu.shape[0] // 2]
    mean = ndimage.uniform_filter(middle, 7)
    spread = np.sqrt(np.maximum(ndimage.uniform_filter(middle**2, 7) - mean**2, 0.0))
    soft = spread[(mean > -20) & (mean < 120)]
    return float(np.percentile(soft, 20)) if len(soft) else 15.0


def plant_nodule(
    hu: NDArray[np.generic],
    spacing_mm: tuple[float, float, float],
    centre: tuple[float, float, float],
    diameter_mm: float,
    kind: str = "solid",
    seed: int = 0,
    scene: Scene | None = None,
) -> Array:
    """Plant one nodule, for curves of sensitivity against lesion size.

    Args:
        hu: ``(D, H, W)`` in HU, oriented SPL.
        spacing_mm: Voxel size (D, H, W).
        centre: Voxel index (d, h, w), inside a lung.
        diameter_mm: Mean of the three diameters.
        kind: ``solid``, ``ground-glass``, ``part-solid``, ``calcified`` or ``spiculated``.
        seed: Shape and noise.
        scene: ``scene_of_scan(hu, spacing_mm)``, to segment once for many nodules.

    Returns:
        ``(D, H, W)`` float32 in HU; the input is left unchanged.

    Raises:
        PlantingError: If ``centre`` lies outside the lungs.
        ValueError: If ``kind`` is unknown or the diameter is not positive.
    """
    kinds = ("solid", "ground-glass", "part-solid", "calcified", "spiculated")
    if kind not in kinds:
        raise ValueError(f"unknown kind of nodule {kind!r}; expected one of {', '.join(kinds)}")
    if not diameter_mm > 0:
        raise ValueError(f"diameter_mm must be positive, got {diameter_mm}")
    scene = scene or scene_of_scan(hu, spacing_mm, seed)
    index = tuple(round(c) for c in centre)
    if not all(0 <= i < n for i, n in zip(index, scene.grid.shape, strict=True)):
        raise PlantingError(f"voxel {index} lies outside the volume of shape {scene.grid.shape}")
    if scene.lung[index] > 0:
        raise PlantingError(f"voxel {index} lies {scene.lung[index]:.0f} mm outside the lungs")
    z, y, x = (float(c * step) for c, step in zip(centre, spacing_mm, strict=True))
    middle = scene.patient.position_mm[2]
    lesion = Lesion(
        finding="Lung nodule",
        kind=kind,
        side="left" if x > middle else "right",
        lobe="-",
        size_mm=diameter_mm,
        severity=min(1.0, diameter_mm / 30.0),
        points_mm=((z, y, x),),
        seed=seed,
    )
    return plant(scene, [lesion], seed)
