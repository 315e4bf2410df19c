"""Augmentation of a CT without flips: a mirrored chest has its heart on the wrong side.

Applied in HU, before windowing, on whatever device the volume is; MONAI does the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ctclip.config import require_at_least, require_in
from ctclip.data.hu import AIR_HU


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How much a scan may change while its report stays true."""

    probability: float = 0.5
    """Of each of the four steps."""

    rotate_degrees: float = 8.0
    """About the body axis; patients lie that much askew."""

    scale: float = 0.08
    """Relative change of size, the same along all axes."""

    shift_voxels: int = 2
    """Most whole voxels along each axis; a technician's field of view is off by that much."""

    noise_hu: float = 25.0
    """Largest standard deviation of added noise; CT-RATE's kernels differ by about that."""

    blur_voxels: float = 0.8
    """Largest sigma of a Gaussian, from sharp to soft kernel."""

    crop_voxels: tuple[int, int, int] | None = None
    """Read a random box of this size (D, H, W) instead of the whole volume: only its chunks are
    read from disk, and a step costs less. The report may speak of what lies outside."""

    def __post_init__(self) -> None:
        require_in(self, "augment.", 0, 1, "probability")
        strengths = ("rotate_degrees", "shift_voxels", "noise_hu", "blur_voxels")
        require_at_least(self, "augment.", 0, *strengths)
        require_in(self, "augment.", 0, 1, "scale", ends="[)")  # at 1 a scan may shrink to nothing
        require_at_least(self, "augment.", 1, "crop_voxels")


def augment(volume_hu: Tensor, config: AugmentConfig, seed: Sequence[int]) -> Tensor:
    """Rotate, scale, shift, blur and add noise, reproducibly.

    Args:
        volume_hu: ``(D, H, W)`` in HU, any type and device.
        config: Strengths.
        seed: Non-negative integers that identify this draw, for example (seed, epoch, index).

    Returns:
        ``(D, H, W)`` float32 on the same device.
    """
    from monai.transforms import Affine, GaussianSmooth
    from monai.utils import convert_to_tensor

    random = np.random.default_rng(list(seed))
    chosen = random.random(4) < config.probability
    angle, size, sigma, noise = random.uniform((-1, -1, 0, 0), 1)
    shift = random.integers(-config.shift_voxels, config.shift_voxels, 3, endpoint=True)
    # MONAI pads with 0 beyond the border, so air is made 0 while it works.
    volume = volume_hu.to(torch.float32)[None] - AIR_HU
    if chosen[0] and max(config.rotate_degrees, config.scale) > 0:
        transform = Affine(
            rotate_params=(float(np.radians(config.rotate_degrees) * angle), 0.0, 0.0),
            scale_params=(float(1 + config.scale * size),) * 3,
            padding_mode="zeros",
            device=volume.device,
            image_only=True,
        )
        volume = convert_to_tensor(transform(volume))
    if chosen[1] and config.blur_voxels > 0:
        smooth = GaussianSmooth(sigma=float(config.blur_voxels * sigma) + 1e-3)
        volume = convert_to_tensor(smooth(volume))
    if chosen[3]:
        # Padding by n on one side and by -n on the other shifts, and fills with air.
        volume = pad(volume, [n for by in shift[::-1].tolist() for n in (by, -by)])
    volume = volume + AIR_HU
    if chosen[2] and config.noise_hu > 0:
        generator = torch.Generator(device=volume.device)
        generator.manual_seed(int(random.integers(2**62)))
        drawn = torch.randn(volume.shape, generator=generator, device=volume.device)
        volume = volume + float(config.noise_hu * noise) * drawn
    return volume[0]
