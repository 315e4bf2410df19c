"""Run a function on several real processes that can gather from each other."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Call ``function(*args)`` on each of ``world_size`` gloo ranks; results in rank order.

    Processes are forked, which saves importing torch in each; each computes on one thread, since
    a thread pool does not survive a fork.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_child, args=(rank, world_size, folder, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.kill()
        results = []
        for rank in range(world_size):
            path = Path(folder) / f"result_{rank}"
            if not path.exists():
                raise AssertionError(f"rank {rank} gave no result (hung: {bool(alive)})")
            is_error, result = pickle.loads(path.read_bytes())
            if is_error:
                raise AssertionError(f"rank {rank}:\n{result}")
            results.append(result)
        return results


def _child(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        outcome = (False, function(*args))
    except BaseException:
        outcome = (True, traceback.format_exc())
    path = Path(folder) / f"result_{rank}"
    path.with_suffix(".tmp").write_bytes(pickle.dumps(outcome))
    path.with_suffix(".tmp").rename(path)
    os._exit(0)
