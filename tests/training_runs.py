"""Short pretraining runs in child processes, as the ``deepspeed`` launcher would start them.

They come from the nursery, which makes a run take two seconds instead of fifteen; one test starts
the real launcher.
"""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nursery import Child

TINY: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "workers": 0,
    "model": {
        "embed_dim": 16,
        "vision": {"size": "tiny", "width": 32, "depth": 1, "heads": 2, "patch": [4, 8, 8]},
        "text": {
            "name_or_path": None,
            "width": 32,
            "layers": 1,
            "heads": 2,
            "pooling": "mean",
            "context_length": 128,
            "dropout": 0.2,
        },
    },
    "text_warmup": {"steps": 2, "batch_size": 4},
    "optim": {"warmup_steps": 2, "text_lr_scale": 1.0},
    "checkpoint": {"every": 2},
    "monitor": {"log_every": 1},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with nested changes."""
    result = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


class Run:
    """A started run; ``wait`` for it, or kill it."""

    def __init__(self, cohort: Path, out: Path, world_size: int, changes: dict[str, Any]) -> None:
        self.out = out
        settings = merged(TINY, {**changes, "cohort": str(cohort), "out": str(out)})
        if "start_from" in changes:
            settings["model"] = changes.get("model", {})
        port = free_port()
        out.mkdir(parents=True, exist_ok=True)
        self.processes = [
            Child(_child, rank, world_size, port, settings, out) for rank in range(world_size)
        ]

    def wait(self, timeout_s: float = 400) -> list[int | None]:
        """Exit codes in rank order; None for one that had to be killed."""
        for process in self.processes:
            process.join(timeout_s)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join(10)
        return codes

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)

    def said(self, rank: int = 0) -> str:
        """Everything that a rank wrote to its terminal."""
        return (self.out / f"said_{rank}.txt").read_text(encoding="utf-8", errors="replace")


def pretrain(cohort: Path, out: Path, world_size: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """Run to the end and return the lines of ``metrics.jsonl`` that hold a loss."""
    run = Run(cohort, out, world_size, changes)
    codes = run.wait()
    assert codes == [0] * world_size, f"{codes}\n{run.said()}"
    return losses_of(out)


def losses_of(out: Path) -> list[dict[str, Any]]:
    """The training lines of a run's metrics."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def column(lines: Sequence[dict[str, Any]], name: str = "loss") -> list[float]:
    """One number per step."""
    return [line[name] for line in lines]


def weights_of(out: Path) -> dict[str, Any]:
    """The tensors of a run's model file."""
    from safetensors.torch import load_file

    return load_file(out / "model.safetensors")


def _child(rank: int, world_size: int, port: int, settings: dict[str, Any], out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    with (
        (out / f"said_{rank}.txt").open("a", buffering=1) as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        _run(settings, said)


def _run(settings: dict[str, Any], said: Any) -> None:
    import logging
    import traceback

    from ctclip import config
    from ctclip.training import pretrain as job

    logging.basicConfig(stream=said, level=logging.WARNING, force=True)
    logging.getLogger("ctclip").setLevel(logging.INFO)
    values = settings.pop("evaluations", None)
    evaluators = [_evaluator_of(values)] if values else []
    _poison(settings.pop("poisoned_steps", ()))
    try:
        job.run(config.from_dict(job.PretrainConfig, settings), evaluators)
    except SystemExit as leaving:
        said.flush()
        os._exit(int(leaving.code or 0))
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        said.flush()
        os._exit(1)
    said.flush()
    os._exit(0)


def _poison(steps: Sequence[int]) -> None:
    """Make the loss of these steps NaN."""
    from ctclip.training.objective import Objective

    objective, calls = Objective.__call__, iter(range(10**6))

    def poisoned(self: Any, *args: Any, **options: Any) -> Any:
        loss, scalars = objective(self, *args, **options)
        return (loss * float("nan") if next(calls) in steps else loss), scalars

    Objective.__call__ = poisoned  # type: ignore[method-assign]


RISES_AND_FALLS = [0.5, 0.7, 0.6, 0.55, 0.5, 0.5]


def _evaluator_of(values: Sequence[float]) -> Callable[[Any, Any], dict[str, float]]:
    """An evaluator that has one number after the other to say."""
    rest = iter(values)
    return lambda model, tokenizer: {"zero_shot/macro": next(rest)}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
