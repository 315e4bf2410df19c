"""What stops a bad step from becoming a bad model, and a pre-emption from losing work."""

import contextlib
import json
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctclip import distributed
from ctclip.config import require_at_least, require_positive
from ctclip.training.grad_cache import Features

if TYPE_CHECKING:
    from ctclip.data.manifest import VolumeRecord

logger = logging.getLogger(__name__)

SKIPPED = "skipped_steps.jsonl"


class Diverged(ValueError):
    """Too many steps in a row had no usable gradient."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step isn't taken."""

    loss_limit: float = 100.0
    """A larger loss counts as exploded; with cosines and a clamped temperature it can't be one."""

    max_skipped: int = 10
    """Skipped steps in a row after which the run stops."""

    def __post_init__(self) -> None:
        require_positive(self, "guard.", "loss_limit")
        require_at_least(self, "guard.", 1, "max_skipped")


@contextlib.contextmanager
def explained_memory(micro_batch_size: int) -> Iterator[None]:
    """Turn "out of memory", of a GPU or of the machine, into what to change.

    Raises:
        ValueError: Naming the setting that decides how much memory a step takes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, torch.OutOfMemoryError):
            memory = "the GPU's memory"
        elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            memory = "this machine's memory"
        else:
            raise
        raise ValueError(
            f"micro_batch_size {micro_batch_size} does not fit {memory}; halve it (the loss and "
            f"its gradients stay the same), or set engine.activation_checkpointing=true"
        ) from error


@contextlib.contextmanager
def explained_lost_process() -> Iterator[None]:
    """Say in a sentence that the job's other processes wait for one that is gone.

    Raises:
        ConnectionError: Instead of what gloo or NCCL say of it.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("closed by peer", "reset by peer", "NCCL")):
            raise
        raise ConnectionError(
            "another process of this job is gone: its own error stands above, or there is none "
            "because it was killed (for want of memory, perhaps); the launcher names it. The same "
            "command goes on from the newest checkpoint"
        ) from error


@contextlib.contextmanager
def leaves_on_sigterm() -> Iterator[None]:
    """Exit cleanly on SIGTERM while there is nothing to save yet."""

    def leave(number: int, frame: FrameType | None) -> None:
        logger.warning("asked to terminate before the first step: nothing to save, stopping")
        raise SystemExit(0)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class Guard:
    """Judges every step the same way on every rank, and listens for SIGTERM. A context manager.

    Args:
        config: Limits.
        out: Run folder, where skipped steps are listed with their studies.
        skipped: Steps skipped before this start, in a row and in total.
    """

    def __init__(self, config: GuardConfig, out: Path, skipped: tuple[int, int] = (0, 0)) -> None:
        self._config = config
        self._path = out / SKIPPED
        self.in_a_row, self.total = skipped
        self._terminated = False
        self.should_stop = False
        """A rank was asked to terminate; known to all ranks after the next step."""
        self._previous: Any = None

    def __enter__(self) -> "Guard":
        self._previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def is_usable(self, loss: Tensor, leaves: Features) -> bool:
        """Whether loss and feature gradients are sound on all ranks."""
        gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        sound = finite & loss.isfinite() & (loss.abs() <= self._config.loss_limit)
        flags = torch.stack([(~sound).float(), torch.full_like(loss, float(self._terminated))])
        if distributed.world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        bad, stop = (bool(flag) for flag in flags.tolist())
        self.should_stop = self.should_stop or stop
        return not bad

    @property
    def is_sound(self) -> bool:
        """Whether the model is one to save and measure: its last step was taken."""
        return self.in_a_row == 0

    def took_step(self) -> None:
        """Note a good step."""
        self.in_a_row = 0

    def skipped_step(self, step: int, loss: float, records: Sequence["VolumeRecord"]) -> None:
        """Note a step that was not taken and which studies were in it.

        Raises:
            Diverged: After ``max_skipped`` in a row; the last checkpoint is from before them.
        """
        self.in_a_row += 1
        self.total += 1
        parts = distributed.gather_objects([record.study_id for record in records])
        studies = [study for part in parts for study in part]
        if distributed.is_main():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": loss, "studies": studies}) + "\n")
            logger.warning(
                "step %d skipped: loss %g or its gradient is not usable (%d in a row, %d in all); "
                "its studies are listed in %s",
                step,
                loss,
                self.in_a_row,
                self.total,
                self._path,
            )
        if self.in_a_row >= self._config.max_skipped:
            raise Diverged(
                f"{self.in_a_row} steps in a row had no usable gradient (the last at step {step}); "
                f"the newest checkpoint is from before them. If {self._path} names a study that "
                f"repeats, take it out of the cohort; else train anew with a lower optim.lr, in "
                f"another folder (out=FOLDER)"
            )
