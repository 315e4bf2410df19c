"""Run a function on several real processes that can gather from each other."""

import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nursery import Child, load_function


def on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Call ``function(*args)`` on each of ``world_size`` gloo ranks; results in rank order.

    The function stands at the top level of a test module.
    """
    where = (str(sys.modules[function.__module__].__file__), function.__name__)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            Child(_child, rank, world_size, folder, where, args) for rank in range(world_size)
        ]
        for process in processes:
            process.join(timeout_s)
        alive = [process for process in processes if process.exitcode is None]
        for process in alive:
            process.kill()
            process.join(10)
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
    rank: int, world_size: int, folder: str, where: tuple[str, str], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        outcome = (False, load_function(*where)(*args))
    except BaseException:
        outcome = (True, traceback.format_exc())
    path = Path(folder) / f"result_{rank}"
    path.with_suffix(".tmp").write_bytes(pickle.dumps(outcome))
    path.with_suffix(".tmp").rename(path)
    os._exit(0)
