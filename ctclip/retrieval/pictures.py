"""What a viewer shows: reduced volumes, heat-maps and thumbnails, all in one physical frame."""

import gzip
import io
from typing import TYPE_CHECKING

import numpy as np

from ctclip.retrieval.figure import LUNG_HU

if TYPE_CHECKING:
    from ctclip.checkpoint import Checkpoint

MAX_SIDE = 256
"""Voxels per side that go to a browser; 240 x 480 x 480 goes as 120 x 240 x 240, some 5 MB."""

HEAT_QUANTILE = 0.995
"""The similarity that a heat-map draws at full strength; below the scan's median it draws none."""


def reduced(hu: np.ndarray) -> np.ndarray:
    """Average blocks of a ``(D, H, W)`` volume until no side exceeds ``MAX_SIDE``."""
    factor = -(-max(hu.shape) // MAX_SIDE)
    if factor == 1:
        return hu
    depth, height, width = (size // factor for size in hu.shape)
    blocks = hu[: depth * factor, : height * factor, : width * factor].reshape(
        depth, factor, height, factor, width, factor
    )
    return blocks.mean(axis=(1, 3, 5), dtype=np.float32).round().astype(np.int16)


def nifti(volume: np.ndarray, extent_mm: tuple[float, float, float]) -> bytes:
    """A ``(D, H, W)`` volume as ``.nii.gz``, centred on the origin of RAS space.

    Volumes of different grids but equal extent then lie on top of each other in a viewer.

    Args:
        volume: int16 or uint8, oriented SPL.
        extent_mm: Physical size (D, H, W).
    """
    import nibabel as nib

    spacing = [extent / size for extent, size in zip(extent_mm, volume.shape, strict=True)]
    along, down, left = spacing
    depth, height, width = volume.shape
    affine = np.array(
        [
            [-left, 0, 0, left * (width - 1) / 2],
            [0, -down, 0, down * (height - 1) / 2],
            [0, 0, along, -along * (depth - 1) / 2],
            [0, 0, 0, 1],
        ]
    )
    image = nib.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), affine)
    return gzip.compress(image.to_bytes(), compresslevel=1)


def heat_maps(
    checkpoint: "Checkpoint", hu: np.ndarray, directions: np.ndarray, device: str = "cpu"
) -> np.ndarray:
    """Where a scan resembles each finding's prompt: patch-prompt similarity.

    Args:
        checkpoint: The model.
        hu: ``(D, H, W)`` HU, preprocessed.
        directions: ``(18, E)`` present minus absent prompt.
        device: For example ``"cuda:0"``.

    Returns:
        ``(18, d, h, w)`` uint8, 0 at the scan's median and 255 at its top half per cent: relative
        within the scan, and no measure of how likely the finding is.
    """
    import torch

    from ctclip.data.volume import window

    with torch.inference_mode():
        image = window(
            torch.from_numpy(hu)[None].to(device).float(), checkpoint.volume_config.windows_hu
        )
        patches = checkpoint.model.encode_patches(image)[0].float()
        heat = torch.einsum("dhwe,fe->fdhw", patches, torch.from_numpy(directions).to(patches))
    maps = heat.cpu().numpy()
    middle = np.median(maps, axis=(1, 2, 3), keepdims=True)
    top = np.quantile(maps, HEAT_QUANTILE, axis=(1, 2, 3), keepdims=True)
    scaled = (maps - middle) / np.maximum(top - middle, 1e-9)
    return (scaled.clip(0, 1) * 255).astype(np.uint8)


def thumbnail(hu: np.ndarray, spacing_mm: tuple[float, float, float], side: int = 128) -> bytes:
    """The middle axial slice in the lung window as a PNG of at most ``side`` pixels."""
    import matplotlib.image

    axial = hu[hu.shape[0] // 2].astype(np.float32)
    step = max(1, -(-max(axial.shape) // side))
    low, high = LUNG_HU
    buffer = io.BytesIO()
    matplotlib.image.imsave(
        buffer, axial[::step, ::step], cmap="gray", vmin=low, vmax=high, format="png"
    )
    return buffer.getvalue()
