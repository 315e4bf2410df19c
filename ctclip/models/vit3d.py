"""ctclip's volume tower: a 3D vision transformer that keeps small findings.

B batch, C channels, D H W voxels; d h w patches; N = d*h*w tokens; M width; E embedding width.
Worked size: 240 x 480 x 480 in patches of 10 x 20 x 20 = 24 x 24 x 24 = 13,824 tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctclip.config import require_at_least
from ctclip.models.pooling import READOUTS, make_readout
from ctclip.models.positions import LearnedPositions, RotaryPositions, SinCosPositions, centred
from ctclip.models.stem import ConvStem, LinearStem

SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (128, 2, 4),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
"""Width, depth and heads by name: ViT-S, -B and -L of Dosovitskiy et al. 2021; tiny is for CPUs."""

LARGEST_INPUT = 10.0
"""Window values lie in [-1, 1]; noise and augmentation add a little, HU add a thousand."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The volume tower: what shapes its weights and its output."""

    size: Literal["tiny", "small", "base", "large"] = "small"
    """Named width, depth and heads; the next three override single values of it."""

    width: int | None = None
    depth: int | None = None
    heads: int | None = None

    channels: int = 1
    """HU windows of the input, one channel each."""

    patch: tuple[int, int, int] = (8, 24, 24)
    """Voxels a token covers, (depth, height, width)."""

    stem: Literal["linear", "conv"] = "conv"
    """``conv`` sees overlapping detail below the patch size; ``linear`` is the plain ViT's."""

    stem_edge: int = 4
    """Longest edge in voxels of the stem's first stage; 2 sees finer detail at a higher price."""

    stem_channels: int | None = None
    """Channels of that stage; a quarter of the width by default."""

    positions: Literal["sincos", "rotary", "learned"] = "sincos"

    position_step: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Distance between neighbouring patches in patches of pretraining: 0.5 after halving the voxel
    size at the same patch, so that an organ keeps its position."""

    position_grid: tuple[int, int, int] = (8, 14, 14)
    """Grid of the learned positions (``positions="learned"`` only); other grids interpolate it."""

    pooling: Literal["attention", "mean", "cls"] = "attention"

    queries: int = 8
    """Learned queries of attention pooling; each may watch for another kind of finding."""

    readouts: Literal[1, 2] = 1
    """2 gives sentences and prompts one read-out and whole reports another."""

    registers: int = 0
    """Extra tokens that hold global information and are thrown away (Darcet et al. 2024)."""

    patch_dropout: float = 0.0
    """Share of each token plane that is dropped in training, for larger batches."""

    slice_group: int = 0
    """Token planes that attend to each other in local blocks; 0 makes every block see the scan."""

    inflate_from: str | None = None
    """timm name or local file of a 2D vision transformer to start from, see
    :mod:`ctclip.models.inflate`."""

    full_every: int = 3
    """With ``slice_group``: every n-th block attends to the whole scan, others to groups."""

    def __post_init__(self) -> None:
        counts = ("width", "depth", "heads", "channels", "patch", "stem_edge", "stem_channels")
        require_at_least(self, "vision.", 1, *counts, "position_grid", "queries", "full_every")
        require_at_least(self, "vision.", 0, "registers", "slice_group")
        if not all(0.0 < step < math.inf for step in self.position_step):
            raise ValueError(f"vision.position_step must be positive, got {self.position_step}")
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"vision.patch_dropout must be in [0, 1), got {self.patch_dropout}")
        width, _, heads = self.shape
        if width % (2 * heads):
            raise ValueError(
                f"vision.width ({width}) must be a multiple of twice vision.heads ({heads})"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and heads, after the overrides."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    def grid(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along each axis for an input of ``size`` voxels (padded up to whole patches)."""
        d, h, w = (-(-voxels // edge) for voxels, edge in zip(size, self.patch, strict=True))
        return d, h, w


class Attention(nn.Module):
    """Multi-head self-attention through PyTorch's fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Attend over ``(B, N, M)``; ``rotation`` covers the last tokens, after any prefix."""
        q, k, v = rearrange(self.qkv(x), "b n (three g c) -> three b g n c", three=3, g=self.heads)
        if rotation is not None:
            q, k = RotaryPositions.rotate(q, rotation), RotaryPositions.rotate(k, rotation)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b g n c -> b n (g c)"))


class Block(nn.Module):
    """Pre-norm transformer block that attends to the whole scan or within groups of slices."""

    def __init__(self, width: int, heads: int, slice_group: int = 0) -> None:
        super().__init__()
        self.slice_group = slice_group
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, planes: int, prefix: int, rotation: Tensor | None) -> Tensor:
        """Update ``(B, prefix + planes * k, M)``, the prefix tokens first."""
        y = self.norm1(x)
        if 0 < self.slice_group < planes:
            x = x + self._attend_in_groups(y, planes, prefix, rotation)
        else:
            x = x + self.attn(y, rotation)
        return x + self.mlp(self.norm2(x))

    def _attend_in_groups(
        self, y: Tensor, planes: int, prefix: int, rotation: Tensor | None
    ) -> Tensor:
        """Every group sees its own planes and the prefix; the prefix averages over the groups."""
        head, patches = y[:, :prefix], rearrange(y[:, prefix:], "b (d k) c -> b d k c", d=planes)
        if rotation is not None:
            rotation = rearrange(rotation.expand(len(y), -1, -1), "b (d k) c -> b d k c", d=planes)
        whole = planes // self.slice_group
        parts, head_sum = [], torch.zeros_like(head)
        # Groups of equal size go through together; a scan's last planes may form a smaller one.
        for groups, start, size in (
            (whole, 0, self.slice_group),
            (1, whole * self.slice_group, planes % self.slice_group),
        ):
            if size == 0:
                continue
            cut = slice(start, start + groups * size)
            part = rearrange(patches[:, cut], "b (g s) k c -> (b g) (s k) c", g=groups)
            part = torch.cat([head.repeat_interleave(groups, dim=0), part], dim=1)
            turn = None
            if rotation is not None:
                turn = rearrange(rotation[:, cut], "b (g s) k c -> (b g) (s k) c", g=groups)
            part = rearrange(self.attn(part, turn), "(b g) n c -> b g n c", g=groups)
            head_sum = head_sum + part[:, :, :prefix].sum(dim=1)
            parts.append(part[:, :, prefix:].flatten(1, 2))
        groups = whole + (planes % self.slice_group > 0)
        return torch.cat([head_sum / groups, *parts], dim=1)


class ViT3D(nn.Module):
    """Volume to embedding, with as many read-outs as asked for and patch embeddings beside them.

    Args:
        embed_dim: Width of the joint space.
        width: Token width.
        depth: Transformer blocks.
        heads: Attention heads.
        channels: Input channels (HU windows).
        patch: Voxels of a token, (depth, height, width).
        stem: ``"linear"`` or ``"conv"``.
        stem_edge: Longest edge of the convolutional stem's first stage.
        stem_channels: Channels of that stage; ``None`` for ``width // 4``.
        positions: ``"sincos"``, ``"rotary"`` or ``"learned"``.
        position_step: Distance of neighbouring patches in patches of pretraining.
        position_grid: Grid of learned positions.
        pooling: ``"attention"``, ``"mean"`` or ``"cls"``.
        queries: Queries of attention pooling.
        readouts: 1, or 2 for separate prompt and report embeddings.
        registers: Number of register tokens.
        patch_dropout: Share of tokens dropped in training.
        slice_group: Token planes of a local block's group, 0 for full attention only.
        full_every: Every n-th block is a full one when there are groups.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 512,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        channels: int = 1,
        patch: tuple[int, int, int] = (8, 24, 24),
        stem: Literal["linear", "conv"] = "conv",
        stem_edge: int = 4,
        stem_channels: int | None = None,
        positions: Literal["sincos", "rotary", "learned"] = "sincos",
        position_step: tuple[float, float, float] = (1.0, 1.0, 1.0),
        position_grid: tuple[int, int, int] = (8, 14, 14),
        pooling: Literal["attention", "mean", "cls"] = "attention",
        queries: int = 8,
        readouts: Literal[1, 2] = 1,
        registers: int = 0,
        patch_dropout: float = 0.0,
        slice_group: int = 0,
        full_every: int = 3,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.channels = channels
        self.patch = patch
        self.patch_dropout = patch_dropout
        self.position_step = position_step
        self.grad_checkpointing = False

        if stem == "conv":
            self.stem: nn.Module = ConvStem(channels, self.patch, width, stem_edge, stem_channels)
        else:
            self.stem = LinearStem(channels, self.patch, width)
        self.positions: SinCosPositions | LearnedPositions | None = None
        if positions == "sincos":
            self.positions = SinCosPositions(width)
        elif positions == "learned":
            self.positions = LearnedPositions(width, position_grid)
        self.rotary = RotaryPositions(width // heads) if positions == "rotary" else None

        names = READOUTS[:readouts]
        self.num_registers = registers
        self.num_prefix = registers + (len(names) if pooling == "cls" else 0)
        self.prefix: nn.Parameter | None = None
        if self.num_prefix:
            self.prefix = nn.Parameter(0.02 * torch.randn(self.num_prefix, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, 0 if (i + 1) % full_every == 0 else slice_group)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.readouts = nn.ModuleDict(
            {
                name: make_readout(pooling, width, embed_dim, heads, queries, token=i)
                for i, name in enumerate(names)
            }
        )
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_config(cls, config: VisionConfig, embed_dim: int) -> "ViT3D":
        """Build the tower that a config describes."""
        width, depth, heads = config.shape
        return cls(
            embed_dim=embed_dim,
            width=width,
            depth=depth,
            heads=heads,
            channels=config.channels,
            patch=config.patch,
            stem=config.stem,
            stem_edge=config.stem_edge,
            stem_channels=config.stem_channels,
            positions=config.positions,
            position_step=config.position_step,
            position_grid=config.position_grid,
            pooling=config.pooling,
            queries=config.queries,
            readouts=config.readouts,
            registers=config.registers,
            patch_dropout=config.patch_dropout,
            slice_group=config.slice_group,
            full_every=config.full_every,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stem and blocks in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def compile_blocks(self) -> None:
        """``torch.compile`` each block in place: whichever way a volume is read, it passes them."""
        for block in self.blocks:
            block.compile()

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Run the transformer.

        Args:
            image: ``(B, C, D, H, W)`` in [-1, 1]. A size that isn't a multiple of the patch is
                padded evenly with -1, the low end of the window (air).

        Returns:
            ``(B, prefix + N, M)`` normalised tokens, the prefix (CLS, registers) first, and the
            grid ``(d, h, w)`` that the N tokens come from (fewer remain under patch dropout).
        """
        check_volumes(image, self)
        x = self._stem_tokens(_pad_to_patches(image, self.patch))
        batch, d, h, w, _ = x.shape
        where = [
            centred(n, step, device=x.device)
            for n, step in zip((d, h, w), self.position_step, strict=True)
        ]
        if self.positions is not None:
            x = x + self.positions(*where).to(x.dtype)
        x = rearrange(x, "b d h w c -> b d (h w) c")
        rotation = self.rotary(*where) if self.rotary is not None else None
        if self.training and self.patch_dropout > 0:
            x, rotation = self._drop(x, rotation)
        x = x.flatten(1, 2)
        if self.prefix is not None:
            x = torch.cat([self.prefix.to(x.dtype).expand(batch, -1, -1), x], dim=1)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, d, self.num_prefix, rotation, use_reentrant=False)
            else:
                x = block(x, d, self.num_prefix, rotation)
        return self.norm(x), (d, h, w)

    def _stem_tokens(self, image: Tensor) -> Tensor:
        """Voxels to ``(B, d, h, w, M)``; with checkpointing a volume at a time.

        The stem's first stages are larger than all blocks together.
        """
        if not (self.grad_checkpointing and self.training):
            return self.stem(image)
        volumes = [checkpoint(self.stem, volume, use_reentrant=False) for volume in image.split(1)]
        return torch.cat(volumes)

    def _drop(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Keep the same number of random tokens in every plane, so that slice groups stay even."""
        batch, d, k, _ = x.shape
        kept = max(1, round(k * (1.0 - self.patch_dropout)))
        index = torch.rand(batch, d, k, device=x.device).argsort(dim=-1)[..., :kept, None]
        x = torch.take_along_dim(x, index, dim=2)
        if rotation is not None:
            rotation = rearrange(rotation, "one (d k) c -> one d k c", d=d)
            rotation = torch.take_along_dim(rotation, index, dim=2).flatten(1, 2)
        return x, rotation

    def forward_readouts(self, image: Tensor) -> dict[str, Tensor]:
        """Every read-out of a batch: ``{"prompt": (B, E)}``, ``"report"`` too if there are two."""
        x, _ = self.tokens(image)
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        return {name: readout(prefix, patches) for name, readout in self.readouts.items()}

    def forward(self, image: Tensor) -> Tensor:
        """The embedding that prompts are compared with, ``(B, E)``, not normalised."""
        return self.forward_readouts(image)["prompt"]

    def patches(self, image: Tensor) -> Tensor:
        """Embeddings of single patches in the joint space.

        With mean and attention pooling they are the exact share of each patch: their mean over the
        patches *is* the embedding of :meth:`forward`, so a prompt's score splits over regions
        without a remainder. With CLS pooling there is no such split and each normalised token is
        projected as the CLS token is.

        Args:
            image: ``(B, C, D, H, W)`` in [-1, 1].

        Returns:
            ``(B, d, h, w, E)``, not normalised.

        Raises:
            ValueError: In training mode with patch dropout.
        """
        if self.training and self.patch_dropout > 0:
            raise ValueError("patch embeddings need every patch: call model.eval() first")
        x, (d, h, w) = self.tokens(image)
        shares = self.readouts[
            "prompt"
        ].shares(  # type: ignore[operator]
            x[:, self.num_prefix :]
        )
        return rearrange(shares, "b (d h w) e -> b d h w e", d=d, h=h, w=w)


def check_volumes(image: Tensor, tower: nn.Module) -> None:
    """Refuse a batch that can't be the windowed volumes that a tower expects, in words.

    It stands in the towers, so that other programs which build them (open_clip) pass it too. The
    values are left out in a compiled graph, which looking at them would break, and in training on a
    GPU, where the host would wait for all that it has been given to do.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it isn't ``(B, C, D, H, W)`` with the tower's channels, or its type or values
            can't be those of windowed volumes.
    """
    if not isinstance(image, Tensor):
        raise TypeError(
            f"expected a tensor (B, C, D, H, W), got {type(image).__name__}; torch.as_tensor makes "
            "one of an array"
        )
    shape = f"{tuple(image.shape)} (B, C, D, H, W)"
    if image.ndim != 5:
        raise ValueError(
            f"expected a batch of volumes (B, C, D, H, W), got shape {tuple(image.shape)}; "
            "a single volume needs volume[None]"
        )
    if image.shape[1] != tower.channels:
        raise ValueError(
            f"expected {tower.channels} channel(s), one for each HU window of the model, got "
            f"{image.shape[1]} in shape {shape}"
        )
    if 0 in image.shape[2:]:
        raise ValueError(f"volumes of shape {shape} hold no voxels; look at what was cropped")
    if torch.compiler.is_compiling():
        return
    expected = next(tower.parameters()).dtype
    mixed = (torch.float32, torch.bfloat16, torch.float16)  # what autocast turns into its own
    if image.dtype != expected and not (
        image.dtype in mixed and torch.is_autocast_enabled(image.device.type)
    ):
        raise ValueError(
            f"volumes are {image.dtype}, the model computes in {expected}; use image.to({expected})"
        )
    if image.is_meta or image.numel() == 0 or (image.is_cuda and tower.training):
        return
    low, high = torch.stack(torch.aminmax(image.detach())).tolist()
    if math.isnan(low) or math.isinf(high - low):
        raise ValueError(
            "the volume holds NaN or infinite values; look at the scan with ctclip-inspect"
        )
    if max(-low, high) > LARGEST_INPUT:
        raise ValueError(
            f"voxels range from {low:g} to {high:g}; the model takes windowed values in "
            "[-1, 1]. These look like HU: apply ctclip.data.volume.window first"
        )


def _pad_to_patches(image: Tensor, patch: tuple[int, int, int]) -> Tensor:
    missing = [-size % edge for size, edge in zip(image.shape[2:], patch, strict=True)]
    if not any(missing):
        return image
    (d, h, w) = missing
    sides = (w // 2, w - w // 2, h // 2, h - h // 2, d // 2, d - d // 2)
    return F.pad(image, sides, value=-1.0)
