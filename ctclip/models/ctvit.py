"""CT-ViT as CT-CLIP uses it (Hamamci et al. 2024), number for number, so that its weights run here.

B batch; t h w token grid (slices, rows, columns); M width; E embedding width; K codes.
Worked size: 240 x 480 x 480 in patches of 10 x 20 x 20 = 24 x 24 x 24 = 13,824 tokens of 512.

Several steps look like slips of the original. Released weights were trained with them, so they stay
and each says so where it happens. They live in this module only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctclip import distributed
from ctclip.config import require_at_least
from ctclip.models.vit3d import check_volumes

LOGIT_SCALE = 8.0
"""Fixed factor on cosine attention, in place of ``head_dim ** -0.5``."""

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 65_536}
"""Tokens that inference takes through a layer, or compares with the codebook, in one go. On a CPU
34 MB of similarities, which stay in cache, instead of 450 MB at the real size; a GPU wants more."""


@dataclass(frozen=True, kw_only=True)
class CTViTConfig:
    """CT-CLIP's volume tower; the defaults are those of the released weights."""

    image_size: tuple[int, int] = (480, 480)
    """Height and width; the projection is tied to them. Depth is free."""

    patch: tuple[int, int, int] = (10, 20, 20)
    width: int = 512
    spatial_depth: int = 4
    temporal_depth: int = 4
    heads: int = 8
    head_dim: int = 32
    codes: int = 8192
    channels: int = 1

    def __post_init__(self) -> None:
        counts = ("image_size", "patch", "width", "spatial_depth", "temporal_depth", "heads")
        require_at_least(self, "ctvit.", 1, *counts, "head_dim", "codes", "channels")
        if self.image_size[0] % self.patch[1] or self.image_size[1] % self.patch[2]:
            raise ValueError(
                f"ctvit.image_size {self.image_size} must be a multiple of the patch's height and "
                f"width {self.patch[1:]}"
            )

    def grid(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along each axis for a volume of ``size`` voxels."""
        d, h, w = (voxels // edge for voxels, edge in zip(size, self.patch, strict=True))
        return d, h, w


def in_slices(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a token-wise function to ``(b, n, M)`` a slice at a time where nothing is kept.

    The widest intermediate of inference is then a few MB instead of hundreds, and stays in cache.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    flat = x.reshape(-1, x.shape[-1])
    parts = [function(part) for part in flat.split(_tokens_at_once(x))]
    return torch.cat(parts).reshape(*x.shape[:-1], -1)


@contextmanager
def _without_autocast() -> Iterator[None]:
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def _tokens_at_once(x: Tensor) -> int:
    return TOKENS_AT_ONCE.get(x.device.type, TOKENS_AT_ONCE["cpu"])


class Attention(nn.Module):
    """Cosine attention over ``(B, N, M)``."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.q_scale = nn.Parameter(torch.ones(head_dim))
        self.k_scale = nn.Parameter(torch.ones(head_dim))
        self.proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend; ``bias`` is ``(heads, N, N)``."""
        # Keys and values come from x itself, only queries from its norm. Released weights need it.
        q = rearrange(self.to_q(self.norm(x)), "b n (g c) -> b g n c", g=self.heads)
        k, v = rearrange(self.to_kv(x), "b n (two g c) -> two b g n c", two=2, g=self.heads)
        q = F.normalize(q, dim=-1) * self.q_scale
        k = F.normalize(k, dim=-1) * self.k_scale
        if bias is not None:
            bias = bias.to(q.dtype)[None]  # four axes: the fused kernel takes no mask of three
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=LOGIT_SCALE)
        return self.proj(rearrange(x, "b g n c -> b n (g c)"))


class GatedMLP(nn.Module):
    """Feed-forward layer with a GELU gate; value first, gate second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = int(4 * (2 / 3) * width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * inner, bias=False)
        self.fc2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., M)`` to ``(..., M)``."""
        return in_slices(self._tokenwise, x)

    def _tokenwise(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(self.norm(x)).chunk(2, dim=-1)
        return self.fc2(value * F.gelu(gate))


class PositionConvolution(nn.Module):
    """Depth-wise 3x3x3 convolution that tells tokens where they are; causal along its first axis.

    The tokens are always laid out as ``(t, h, w)``, whatever their order. Between spatial blocks
    that is right. Between temporal blocks the order is (row, column, slice), so the convolution
    runs over (row, column, slice) of a cube and over a real scramble of anything else, causal
    along image rows. Released weights need it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, kernel_size=3, groups=width)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens ``(b, n, M)``, any split of ``B * t * h * w``, to the same shape."""
        t, h, w = grid
        y = x.reshape(-1, t, h, w, x.shape[-1])
        y = self.conv(F.pad(rearrange(y, "b t h w c -> b c t h w"), (1, 1, 1, 1, 2, 0)))
        return rearrange(y, "b c t h w -> b t h w c").reshape(x.shape)


class Block(nn.Module):
    """Position convolution, attention and feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.position = PositionConvolution(width)
        self.attn = Attention(width, heads, head_dim)
        self.mlp = GatedMLP(width)

    def forward(self, x: Tensor, grid: tuple[int, int, int], bias: Tensor | None) -> Tensor:
        """``(b, n, M)`` to the same shape."""
        x = x + self.position(x, grid)
        x = x + self.attn(x, bias)
        return x + self.mlp(x)


class OffsetBias(nn.Module):
    """Attention bias that a small network computes from the offset between two tokens.

    It is evaluated for the ``(2h-1)(2w-1)`` distinct offsets and gathered, where the original
    evaluates all ``(hw)^2`` pairs: the same numbers for 1/150 of the work at 24 x 24.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width),
            nn.LeakyReLU(0.1),
            nn.Linear(width, width),
            nn.LeakyReLU(0.1),
            nn.Linear(width, heads),
        )

    def forward(self, h: int, w: int) -> Tensor:
        """Bias ``(heads, h*w, h*w)``, row-major tokens, always fp32."""
        device = next(self.parameters()).device
        rows = torch.arange(1 - h, h, device=device, dtype=torch.float32)
        columns = torch.arange(1 - w, w, device=device, dtype=torch.float32)
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        with _without_autocast():
            table = self.net(offsets.sign() * offsets.abs().log1p()).flatten(0, 1)
        i = torch.arange(h, device=device)
        j = torch.arange(w, device=device)
        row = i[:, None, None, None] - i[None, None, :, None] + h - 1
        column = j[None, :, None, None] - j[None, None, None, :] + w - 1
        index = (row * (2 * w - 1) + column).reshape(h * w, h * w)
        # The fused kernels of GPUs take a mask only if its last axis is dense.
        return rearrange(table[index], "i j g -> g i j").contiguous()


class Codebook(nn.Module):
    """Replaces each token by the stored code of nearest direction.

    Attributes:
        decay: Share of a code kept at each training step; 1.0 (a frozen tower) keeps it for good.
    """

    def __init__(self, codes: int, width: int, decay: float = 0.8) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("embed", F.normalize(torch.randn(codes, width), dim=-1))
        self.register_buffer("usage", torch.zeros(codes))
        self.embed: Tensor
        self.usage: Tensor

    def nearest(self, tokens: Tensor) -> Tensor:
        """Index of the code for each of ``(..., M)``, in float32 also under autocast.

        The similarities are made a slice at a time, and one-hot matrices never: together those
        take 1.7 GB for one volume in the original.
        """
        flat = tokens.detach().float().reshape(-1, tokens.shape[-1])
        with _without_autocast():
            directions = F.normalize(self.embed, dim=-1)
            ids = [
                (F.normalize(part, dim=-1) @ directions.T).argmax(dim=-1)
                for part in flat.split(_tokens_at_once(flat))
            ]
        return torch.cat(ids).reshape(tokens.shape[:-1])

    def forward(self, tokens: Tensor) -> Tensor:
        """Codes of ``(..., M)``; in training the gradient passes as if nothing had happened."""
        ids = self.nearest(tokens)
        # The stored row, not its direction: rows are shorter than 1 after training. Released
        # weights need it.
        codes = F.embedding(ids, self.embed)
        if not self.training:
            return codes.to(tokens.dtype)
        if self.decay < 1.0:
            self._follow(tokens.detach(), ids)
        return tokens + (codes - tokens).detach()

    @torch.no_grad()
    def _follow(self, tokens: Tensor, ids: Tensor) -> None:
        """Move codes towards the mean direction of their tokens, over all processes."""
        directions = F.normalize(tokens.float().reshape(-1, tokens.shape[-1]), dim=-1)
        totals = torch.zeros_like(self.embed).index_add_(0, ids.flatten(), directions)
        used = totals.new_zeros(len(totals))
        used.index_add_(0, ids.flatten(), torch.ones_like(directions[:, 0]))
        if distributed.world_size() > 1:
            totals = distributed.gather(totals[None]).sum(dim=0)
            used = distributed.gather(used[None]).sum(dim=0)
        # An unused code moves towards its own direction.
        means = torch.where(used[:, None] > 0, totals / used.clamp(min=1)[:, None], self.embed)
        # Rebinding keeps the codes that this step's graph refers to.
        self.embed = self.embed.lerp(F.normalize(means, dim=-1), 1.0 - self.decay)
        self.usage = self.usage * self.decay + used * (1.0 - self.decay)


class CTViT(nn.Module):
    """CT-CLIP's volume tower with its projection.

    Args:
        embed_dim: E.
        image_size: Height and width in voxels.
        patch: Voxels of a token, (depth, height, width).
        width: M.
        spatial_depth: Blocks that attend within a slice of tokens.
        temporal_depth: Blocks that attend along the body.
        heads: Attention heads.
        head_dim: Width of a head.
        codes: K.
        channels: Input channels.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 512,
        image_size: tuple[int, int] = (480, 480),
        patch: tuple[int, int, int] = (10, 20, 20),
        width: int = 512,
        spatial_depth: int = 4,
        temporal_depth: int = 4,
        heads: int = 8,
        head_dim: int = 32,
        codes: int = 8192,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.channels = channels
        self.patch = patch
        self.image_size = tuple(image_size)
        self.grad_checkpointing = False
        voxels = channels * patch[0] * patch[1] * patch[2]
        self.stem = nn.Sequential(
            nn.LayerNorm(voxels), nn.Linear(voxels, width), nn.LayerNorm(width)
        )
        self.offset_bias = OffsetBias(width, heads)
        self.spatial = nn.ModuleList(Block(width, heads, head_dim) for _ in range(spatial_depth))
        self.spatial_norm = nn.LayerNorm(width, bias=False)
        self.temporal = nn.ModuleList(Block(width, heads, head_dim) for _ in range(temporal_depth))
        self.temporal_norm = nn.LayerNorm(width, bias=False)
        self.codebook = Codebook(codes, width)
        self.grid_hw = (image_size[0] // patch[1], image_size[1] // patch[2])
        # One weight for each place of the flattened grid: 151 M of them, and the in-plane size is
        # fixed. Released weights need it.
        self.proj = nn.Linear(self.grid_hw[0] * self.grid_hw[1] * width, embed_dim, bias=False)

    @classmethod
    def from_config(cls, config: CTViTConfig, embed_dim: int) -> "CTViT":
        """Build the tower that a config describes."""
        return cls(
            embed_dim=embed_dim,
            image_size=config.image_size,
            patch=config.patch,
            width=config.width,
            spatial_depth=config.spatial_depth,
            temporal_depth=config.temporal_depth,
            heads=config.heads,
            head_dim=config.head_dim,
            codes=config.codes,
            channels=config.channels,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stem and blocks in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def compile_blocks(self) -> None:
        """``torch.compile`` each block in place."""
        for block in (*self.spatial, *self.temporal):
            block.compile()

    def continuous_tokens(self, image: Tensor) -> Tensor:
        """Tokens ``(B, t, h, w, M)`` before the codebook.

        Raises:
            ValueError: If the volume's size isn't one that this tower can take.
        """
        check_volumes(image, self)
        if tuple(image.shape[3:]) != self.image_size or image.shape[2] % self.patch[0]:
            raise ValueError(
                f"CT-ViT takes volumes of {self.image_size[0]} x {self.image_size[1]} voxels and a "
                f"depth that is a multiple of {self.patch[0]}, got (B, C, D, H, W) = "
                f"{tuple(image.shape)}; prepare volumes with the checkpoint's own settings"
            )
        batch, t, (h, w) = len(image), image.shape[2] // self.patch[0], self.grid_hw
        x = self._run(self._embed, image)
        bias = self.offset_bias(h, w)
        for block in self.spatial:
            x = self._run(block, x, (t, h, w), bias)
        x = rearrange(self.spatial_norm(x), "(b t) n c -> (b n) t c", b=batch)
        for block in self.temporal:
            x = self._run(block, x, (t, h, w), None)
        return rearrange(self.temporal_norm(x), "(b h w) t c -> b t h w c", b=batch, h=h, w=w)

    def _embed(self, image: Tensor) -> Tensor:
        """Patches ``(b t) (h w) M`` of a batch; in inference one layer of patches after another."""
        pt, ph, pw = self.patch
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
        slabs = [image] if whole else image.split(pt, dim=2)
        patches = [
            self.stem(
                rearrange(
                    slab, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw
                )
            )
            for slab in slabs
        ]
        return torch.cat(patches, dim=1).flatten(0, 1)

    def _run(self, module: Callable[..., Tensor], *args: object) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(module, *args, use_reentrant=False)  # type: ignore[return-value]
        return module(*args)

    def tokens(self, image: Tensor) -> Tensor:
        """Tokens ``(B, t, h, w, M)`` as CT-CLIP uses them: after the codebook.

        The original means to train on continuous tokens but returns quantised ones, and its
        projection learned from those. Released weights need it.
        """
        return self.codebook(self.continuous_tokens(image))

    def forward(self, image: Tensor) -> Tensor:
        """Embed ``(B, C, D, H, W)`` in [-1, 1] into ``(B, E)``, not normalised."""
        return self.proj(self.tokens(image).mean(dim=1).flatten(1))

    def forward_readouts(self, image: Tensor) -> dict[str, Tensor]:
        """The one embedding, by the name that our own tower gives it."""
        return {"prompt": self(image)}

    def patches(self, image: Tensor) -> Tensor:
        """Share ``(B, t, h, w, E)`` of every patch; their mean is the embedding exactly."""
        x = self.tokens(image)
        h, w = self.grid_hw
        weight = rearrange(self.proj.weight, "e (h w c) -> (h w) c e", h=h, w=w)
        batch = len(x)
        shares = torch.bmm(rearrange(x, "b t h w c -> (h w) (b t) c"), weight) * (h * w)
        return rearrange(shares, "(h w) (b t) e -> b t h w e", b=batch, h=h)
