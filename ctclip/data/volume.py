"""A scan on disk becomes the network's input: read, orient, check, resample, window.

``read`` takes any supported file to a :class:`Volume` in HU and house orientation; ``preprocess``
takes that to the fixed grid that the cache holds; ``window`` is the only function that leaves HU.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ctclip.data import ct_clip, dicom, geometry, hu, itk, nifti, rad_chestct
from ctclip.data.problems import Note, VolumeError
from ctclip.data.resample import resample, resampled_affine
from ctclip.data.table import ClaimedSpacing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Volume", "VolumeConfig", "VolumeError", "preprocess", "read", "window"]

Recipe = Literal["ctclip", "ct-clip", "ct-clip-inference"]

PREPROCESSING_VERSION: dict[Recipe, int] = {"ctclip": 1, "ct-clip": 2, "ct-clip-inference": 2}
"""Raised whenever the same input and config would give other voxels."""


@dataclass(frozen=True, kw_only=True)
class VolumeConfig:
    """How a scan becomes the network's input. Stored in every cache and every checkpoint."""

    spacing_mm: tuple[float, float, float] = (1.5, 0.75, 0.75)
    """Voxel size after resampling, (depth, height, width). CT-CLIP, Hamamci et al. 2024."""

    size: tuple[int, int, int] = (240, 480, 480)
    """Voxels after cropping or padding about the centre, (depth, height, width)."""

    windows_hu: tuple[tuple[float, float], ...] = ((-1000.0, 1000.0),)
    """HU ranges mapped to [-1, 1] when a batch is read, one channel each; not part of the cache."""

    antialias: bool = True
    """Average over what a voxel covers when going to larger voxels, instead of skipping slices."""

    recipe: Recipe = "ctclip"
    """``ct-clip`` and ``ct-clip-inference`` repeat CT-CLIP's own steps (clip after and before
    interpolation); they fix the axes to S, L, P and ignore ``antialias``."""

    def __post_init__(self) -> None:
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        if min(self.size) < 1:
            raise ValueError(f"size must be at least 1 voxel per axis, got {self.size}")
        if not self.windows_hu:
            raise ValueError("windows_hu must name at least one (low, high) window")
        for low, high in self.windows_hu:
            if not -math.inf < low < high < math.inf:
                raise ValueError(
                    f"windows_hu must be finite (low, high) with low < high, got {low, high}"
                )

    @property
    def channels(self) -> int:
        """One channel per HU window."""
        return len(self.windows_hu)

    def fingerprint(self) -> str:
        """Twelve hex digits over everything that shapes cached voxels.

        The windows are left out: they are applied on reading and can change without a new cache.
        """
        shaping = {
            "spacing_mm": [float(step) for step in self.spacing_mm],
            "size": [int(num) for num in self.size],
            "antialias": self.antialias,
            "recipe": self.recipe,
            "version": PREPROCESSING_VERSION[self.recipe],
        }
        text = json.dumps(shaping, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class Volume:
    """One scan in Hounsfield units, oriented D to superior, H to posterior, W to patient left."""

    hu: np.ndarray
    """``(D, H, W)``; int16 where the stored numbers are whole, float32 otherwise. Read-only use."""

    affine: np.ndarray
    """``(4, 4)`` from (d, h, w) index to RAS mm."""

    spacing_mm: tuple[float, float, float]
    """Voxel size (D, H, W)."""

    path: Path
    notes: list[Note] = field(default_factory=list)
    """What was applied, repaired or noticed, in the order in which it happened."""

    def warnings(self) -> list[Note]:
        """The notes that a user should look into."""
        return [note for note in self.notes if note.level in ("warn", "hold")]


def read(
    path: str | Path,
    *,
    rescale: tuple[float, float] | None = None,
    spacing_mm: ClaimedSpacing | None = None,
    series: str | None = None,
    max_voxels: int = nifti.MAX_VOXELS,
) -> Volume:
    """Read one scan into HU and house orientation, or say why not.

    Args:
        path: ``.nii``, ``.nii.gz``, ``.nrrd``, ``.mha``, RAD-ChestCT ``.npz``, or a folder of
            DICOM files.
        rescale: Slope and intercept from a table; applied only if the file does not hold HU.
        spacing_mm: Spacing (D, H, W) that a table claims, None where it doesn't say; a difference
            beyond 1 % is noted, the file's own spacing is used.
        series: SeriesInstanceUID to take from a DICOM folder; by default chosen by rule.
        max_voxels: Refuse anything larger before memory is taken.

    Returns:
        The scan; ``notes`` tells what was done.

    Raises:
        VolumeError: If the scan can't be used; ``code`` is a stable reason.
        FileNotFoundError: If there is nothing at ``path``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no scan at {path}")
    stored = _read_stored(path, series, max_voxels)
    notes = list(stored.notes)

    voxels = stored.voxels
    if (stored.slope, stored.intercept) != (1.0, 0.0):
        text = f"applied the file's own slope {stored.slope:g}, intercept {stored.intercept:g}"
        notes.append(Note("file-scaling", text))
        voxels = hu.apply_scaling(voxels, stored.slope, stored.intercept)
    else:
        voxels = hu.apply_scaling(voxels, 1.0, 0.0)
    voxels, found = hu.replace_non_finite(path, voxels)
    notes += found
    if rescale is not None:
        voxels, found = hu.rescale_once(path, voxels, rescale)
        notes += found

    geometry.check_grid(path, voxels.shape, stored.affine)
    notes += hu.check_values(path, voxels)
    notes += hu.describe_padding(voxels)
    notes += geometry.describe(stored.affine)
    voxels, affine = geometry.orient(voxels, stored.affine)
    voxels, affine, found = geometry.unshear(path, voxels, affine, hu.AIR_HU)
    notes += found
    spacing = geometry.spacing_mm(affine)
    if spacing_mm is not None:
        notes += geometry.compare_spacing(spacing, spacing_mm)
    return Volume(voxels, affine, spacing, path, notes)


def _read_stored(path: Path, series: str | None, max_voxels: int) -> nifti.StoredVolume:
    name = path.name.lower()
    if path.is_dir():
        if name.endswith((".nii", ".nii.gz", ".npz", *itk.SUFFIXES)):
            raise VolumeError(path, "directory", "is a directory with the name of a file")
        return dicom.read(path, series)
    if name.endswith(itk.SUFFIXES):
        return itk.read(path, max_voxels=max_voxels)
    if name.endswith(".npz"):
        return rad_chestct.read(path, max_voxels=max_voxels)
    if name.endswith((".dcm", ".ima")):
        return dicom.read(path, series)
    return nifti.read(path, max_voxels=max_voxels)


def preprocess(volume: Volume, config: VolumeConfig) -> np.ndarray:
    """Bring a scan to the network's grid, still in HU.

    Args:
        volume: From :func:`read`.
        config: Spacing and size of the result.

    Returns:
        ``config.size`` int16 HU between -1024 and 3071, padded with air. With CT-CLIP's recipes
        float32 HU that end at -1000 and 1000, axes S, L, P: its patch embedding normalises every
        patch, so that in near-uniform air half a HU of rounding moves tokens to other codes.
    """
    if config.recipe != "ctclip":
        unit = ct_clip.preprocess(
            ct_clip.to_slp(volume.hu),
            (volume.spacing_mm[0], volume.spacing_mm[2], volume.spacing_mm[1]),
            clip="last" if config.recipe == "ct-clip" else "first",
            target_mm=config.spacing_mm,
            size=config.size,
        )
        return unit * np.float32(1000)
    return resample(
        volume.hu,
        volume.spacing_mm,
        config.spacing_mm,
        config.size,
        clip_hu=hu.HU_RANGE,
        fill_hu=hu.AIR_HU,
        antialias=config.antialias,
    )


def preprocessed_affine(volume: Volume, config: VolumeConfig) -> np.ndarray:
    """``(4, 4)`` from a voxel of :func:`preprocess`'s result to RAS mm, for maps drawn on scans."""
    order = [0, 1, 2] if config.recipe == "ctclip" else [0, 2, 1]
    affine = volume.affine[:, [*order, 3]]
    shape = tuple(volume.hu.shape[axis] for axis in order)
    d, h, w = (volume.spacing_mm[axis] for axis in order)
    return resampled_affine(affine, shape, (d, h, w), config.spacing_mm, config.size)


def window(volume_hu: "Tensor", windows_hu: tuple[tuple[float, float], ...]) -> "Tensor":
    """Map HU to [-1, 1], one channel per window; the only function that leaves HU.

    Args:
        volume_hu: ``(..., D, H, W)`` of any type, on any device.
        windows_hu: ``(low, high)`` per channel.

    Returns:
        ``(..., C, D, H, W)`` float32.
    """
    import torch

    channels = []
    for low, high in windows_hu:
        channel = volume_hu.to(torch.float32, copy=True)
        channel.sub_((low + high) / 2).mul_(2 / (high - low)).clamp_(-1, 1)
        channels.append(channel)
    return torch.stack(channels, dim=-4)
