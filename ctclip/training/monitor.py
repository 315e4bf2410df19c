"""What a run says while it runs: one log line, ``metrics.jsonl``, and whoever mirrors that file.

Report text, slices and identifiers never go to a tracker.
"""

import contextlib
import json
import logging
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from tqdm import tqdm

from ctclip import distributed
from ctclip.config import require_at_least

logger = logging.getLogger(__name__)

PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, the first that fits (NVIDIA data sheets); MFU
is a share of it."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Where numbers go, and how often."""

    log_every: int = 10
    """Steps between two lines; a line averages over the steps since the last one. The last step
    writes one too."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "ctclip"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, "monitor.", 1, "log_every")


class Monitor:
    """Averages step numbers and writes a line every ``log_every`` steps. A context manager.

    Args:
        out: Run folder; ``metrics.jsonl`` is continued there, less the lines after ``start_step``
            that a killed run wrote and that are about to be computed again.
        config: What to write.
        run_config: The resolved config, for the tracker.
        start_step: Steps already done.
        total_steps: Where the progress line ends.
        flops_per_step: Of the whole job, forward and backward; None leaves MFU out.
    """

    def __init__(
        self,
        out: Path,
        config: MonitorConfig,
        run_config: dict[str, Any],
        *,
        start_step: int,
        total_steps: int,
        flops_per_step: float | None = None,
    ) -> None:
        self._config = config
        self._is_main = distributed.is_main()
        self._sums: dict[str, tuple[float, int]] = {}
        self._steps = 0
        self._volumes = 0
        self._waited_s = 0.0
        self._since = time.perf_counter()
        self._flops_per_step = flops_per_step
        self._total_steps = total_steps
        self._path = out / "metrics.jsonl"
        self._trackers: list[Any] = []
        self._bar: tqdm | None = None
        if not self._is_main:
            return
        _drop_lines_after(self._path, start_step)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            desc="pretrain",
            disable=not sys.stderr.isatty(),
        )
        if config.wandb != "disabled":
            self._trackers.append(_Wandb(out, config, run_config))
        if config.tensorboard:
            self._trackers.append(_TensorBoard(out, start_step))

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        for tracker in self._trackers:
            tracker.close()

    def step(
        self, step: int, *, volumes: int, waited_s: float, numbers: dict[str, float]
    ) -> dict[str, float] | None:
        """Note one step; every ``log_every`` steps write and return the line.

        Args:
            step: Steps done, this one included.
            volumes: In the global batch.
            waited_s: How long this process waited for its data.
            numbers: Scalars of this step, averaged over the line.
        """
        self._steps += 1
        self._volumes += volumes
        self._waited_s += waited_s
        for name, value in numbers.items():
            if math.isfinite(value):  # a skipped step has a loss that no mean survives
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix(loss=f"{numbers.get('loss', float('nan')):.3f}", refresh=False)
        if step % self._config.log_every and step != self._total_steps:
            return None

        elapsed_s = time.perf_counter() - self._since
        line: dict[str, float] = {
            name: total / count for name, (total, count) in self._sums.items()
        }
        line["volumes_per_s"] = self._volumes / elapsed_s
        line["data_wait_share"] = self._waited_s / elapsed_s
        line["peak_gib"] = peak_gib()
        peak = peak_flops()
        if self._flops_per_step is not None and peak is not None:
            job_peak = peak * distributed.world_size()
            line["mfu"] = self._flops_per_step * self._steps / elapsed_s / job_peak
        self._sums, self._steps, self._volumes, self._waited_s = {}, 0, 0, 0.0
        self._since = time.perf_counter()
        self.write(step, line)
        return line

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside, evaluating and saving, out of the time that steps take."""
        since = time.perf_counter()
        yield
        self._since += time.perf_counter() - since

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Append one line to ``metrics.jsonl``, the log and the trackers (rank 0 only)."""
        if not self._is_main:
            return
        text = " ".join(f"{name}={value:.4g}" for name, value in numbers.items())
        with _above(self._bar):
            logger.info("step %d %s", step, text)
        finite = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        for tracker in self._trackers:
            tracker.write(step, numbers)


def require_tracker(config: MonitorConfig) -> None:
    """Refuse a tracker that no one is logged in to, before anything is computed.

    Raises:
        ValueError: Naming what to run or to set.
    """
    if config.wandb != "online":
        return
    import wandb

    # At a terminal it asks for the key, later.
    if not wandb.login(prompt=False) and not sys.stdin.isatty():
        raise ValueError(_no_login("no API key is known"))


def _no_login(problem: object) -> str:
    return (
        f"W&B refused to start ({problem}); run `wandb login` once, or set "
        f"monitor.wandb=offline and upload later with `wandb sync`"
    )


def peak_gib() -> float:
    """Largest memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this GPU; None on a CPU or a device that is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def _drop_lines_after(path: Path, step: int) -> None:
    """Forget what a killed run wrote beyond its last checkpoint; from step 0 all comes anew."""
    if not path.exists():
        return
    if step == 0:
        path.unlink()
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            numbers = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half line of a killed process
        if numbers["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


class _above:
    """Let a log line appear above the progress line rather than through it."""

    def __init__(self, bar: tqdm | None) -> None:
        self._bar = bar if bar is not None and not bar.disable else None

    def __enter__(self) -> None:
        if self._bar is not None:
            self._bar.clear()

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.refresh()


class _Wandb:
    def __init__(self, out: Path, config: MonitorConfig, run_config: dict[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=config.project,
                name=out.name,
                dir=str(out),
                config=run_config,
                mode="online" if config.wandb == "online" else "offline",
                id=_tracker_id(out),
                resume="allow" if config.wandb == "online" else None,
            )
        except wandb.errors.Error as error:
            raise ValueError(_no_login(error)) from error

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, out: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "monitor.tensorboard=true needs an extra: pip install 'ctclip[tensorboard]'"
            ) from error
        self._writer: Any = SummaryWriter(  # type: ignore[no-untyped-call]
            str(out / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _tracker_id(out: Path) -> str:
    """One tracker run per run folder, however often the run is started again."""
    path = out / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
