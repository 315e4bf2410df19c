"""Parameter groups, learning-rate schedule, and the DeepSpeed engine around them."""

import contextlib
import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ctclip import distributed
from ctclip.config import require_at_least, require_in, require_positive

if TYPE_CHECKING:
    from ctclip.models.ctclip import CTCLIP


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move."""

    lr: float = 5e-4
    """Peak learning rate, which the next two scale for each tower."""

    volume_lr_scale: float = 1.0
    """Learning rate of the volume tower relative to ``lr``; 0 freezes it."""

    text_lr_scale: float = 0.1
    """Learning rate of the text tower relative to ``lr``. Text is conditioned before the volumes
    are seen; letting it drift at full speed moves the target that the volume tower aims at."""

    weight_decay: float = 0.05
    """Decoupled; never applied to biases, norms, embeddings of one row and the temperature."""

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6

    warmup_steps: int = 50
    """Linear from 0 to ``lr``."""

    final_lr_share: float = 0.01
    """The cosine ends at this share of ``lr``."""

    grad_clip: float = 1.0
    """Largest norm of the gradient over all parameters; 0 switches clipping off."""

    layer_decay: float = 1.0
    """Each layer further from a tower's output learns this factor slower; 1 is the same for all."""

    ema_decay: float | None = None
    """Also average the weights over steps, and evaluate and save the average; None doesn't."""

    def __post_init__(self) -> None:
        # At eps 0 a weight that never had a gradient, as of a word not seen yet, becomes 0 / 0.
        require_positive(self, "optim.", "lr", "eps")
        scales = ("volume_lr_scale", "text_lr_scale")
        require_at_least(self, "optim.", 0, *scales, "weight_decay", "warmup_steps", "grad_clip")
        require_in(self, "optim.", 0, 1, "final_lr_share")
        require_in(self, "optim.", 0, 1, "betas", "ema_decay", ends="[)")
        require_in(self, "optim.", 0, 1, "layer_decay", ends="(]")
        if self.volume_lr_scale == self.text_lr_scale == 0.0:
            raise ValueError(
                "optim.volume_lr_scale and optim.text_lr_scale are both 0: no tower would learn"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the towers are computed and sharded."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast over fp32 weights, the same at every ZeRO stage. fp16 isn't offered: its
    range is too small for a temperature of 100."""

    deepspeed: str | None = None
    """JSON with ``zero_optimization`` (stage, offload), for example configs/deepspeed/zero2.json.
    None is plain data parallelism."""

    activation_checkpointing: bool = False
    compile: bool = False
    """torch.compile the volume tower's blocks. Wants a C++ compiler and a minute at the start."""


TOWERS = ("visual", "text")

_LAYER = re.compile(r"\.(blocks|layers?|spatial|temporal)\.(\d+)\.")
_BEFORE_LAYERS = re.compile(r"\.(stem|prefix|positions?|offset_bias|\w*embeddings\w*)\b")

OURS = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "optim.warmup_steps",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "compile": "engine.compile",
    "steps_per_print": "monitor.log_every",
    "tensorboard": "monitor.tensorboard",
    "wandb": "monitor.wandb",
}
"""DeepSpeed keys that have their one home in our config, and where."""

DEEPSPEED_KEYS = (
    "zero_optimization",
    "checkpoint",
    "aio",
    "communication_data_type",
    "comms_logger",
    "log_level",
    "memory_breakdown",
    "wall_clock_breakdown",
)
"""What the JSON may hold. DeepSpeed itself passes over a key that it doesn't know."""


def deepspeed_config(
    engine: EngineConfig,
    optim: OptimConfig,
    *,
    rows_per_rank: int,
    world_size: int,
    micro_batch_size: int | None = None,
) -> dict[str, Any]:
    """Build the dict that ``deepspeed.initialize`` gets.

    DeepSpeed's own accumulation stays at 1: GradCache decides where a step ends.

    Raises:
        ValueError: If the JSON sets what our config sets, has a key that nothing would read, or
            asks for a combination of ZeRO stage and precision or offload that silently trains
            something else.
        FileNotFoundError: If the JSON doesn't exist.
    """
    extra = _read_json(engine.deepspeed) if engine.deepspeed else {}
    for key in extra:
        if key in OURS:
            raise ValueError(
                f"{engine.deepspeed}: {key!r} is set by {OURS[key]} of the pretrain config; "
                f"remove it here, one setting has one home"
            )
        if key not in DEEPSPEED_KEYS:
            close = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(DEEPSPEED_KEYS)}"
            raise ValueError(f"{engine.deepspeed}: unknown key {key!r}; {hint}")
    for key in ("zero_optimization", "checkpoint"):
        if not isinstance(extra.get(key, {}), dict):
            raise ValueError(
                f'{engine.deepspeed}: {key!r} must be a JSON object such as {{"stage": 1}}, got '
                f"{json.dumps(extra[key])}; see configs/deepspeed/"
            )
    zero = extra.setdefault("zero_optimization", {"stage": 0})
    _refuse(zero, engine, optim, str(engine.deepspeed))
    if zero.get("stage") == 3 and (micro_batch_size or rows_per_rank) < rows_per_rank:
        raise ValueError(
            f"{engine.deepspeed}: ZeRO 3 x micro-batches is refused: from the second step on "
            f"gradients were measured to differ from those of the whole batch; use ZeRO 2, or "
            f"leave micro_batch_size at {rows_per_rank} or more"
        )
    return {
        **extra,
        "train_batch_size": rows_per_rank * world_size,
        "train_micro_batch_size_per_gpu": rows_per_rank,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def param_groups(model: "CTCLIP", config: OptimConfig) -> list[dict[str, Any]]:
    """Group trained parameters by tower, layer and whether weight decay applies.

    Returns:
        Groups in the model's own order with ``params``, ``weight_decay``, ``lr`` and ``lr_scale``
        (what ``lr_at`` is multiplied by). The order never depends on a hash, so that an
        optimizer's state finds its parameters again.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    layers = _layers_of([name for name, _ in model.named_parameters()])
    top = {tower: max(layers[n] for n in layers if n.startswith(tower)) for tower in TOWERS}
    never_decays = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower = name.split(".")[0]
        scale = {"visual": config.volume_lr_scale, "text": config.text_lr_scale}.get(tower, 1.0)
        if tower in TOWERS:
            scale *= config.layer_decay ** (top[tower] - layers[name])
        decays = parameter.ndim >= 2 and name not in never_decays
        group = groups.setdefault(
            (scale, decays),
            {
                "params": [],
                "lr_scale": scale,
                "lr": config.lr * scale,
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def lr_at(step: int, *, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of step ``step`` (0-based): linear warm-up, then half a cosine.

    A function of the step alone, so that resuming needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(total_steps - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / span, 1.0)
    floor = config.final_lr_share
    return config.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every group its share of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def start_processes() -> None:
    """Join the job's other processes, or be the only one.

    Works under the ``deepspeed`` launcher, torchrun, SLURM wrappers that set ``RANK``, and plain
    ``python``. Nothing is compiled: DeepSpeed would otherwise build a shared-memory op on first
    use, which wants a C++ compiler and a minute.

    Raises:
        ValueError: If a launcher set some of the variables and not others.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _require_launcher()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        os.environ["LOCAL_RANK"] = str(local % torch.cuda.device_count())
    os.environ.setdefault("LOCAL_RANK", "0")

    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.own_device())


def _require_launcher() -> None:
    """Refuse processes that were told half of what they need to find each other."""
    if "RANK" not in os.environ:
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks > 1:
            raise ValueError(
                f"srun started {tasks} processes that don't know of each other: set RANK, "
                f"WORLD_SIZE and LOCAL_RANK from SLURM's variables, see docs/training.md"
            )
        return
    missing = [n for n in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ValueError(
            f"RANK is set and {', '.join(missing)} not: a launcher sets all of them, see "
            f"docs/training.md; for a single process unset RANK"
        )


def start_engine(
    model: nn.Module, groups: list[dict[str, Any]], optim: OptimConfig, config: dict[str, Any]
) -> Any:
    """Wrap a model in a DeepSpeed engine with ``torch.optim.AdamW``, which compiles nothing."""
    import deepspeed

    for parameter in model.parameters():
        # DeepSpeed broadcasts weights as bytes, which asks for one plain layout in memory.
        parameter.data = parameter.data.contiguous()
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def take_step(engine: Any) -> float | None:
    """Clip the accumulated gradient and move the weights.

    Returns:
        The gradient's norm before clipping, or None when it wasn't finite and nothing moved.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        _forget_offloaded_gradients(engine.optimizer)
        return None if engine.optimizer.overflow else float(engine.get_global_grad_norm())
    # DeepSpeed keeps no norm at stage 0 and would take a step on NaN.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    if not math.isfinite(norm):
        engine.zero_grad()
        return None
    engine.step()
    return norm


def _forget_offloaded_gradients(optimizer: Any) -> None:
    """Empty the buffers in which CPU offload adds up a step's micro-batches.

    DeepSpeed (0.19.8) starts a parameter's sum afresh in the first micro-batch only. One that takes
    part in later ones alone, as the temperature does, would get the last step's gradient as well.
    """
    for buffer in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
        buffer.zero_()


@contextlib.contextmanager
def whole_weights(engine: Any) -> Iterator[None]:
    """Inside the block every rank holds all weights; matters at ZeRO 3, where each has a share."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield


class WeightAverage:
    """Exponential moving average of the trained weights (Polyak & Juditsky 1992).

    Args:
        model: Whose weights are averaged, starting from what they are now.
        decay: Per step; None keeps no average and costs nothing.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        if decay is not None:
            self.weights = {
                name: parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the current weights."""
        if self.decay is None:
            return
        current = dict(model.named_parameters())
        for name, average in self.weights.items():
            average.lerp_(current[name], 1.0 - self.decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model holds the averaged weights."""
        current = dict(model.named_parameters())
        kept = {name: current[name].detach().clone() for name in self.weights}
        with torch.no_grad():
            for name, average in self.weights.items():
                current[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in kept.items():
                    current[name].copy_(weight)


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"engine.deepspeed: {path} does not exist; see configs/deepspeed/"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object of DeepSpeed settings")
    return content


def _refuse(zero: Mapping[str, Any], engine: EngineConfig, optim: OptimConfig, source: str) -> None:
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{source}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    offload = any("offload" in key and zero[key] for key in zero)
    if offload and stage == 0:
        raise ValueError(f"{source}: ZeRO 0 has nothing to offload; set stage 1 or higher")
    if stage == 3 and engine.compile:
        raise ValueError(
            f"{source}: ZeRO 3 x torch.compile is refused: weights that come and go inside the "
            f"graph recompile it at every step; use ZeRO 2 or engine.compile=false"
        )
    if stage == 3 and optim.ema_decay is not None:
        raise ValueError(
            f"{source}: ZeRO 3 x optim.ema_decay is refused: no process holds whole weights to "
            f"average; use ZeRO 2"
        )


def _layers_of(names: Sequence[str]) -> dict[str, int]:
    """How deep each parameter of the towers lies.

    0 before the first layer, 1 in the first, one more than in the last behind it. CT-ViT's temporal
    layers follow its spatial ones.
    """
    found = {name: match for name in names if (match := _LAYER.search(name))}
    spatial = [int(match[2]) + 1 for match in found.values() if match[1] == "spatial"]
    before = {"temporal": max(spatial, default=0)}
    layers = {name: before.get(m[1], 0) + int(m[2]) + 1 for name, m in found.items()}
    for tower in TOWERS:
        last = max((layers[name] for name in found if name.startswith(tower)), default=0)
        for name in names:
            if name.startswith(f"{tower}.") and name not in found:
                layers[name] = 0 if _BEFORE_LAYERS.search(name) else last + 1
    return layers


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
