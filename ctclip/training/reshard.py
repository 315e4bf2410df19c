"""Go on with another number of processes.

At ZeRO 1 and 2 each process's file holds its share of the optimiser state, so a checkpoint fits the
number of processes that wrote it. DeepSpeed's universal format holds one file per parameter
instead and fits any number.
"""

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ctclip import distributed

logger = logging.getLogger(__name__)


def needs_resharding(state: dict[str, Any], *, zero_stage: int, world_size: int) -> bool:
    """Whether a checkpoint has to be converted before this job can load it.

    Args:
        state: The checkpoint's, with ``zero_stage`` and ``world_size`` of the job that wrote it.
        zero_stage: Of this job.
        world_size: Of this job.

    Raises:
        ValueError: If the change can't be bridged.
    """
    before, processes = state["zero_stage"], state["world_size"]
    if before != zero_stage:
        raise ValueError(
            f"the checkpoint was written at ZeRO {before}, this job runs ZeRO {zero_stage}; go on "
            f"with the same engine.deepspeed, or start a new run"
        )
    if processes == world_size or zero_stage == 0:
        return False
    if zero_stage == 3:
        raise ValueError(
            f"the checkpoint was written by {processes} processes at ZeRO 3, which only that "
            f"number can read; start {processes} processes"
        )
    return True


def to_universal(checkpoint: Path, tag: str, scratch: Path) -> Path:
    """Convert one checkpoint on rank 0; every rank calls this and waits.

    Args:
        checkpoint: Folder that holds DeepSpeed's files under ``tag``.
        tag: Their folder.
        scratch: Where the converted copy goes; replaced if it exists.

    Returns:
        Folder to load from, under the same ``tag``.

    Raises:
        RuntimeError: If DeepSpeed's converter fails.
    """
    problem: str | None = None
    if distributed.is_main():
        logger.warning("%s is converted to this number of processes", checkpoint)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--inject_missing_state", "--num_extract_workers", "1"]
        command += ["--num_merge_workers", "1", "--input_folder", str(checkpoint / tag)]
        command += ["--output_folder", str(scratch / tag)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            problem = result.stderr[-2000:]
    problem = distributed.gather_objects(problem)[0]
    if problem:
        raise RuntimeError(f"DeepSpeed could not convert {checkpoint}:\n{problem}")
    return scratch
