"""Rank, world size and gather over the processes of a job; no-ops on a single process."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_initialised() -> bool:
    """Whether several processes may be talking to each other."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's index, 0 on a single process."""
    return dist.get_rank() if is_initialised() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes, 1 outside a distributed job."""
    return dist.get_world_size() if is_initialised() else 1


def launched_size() -> int:
    """How many processes the launcher started, known before they have joined each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's index on its own machine: the GPU it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_device() -> torch.device:
    """This process's GPU, or the CPU.

    From then on float32 means float32: cuDNN would convolve it with TF32's 10 bits of mantissa.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    # A scheduler may show each process one GPU only, which then is number 0 for all of them.
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for every process."""
    if is_initialised():
        dist.barrier()


class _GatherWithGrad(torch.autograd.Function):
    """Concatenate over ranks; every rank's loss sends its gradient back to the owner of a row."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather_with_grad(local: Tensor) -> Tensor:
    """Concatenate a tensor of equal shape over ranks, in rank order, keeping gradients exact.

    Args:
        local: ``(b, ...)``; every rank must hold the same ``b``.

    Returns:
        ``(world_size * b, ...)``. In backward, the gradients of all ranks' losses with respect to
        this rank's rows are summed.
    """
    return _GatherWithGrad.apply(local) if world_size() > 1 else local


def gather(local: Tensor) -> Tensor:
    """Concatenate a tensor of equal shape over ranks without gradients."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def gather_objects(local: Any) -> list[Any]:
    """One picklable object per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [local]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, local)
    return parts
