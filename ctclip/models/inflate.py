"""Start a 3D tower from a 2D vision transformer.

Each 2D filter is spread evenly over the slices of a patch ("average" inflation), so a volume whose
slices are all alike gives the 2D network's own features; everything behind the stem is copied.
"""

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


def inflate_from(tower: ViT3D, name_or_path: str) -> None:
    """Fill a tower from a timm model's pretrained weights or from a local file of them.

    Args:
        tower: Changed in place; see :func:`inflate`.
        name_or_path: For example ``vit_small_patch16_224.augreg_in21k``, or a ``.safetensors`` or
            ``.pth`` file with timm's key names.

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
    vit = timm.create_model(name_or_path, pretrained=True)
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

    With a linear stem and learned positions nothing is lost: on one plane of patches with equal
    slices the tower gives the 2D network's tokens for the grey image. Other positions and the
    convolutional stem have no 2D counterpart and keep their own start.

    Args:
        tower: Changed in place.
        state: Weights under timm's names.
        mean: Of the 2D network's input, RGB in [0, 1].
        std: Likewise.
        source: What errors call it.

    Raises:
        ValueError: If width or depth differ, or ``state`` is no vision transformer.
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
    if isinstance(tower.stem, LinearStem):
        _copy_stem(tower.stem, state, torch.tensor(mean), torch.tensor(std))
    if isinstance(tower.positions, LearnedPositions) and "pos_embed" in state:
        _copy_positions(tower.positions, state)
    _copy_prefix(tower, state)
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


def _copy_positions(positions: LearnedPositions, state: dict[str, Tensor]) -> None:
    table = state["pos_embed"][0]
    side = int(len(table) ** 0.5)
    grid = rearrange(table[-side * side :], "(h w) m -> 1 m h w", h=side)
    depth, height, width, _ = positions.table.shape
    if (height, width) != (side, side):
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
    positions.table.copy_(repeat(grid, "1 m h w -> d h w m", d=depth))


def _copy_prefix(tower: ViT3D, state: dict[str, Tensor]) -> None:
    """CLS and register tokens, as far as the tower has them."""
    if tower.prefix is None or "cls_token" not in state:
        return
    classes = tower.num_prefix - tower.num_registers
    token = state["cls_token"][0, 0]
    if "pos_embed" in state and len(state["pos_embed"][0]) % 2:
        token = token + state["pos_embed"][0, 0]
    tower.prefix[:classes] = token
    registers = state.get("reg_token")
    if registers is not None:
        count = min(tower.num_registers, registers.shape[1])
        tower.prefix[classes : classes + count] = registers[0, :count]
