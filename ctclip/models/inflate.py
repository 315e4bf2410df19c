"""Start a 3D tower from a 2D vision transformer.

Each 2D filter is spread evenly over the slices of a patch ("average" inflation), so a patch whose
slices are all alike gives the 2D network's own token; everything behind the stem is copied.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ctclip.models.positions import LearnedPositions
from ctclip.models.stem import LinearStem
from ctclip.models.vit3d import ViT3D
from ctclip.models.weights import read_weights

_BEHIND = ("head.", "head_dist.", "fc_norm.", "attn_pool.", "pre_logits.")
"""What reads a 2D network's tokens; our own read-outs stand in its place."""

logger = logging.getLogger(__name__)


def inflate_from(tower: ViT3D, name_or_path: str) -> None:
    """Fill a tower from a timm model's pretrained weights or from a local file of them.

    Args:
        tower: Changed in place; see :func:`inflate`.
        name_or_path: For example ``vit_small_patch16_224.augreg_in21k``, or a ``.safetensors`` or
            ``.pth`` file with timm's key names. A file doesn't tell its number of heads: give the
            tower the same.

    Raises:
        FileNotFoundError: If a file is named that doesn't exist.
        ValueError: If the weights don't fit the tower.
    """
    import timm

    path = Path(name_or_path)
    if path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path} to inflate; give a timm name or a local file")
        inflate(tower, _state(read_weights(path), path), source=str(path))
        return
    try:
        vit = timm.create_model(name_or_path, pretrained=True)
    except RuntimeError as error:
        raise ValueError(
            f"timm has no model {name_or_path!r} with weights ({error}); timm.list_pretrained() "
            "lists them"
        ) from None
    attention = getattr(next(iter(getattr(vit, "blocks", [None]))), "attn", None)
    own: Any = tower.blocks[0]
    heads = getattr(attention, "num_heads", own.attn.heads)
    if heads != own.attn.heads:
        raise ValueError(
            f"{name_or_path} has {heads} heads, the tower {own.attn.heads}; set vision.heads to "
            "its own"
        )
    known: Any = vit.pretrained_cfg
    inflate(tower, vit.state_dict(), mean=known["mean"], std=known["std"], source=name_or_path)


def _state(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights in a file, out of the dictionaries and prefixes that trainers put around them."""
    for outer in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(outer), dict):
            content = content[outer]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary of weights")
    return {
        str(key).removeprefix("module."): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def inflate(
    tower: ViT3D,
    state: dict[str, Tensor],
    *,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    source: str = "the 2D transformer",
) -> None:
    """Copy a 2D vision transformer into a 3D one of equal width and depth.

    With a linear stem and learned positions a volume of equal slices keeps the 2D network's tokens
    for the grey image: on one plane of patches if the tower has as many prefix tokens (CLS pooling,
    or a register for the CLS token), and on any number if neither has any. With both, each further
    plane repeats the patches and not the prefix, which attention then weighs less. Other positions
    and the convolutional stem have no 2D counterpart and keep their own start.

    Args:
        tower: Changed in place.
        state: Weights under timm's names.
        mean: Of the 2D network's input, RGB in [0, 1].
        std: Likewise.
        source: What errors call it.

    Raises:
        ValueError: If ``state`` is no vision transformer, is of another size, or holds weights that
            act on its tokens and have no place in the tower.
    """
    blocks = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=-1)
    if "patch_embed.proj.weight" not in state or blocks == 0:
        raise ValueError(f"{source} holds no vision transformer under timm's names")
    width = state["patch_embed.proj.weight"].shape[0]
    if (width, blocks) != (tower.norm.weight.shape[0], len(tower.blocks)):
        raise ValueError(
            f"{source} is {width} wide and {blocks} blocks deep, the tower is "
            f"{tower.norm.weight.shape[0]} wide and {len(tower.blocks)} deep; set vision.width and "
            "vision.depth to its own"
        )
    own = {
        f"blocks.{i}.{name}": value.shape
        for i, block in enumerate(tower.blocks)
        for name, value in block.state_dict().items()
    } | {f"norm.{name}": value.shape for name, value in tower.norm.state_dict().items()}
    scales = {f"blocks.{i}.ls{j}.gamma" for i in range(blocks) for j in (1, 2)}
    start = {f"patch_embed.proj.{p}" for p in ("weight", "bias")}
    known = {*own, *scales, *start, "cls_token", "reg_token", "pos_embed"}
    problems = [f"it lacks {key}" for key in own if key not in state]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(shape)}"
        for key, shape in own.items()
        if key in state and state[key].shape != shape
    ]
    problems += [f"{k} has no place" for k in state if k not in known and not k.startswith(_BEHIND)]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{source} is not a plain vision transformer, and would give other features here: "
            f"{'; '.join(problems[:3])}{more}; take one such as vit_small_patch16_224 or DINOv2"
        )
    prefix, grid = _prefix_and_grid(state, source)
    if isinstance(tower.stem, LinearStem):
        _copy_stem(tower.stem, state, torch.tensor(mean), torch.tensor(std))
    if isinstance(tower.positions, LearnedPositions) and grid is not None:
        _copy_positions(tower.positions, grid)
    _copy_prefix(tower, prefix, classes=int("cls_token" in state), source=source)
    for i, block in enumerate(tower.blocks):
        names = {k: f"blocks.{i}.{k}" for k in block.state_dict()}
        block.load_state_dict({k: _scaled(state, name) for k, name in names.items()})
    tower.norm.load_state_dict({k: state[f"norm.{k}"] for k in ("weight", "bias")})


def _scaled(state: dict[str, Tensor], name: str) -> Tensor:
    """A block's weight, with LayerScale (DINOv2) folded into the layer before it."""
    block = name.rsplit(".", 3)[0] if name.count(".") == 4 else name.rsplit(".", 2)[0]
    scales = {"attn.proj": f"{block}.ls1.gamma", "mlp.fc2": f"{block}.ls2.gamma"}
    for layer, gamma in scales.items():
        if layer in name and gamma in state:
            return state[name] * state[gamma].reshape(-1, *[1] * (state[name].ndim - 1))
    return state[name]


def _prefix_and_grid(state: dict[str, Tensor], source: str) -> tuple[Tensor, Tensor | None]:
    """CLS and registers ``(P, M)`` with their positions; positions of patches ``(1, M, h, w)``."""
    width = len(state["patch_embed.proj.weight"])
    tokens = [state[key][0] for key in ("cls_token", "reg_token") if key in state]
    prefix = torch.cat(tokens) if tokens else torch.zeros(0, width)
    if "pos_embed" not in state:
        return prefix, None
    table = state["pos_embed"][0]
    for extra in (len(prefix), 0):  # networks differ in whether their prefix has positions
        side = math.isqrt(max(len(table) - extra, 0))
        if side * side == len(table) - extra:
            grid = rearrange(table[extra:], "(h w) m -> 1 m h w", h=side)
            prefix = prefix + F.pad(table[:extra], (0, 0, 0, len(prefix) - extra))
            return prefix, grid
    raise ValueError(f"{source}: its {len(table)} positions are not those of a square grid")


def _copy_stem(stem: LinearStem, state: dict[str, Tensor], mean: Tensor, std: Tensor) -> None:
    """Grey in [-1, 1] instead of normalised RGB, other patch sizes, and the third axis."""
    weight, (pd, ph, pw) = state["patch_embed.proj.weight"].float(), stem.patch
    bias = state.get("patch_embed.proj.bias", torch.zeros(len(weight)))
    # A grey value v in [-1, 1] is the colour (v + 1) / 2 in each channel.
    bias = bias + torch.einsum("mcij,c->m", weight, (0.5 - mean) / std)
    weight = torch.einsum("mcij,c->mij", weight, 0.5 / std)
    if weight.shape[1:] != (ph, pw):
        from timm.layers import resample_patch_embed

        weight = resample_patch_embed(weight[:, None], [ph, pw])[:, 0]
    channels = stem.proj.in_features // (pd * ph * pw)
    spread = repeat(weight, "m i j -> m (c d i j)", c=channels, d=pd) / (channels * pd)
    stem.proj.weight.copy_(spread)
    stem.proj.bias.copy_(bias)


def _copy_positions(positions: LearnedPositions, grid: Tensor) -> None:
    depth, height, width, _ = positions.table.shape
    if grid.shape[2:] != (height, width):
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
    positions.table.copy_(repeat(grid, "1 m h w -> d h w m", d=depth))


def _copy_prefix(tower: ViT3D, prefix: Tensor, classes: int, source: str) -> None:
    """CLS and register tokens, as far as the tower has them."""
    places = tower.num_prefix - tower.num_registers
    if tower.prefix is not None:
        if places and classes:
            tower.prefix[:places] = prefix[0]
            prefix = prefix[1:]
        count = min(tower.num_registers, len(prefix))  # the first is the CLS token's if no read-out
        tower.prefix[places : places + count] = prefix[:count]
        prefix = prefix[count:]
    if len(prefix):
        logger.warning(
            "%s: %d of its CLS and register tokens have no place in the tower; vision.registers=%d "
            "keeps them",
            source,
            len(prefix),
            tower.num_registers + len(prefix),
        )
