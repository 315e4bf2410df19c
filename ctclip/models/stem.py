"""From voxels to tokens ``(B, d, h, w, M)``: one linear map, or a small convolutional pyramid."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class LinearStem(nn.Module):
    """Every patch flattened and mapped by one matrix, as in a plain ViT.

    Reshape and matrix product: the same numbers as a strided ``Conv3d`` in half its time on a CPU.
    """

    def __init__(self, channels: int, patch: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch[0] * patch[1] * patch[2], width)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, D, H, W)``, a multiple of the patch, to ``(B, d, h, w, M)``."""
        pd, ph, pw = self.patch
        return self.proj(
            rearrange(
                image,
                "b c (d pd) (h ph) (w pw) -> b d h w (c pd ph pw)",
                pd=pd,
                ph=ph,
                pw=pw,
            )
        )


def strides(
    patch: tuple[int, int, int], longest: int
) -> tuple[tuple[int, int, int], list[tuple[int, int, int]]]:
    """Split a patch into a short first edge and stride-2 stages, axis by axis.

    Returns:
        The first stage's edges and the strides of the later ones; their product is the patch. An
        odd factor stays in the first edge: (10, 20, 20) gives (5, 5, 5), (2, 2, 2), (1, 2, 2).
    """
    (d, d_halvings), (h, h_halvings), (w, w_halvings) = (_halve(edge, longest) for edge in patch)
    stages = [
        (1 + (i < d_halvings), 1 + (i < h_halvings), 1 + (i < w_halvings))
        for i in range(max(d_halvings, h_halvings, w_halvings))
    ]
    return (d, h, w), stages


def _halve(edge: int, longest: int) -> tuple[int, int]:
    """Halve an edge while it is even and longer than ``longest``; also how often."""
    count = 0
    while edge % 2 == 0 and edge > longest:
        edge, count = edge // 2, count + 1
    return edge, count


class ConvStem(nn.Module):
    """Small non-overlapping patches, then overlapping stride-2 convolutions up to the token.

    A lesion of a few voxels is seen by filters of its own scale before anything is averaged over a
    patch that is tens of times larger. The first stage doesn't overlap: convolving at full
    resolution would cost more than the transformer behind it.
    """

    def __init__(
        self,
        channels: int,
        patch: tuple[int, int, int],
        width: int,
        longest_edge: int = 4,
        first_channels: int | None = None,
    ) -> None:
        super().__init__()
        edges, stages = strides(patch, longest_edge)
        narrow = first_channels or max(width // 4, 16)
        widths = [min(width, narrow * 2**i) for i in range(len(stages))] + [width]
        self.first = LinearStem(channels, edges, widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(
                _GroupNorm(_groups(before), before),
                nn.GELU(),
                nn.Conv3d(before, after, kernel_size=3, stride=stride, padding=1),
            )
            for before, after, stride in zip(widths[:-1], widths[1:], stages, strict=True)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # oneDNN's channels-last convolutions are the fast ones, on CPUs and on tensor cores.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, D, H, W)``, a multiple of the patch, to ``(B, d, h, w, M)``."""
        # A permuted channels-last tensor is already in channels_last_3d memory: nothing moves.
        x = rearrange(self.first(image), "b d h w c -> b c d h w")
        # On a CPU without bf16 instructions oneDNN returns garbage, NaN or huge, as the bf16
        # gradient of these weights (torch 2.15). So CPUs convolve in the weights' own type; CPU
        # autocast is nothing to a GPU.
        with torch.autocast("cpu", enabled=False):
            if x.device.type == "cpu":
                x = x.to(self.norm.weight.dtype)
            for stage in self.stages:
                x = stage(x)
        return self.norm(rearrange(x, "b c d h w -> b d h w c"))


class _GroupNorm(nn.GroupNorm):
    """Group norm in the type of its input; PyTorch takes its statistics in float32 all the same.

    Autocast would make it float32, twice the memory for a stem's largest tensors, and PyTorch's
    kernel for GPUs gives up the channels-last layout that the convolution behind it wants.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            y = F.group_norm(x, self.num_groups, weight, bias, self.eps)
        return y.contiguous(memory_format=torch.channels_last_3d)


def _groups(channels: int) -> int:
    """Groups of 16 channels where that divides, else one group."""
    return channels // 16 if channels % 16 == 0 else 1
