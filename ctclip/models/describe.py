"""What a model costs before anything is bought or trained: parameters, tokens, FLOPs, memory.

Nothing is computed on real data: the towers run on PyTorch's meta device, FLOPs come from its
counter (a multiply-add counts two) and memory from the tensors that autograd would keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ctclip.config import ConfigError, from_dict
from ctclip.models.ctclip import CTCLIP, ModelConfig, build_model
from ctclip.models.text import read_hf_config, set_trainable, small_bert

CXR_BERT_CONFIG: dict[str, Any] = {"model_type": "bert", "vocab_size": 30522}
"""BERT-base's shape, which CXR-BERT has; so that describing needs no download."""

_OF_A_RUN = {"steps", "batch_size", "start_from", "optim", "loss", "engine"}

ADAM_BYTES_PER_PARAMETER = 16
"""fp32 weight, gradient and Adam's two moments."""

GIB = 2**30


@dataclass(frozen=True)
class TowerCost:
    """What the volume tower costs for one volume."""

    parameters: int
    tokens: int
    forward_tflop: float
    training_tflop: float
    """Forward and backward; recomputation adds another forward."""
    activation_gib: float
    """Kept for backward."""
    checkpointed_gib: float
    """The same with activation checkpointing: block inputs, and the insides of the largest one."""
    stem_gib: float
    """With checkpointing, once for a batch: the stem's insides for the volume that passes it."""


@dataclass(frozen=True)
class Description:
    """A model's cost."""

    image_size: tuple[int, int, int]
    grid: tuple[int, int, int]
    vision: TowerCost
    text_parameters: int
    text_taken_for: str | None
    """Name of the BERT, if it was counted as a BERT-base and not read."""
    total_parameters: int
    trainable_parameters: int

    def largest_batch(self, memory_gib: float, checkpointing: bool = False) -> int:
        """Volumes per step that fit a card, beside fp32 weights, gradients and Adam's moments.

        A tenth of the card is left to the framework and to transients; text activations, small
        beside a volume's, are in that tenth too.
        """
        state = ADAM_BYTES_PER_PARAMETER * self.trainable_parameters
        state += 4 * (self.total_parameters - self.trainable_parameters)
        volume, once = self.vision.activation_gib, 0.0
        if checkpointing:
            volume, once = self.vision.checkpointed_gib, self.vision.stem_gib
        return max(int((0.9 * memory_gib - state / GIB - once) / volume), 0)


def read_model_config(path: str | Path) -> ModelConfig:
    """The model of a YAML file: a training run's, with a channel for each window, or that alone.

    Raises:
        ConfigError: If the file can't be read, a key isn't known, or it is a run without a model.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable config: {error}") from None
    model = values.get("model", values) if isinstance(values, dict) else None
    if not isinstance(model, dict):
        raise ConfigError(f"{path}: expected the keys of a model, or a key 'model' that holds them")
    if model is values and _OF_A_RUN & set(values):
        raise ConfigError(
            f"{path} is a run without a key 'model': its model is that of the checkpoint it starts "
            "from, or the default one, which a line 'model: {}' describes"
        )
    config = from_dict(ModelConfig, model, source=str(path))
    windows = values.get("windows_hu")
    if model is not values and isinstance(windows, list) and config.ctvit is None:
        config = replace(config, vision=replace(config.vision, channels=len(windows)))
    return config


def describe(
    config: ModelConfig,
    image_size: tuple[int, int, int],
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Description:
    """Work out what a model costs on volumes of a size.

    Args:
        config: The model. A BERT that goes by a name is taken for a BERT-base; one in a local
            directory is what its ``config.json`` says.
        image_size: Voxels (D, H, W).
        precision: Of the activations. Autocast lies between the two, nearer to bf16.

    Raises:
        ValueError: If the tower can't take volumes of that size.
    """
    if min(image_size) < 1:
        raise ValueError(f"a volume's size is voxels (D, H, W) of at least 1, got {image_size}")
    if (ctvit := config.ctvit) is not None and (
        image_size[0] % ctvit.patch[0] or image_size[1:] != tuple(ctvit.image_size)
    ):
        raise ValueError(
            f"this CT-ViT is built for {ctvit.image_size[0]} x {ctvit.image_size[1]} voxels and a "
            f"depth in steps of {ctvit.patch[0]}, not for {image_size}; for another size set "
            "ctvit.image_size in the config, which changes its weights"
        )
    text = config.text
    by_name = text.name_or_path is not None and not Path(text.name_or_path).is_dir()
    hf_config = CXR_BERT_CONFIG
    if text.name_or_path is None:
        hf_config = small_bert(text)
    elif not by_name:
        hf_config = read_hf_config(text.name_or_path)
    with torch.device("meta"):
        model = build_model(config, hf_config=hf_config)
        set_trainable(model.text, text)
    tower = config.ctvit or config.vision
    grid = tower.grid(image_size)
    total = sum(p.numel() for p in model.parameters())
    text_parameters = sum(p.numel() for p in model.text.parameters())
    return Description(
        image_size=image_size,
        grid=grid,
        vision=_cost(model, config.channels, image_size, grid, precision),
        text_parameters=text_parameters,
        text_taken_for=text.name_or_path if by_name else None,
        total_parameters=total,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def table(description: Description, cards_gib: tuple[float, ...] = (24, 40, 80)) -> RenderableType:
    """A description for a terminal (the command ``ctclip-describe``)."""
    cost, d = description.vision, description
    counted = f" ({d.text_taken_for}, counted as BERT-base)" if d.text_taken_for else ""
    rows = Table(show_header=False, title="x".join(map(str, d.image_size)))
    for name, value in (
        ("parameters", f"{d.total_parameters / 1e6:.1f} M"),
        ("  volume tower", f"{cost.parameters / 1e6:.1f} M"),
        ("  text tower", f"{d.text_parameters / 1e6:.1f} M{counted}"),
        ("tokens", f"{' x '.join(map(str, d.grid))} = {cost.tokens:,}"),
        ("FLOP forward", f"{cost.forward_tflop:.3f} T a volume"),
        ("FLOP training", f"{cost.training_tflop:.3f} T a volume"),
        ("activations", f"{cost.activation_gib:.2f} GiB a volume"),
        ("  with checkpointing", f"{cost.checkpointed_gib:.2f} GiB a volume"),
    ):
        rows.add_row(name, value)
    for card in cards_gib:
        plain, saving = d.largest_batch(card), d.largest_batch(card, checkpointing=True)
        rows.add_row(f"largest batch, {card:g} GiB", f"{plain}, with checkpointing {saving}")
    return rows


def _cost(
    model: CTCLIP,
    channels: int,
    image_size: tuple[int, int, int],
    grid: tuple[int, int, int],
    precision: Literal["fp32", "bf16"],
) -> TowerCost:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    visual = model.visual.to(dtype)
    image = torch.zeros(1, channels, *image_size, device="meta", dtype=dtype)
    with _fused_attention() as attention:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            visual.eval()(image)
        forward = _flops(counter) + attention.flops
        attention.flops = 0.0
        kept = KeptForBackward(visual)
        with FlopCounterMode(display=False) as counter:
            with kept.counting():
                output = visual.train()(image)
            output.sum().backward()
        training = _flops(counter) + attention.flops
        visual.set_grad_checkpointing()
        outside = KeptForBackward(visual)
        with outside.counting():
            visual(image)
    return TowerCost(
        parameters=sum(p.numel() for p in visual.parameters()),
        tokens=grid[0] * grid[1] * grid[2],
        forward_tflop=forward / 1e12,
        training_tflop=training / 1e12,
        activation_gib=kept.bytes / GIB,
        checkpointed_gib=(outside.bytes + kept.largest_part) / GIB,
        stem_gib=kept.stem / GIB,
    )


def _flops(counter: FlopCounterMode) -> float:
    """A counter's total; a convolution's backward is two of its forward.

    PyTorch's own count of it takes depth-wise convolutions for dense ones.
    """
    counts = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    if "aten.convolution_backward" in counts:
        counts["aten.convolution_backward"] = 2 * counts["aten.convolution"]
    return float(sum(counts.values()))


class KeptForBackward:
    """Counts the bytes that autograd keeps for backward, parameters and buffers aside."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower
        self.bytes = 0
        self.largest_part = 0
        self.stem = 0
        self._seen = {t.untyped_storage()._cdata for t in (*tower.parameters(), *tower.buffers())}
        self._alive: list[Tensor] = []

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)  # so that its storage's address isn't used again
            self.bytes += storage.nbytes()
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what a forward pass inside keeps, in all and in each block."""
        before: dict[nn.Module, int] = {}

        def enter(module: nn.Module, _inputs: object) -> None:
            before[module] = self.bytes

        def leave(module: nn.Module, _inputs: object, _output: object) -> None:
            inside = self.bytes - before[module]
            if module in stem:
                self.stem = max(self.stem, inside)
            else:
                self.largest_part = max(self.largest_part, inside)

        stem = [module for name, module in self.tower.named_children() if name == "stem"]
        parts = [*stem, *(m for m in self.tower.modules() if type(m).__name__ == "Block")]
        hooks = [part.register_forward_pre_hook(enter) for part in parts]
        hooks += [part.register_forward_hook(leave) for part in parts]
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        for hook in hooks:
            hook.remove()


class _Attention(torch.autograd.Function):
    """Stands for the fused kernel, which on the meta device would fall apart into its steps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _FusedAttention:
    """Replaces ``F.scaled_dot_product_attention`` and adds up its FLOPs."""

    def __init__(self) -> None:
        self.flops = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **_options: object) -> Tensor:
        batch, heads, queries, width = q.shape
        product = 2.0 * batch * heads * queries * k.shape[-2] * width
        # Two products forward; backward makes the first again and four for the gradients.
        self.flops += product * (7 if torch.is_grad_enabled() else 2)
        return _Attention.apply(q, k, v)


@contextmanager
def _fused_attention() -> Iterator[_FusedAttention]:
    original, counting = F.scaled_dot_product_attention, _FusedAttention()
    F.scaled_dot_product_attention = counting  # type: ignore[assignment]
    try:
        yield counting
    finally:
        F.scaled_dot_product_attention = original
