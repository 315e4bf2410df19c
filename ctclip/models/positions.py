"""3D positions of patches, for any grid.

Positions count patches from the volume's centre. Preparation crops and pads about the centre, so a
larger field of view continues the positions of a smaller one instead of shifting them.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

BASE_WAVELENGTH = 100.0
"""Ratio of the longest to the shortest wavelength. Text uses 10,000 for thousands of positions; a
scan has tens along an axis, and a smaller base leaves fewer channels constant over it."""


def centred(count: int, step: float = 1.0, device: torch.device | None = None) -> Tensor:
    """Positions ``(count,)`` of patches along one axis, 0 at the volume's centre."""
    return (torch.arange(count, device=device, dtype=torch.float32) - (count - 1) / 2) * step


def _frequencies(count: int) -> Tensor:
    return BASE_WAVELENGTH ** (-torch.arange(count, dtype=torch.float32) / max(count, 1))


class SinCosPositions(nn.Module):
    """Fixed sines and cosines of the three coordinates, a third of the channels each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("frequencies", _frequencies(width // 6), persistent=False)
        self.frequencies: Tensor

    def forward(self, d: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Coordinates ``(d,) (h,) (w,)`` to ``(d, h, w, width)``; channels left over are zero."""
        axes = torch.meshgrid(d, h, w, indexing="ij")
        angles = torch.cat([axis[..., None] * self.frequencies for axis in axes], dim=-1)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return F.pad(waves, (0, self.width - waves.shape[-1]))


class LearnedPositions(nn.Module):
    """A learned table over a reference grid, interpolated to any other (for inflated 2D towers)."""

    def __init__(self, width: int, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(*grid, width))

    def forward(self, d: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Coordinates ``(d,) (h,) (w,)`` to ``(d, h, w, width)``; only their number counts."""
        size = (len(d), len(h), len(w))
        if size == tuple(self.table.shape[:3]):
            return self.table
        coarse = rearrange(self.table, "d h w c -> 1 c d h w")
        table = F.interpolate(coarse, size=size, mode="trilinear", align_corners=False)
        return rearrange(table, "1 c d h w -> d h w c")


class RotaryPositions(nn.Module):
    """Rotation angles of queries and keys: attention then depends on relative position only."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.pairs = head_dim // 2
        self.register_buffer("frequencies", _frequencies(self.pairs // 3), persistent=False)
        self.frequencies: Tensor

    def forward(self, d: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Coordinates ``(d,) (h,) (w,)`` to angles ``(1, N, head_dim / 2)``; the rest stay 0."""
        axes = torch.meshgrid(d, h, w, indexing="ij")
        angles = torch.cat([axis[..., None] * self.frequencies for axis in axes], dim=-1)
        angles = rearrange(angles, "d h w c -> 1 (d h w) c")
        return F.pad(angles, (0, self.pairs - angles.shape[-1]))

    @staticmethod
    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        """Turn the pairs of ``(B, heads, P + N, head_dim)``; the first P tokens stay."""
        prefix = x.shape[2] - angles.shape[1]
        head, tail = x[:, :, :prefix], x[:, :, prefix:]
        a, b = tail.chunk(2, dim=-1)
        cos = angles.cos()[:, None].to(x.dtype)
        sin = angles.sin()[:, None].to(x.dtype)
        return torch.cat([head, torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)], dim=2)
