"""The loss of the whole global batch with the memory of one micro-batch.

Gradient accumulation sums losses of small batches, and a contrastive loss of small batches has few
negatives. GradCache (Gao et al. 2021) is exact instead: embed every micro-batch without keeping
activations, compute the loss and its gradient with respect to the embeddings over the global
batch, then embed each micro-batch once more and hand that gradient to the towers. One micro-batch
needs no second time: embedded last, it keeps its activations until its backward, which comes first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

MicroBatch = TypeVar("MicroBatch")
Features = dict[str, Tensor]
Objective = Callable[[Features], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Accumulated:
    """What came of one step's forwards and backwards."""

    loss: Tensor
    """This rank's share, detached."""

    scalars: dict[str, float]
    features: Features
    """This rank's rows, detached."""

    usable: bool
    """Whether gradients were accumulated."""


def accumulate(
    engine: Any,
    micro_batches: Sequence[MicroBatch],
    forward: Callable[[MicroBatch], Features],
    objective: Objective,
    is_usable: Callable[[Tensor, Features], bool],
) -> Accumulated:
    """Accumulate the gradient of the global batch's loss in the engine's parameters.

    ``forward`` runs twice on each micro-batch but the first, so its randomness has to be a function
    of the micro-batch alone. Every forward must reach every trained parameter group, since ZeRO
    reduces a parameter's gradient in the last backward that it takes part in.

    Args:
        engine: DeepSpeed engine: ``backward`` and ``set_gradient_accumulation_boundary``.
        micro_batches: This rank's part of the global batch, in order.
        forward: Micro-batch to named features ``(n, ...)``. A name may be missing from some
            micro-batches; its rows are concatenated over those that have it.
        objective: Concatenated features (leaves that want gradients) to this rank's share of the
            loss, see :mod:`ctclip.losses`, and scalars to log.
        is_usable: Given the loss and the features with their gradients, whether to go on. Must
            answer the same on every rank. On False no backward through the towers happens.

    Returns:
        Loss, scalars to log and features; gradients are in the engine unless ``usable`` is false.
    """
    first, *others = micro_batches
    with torch.no_grad():
        embedded = [forward(micro_batch) for micro_batch in others]
    kept = forward(first)
    outputs = [kept, *embedded]

    names = list(dict.fromkeys(name for output in outputs for name in output))
    leaves = {
        name: torch.cat([output[name].detach() for output in outputs if name in output])
        .float()
        .requires_grad_()
        for name in names
    }
    loss, scalars = objective(leaves)
    loss.backward()
    usable = is_usable(loss.detach(), leaves)
    features = {name: leaf.detach() for name, leaf in leaves.items()}
    if not usable:
        return Accumulated(loss.detach(), scalars, features, usable)

    first_row = dict.fromkeys(names, 0)
    for index, micro_batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        engine.set_gradient_accumulation_boundary(is_last)
        output = kept if index == 0 else forward(micro_batch)
        surrogate = torch.zeros((), device=loss.device)
        for name, feature in output.items():
            rows = slice(first_row[name], first_row[name] + len(feature))
            first_row[name] = rows.stop
            gradient = leaves[name].grad
            if gradient is not None and feature.requires_grad:
                surrogate = surrogate + (feature.float() * gradient[rows]).sum()
        if surrogate.requires_grad:  # not where this micro-batch meets frozen towers only
            engine.backward(surrogate)
    return Accumulated(loss.detach(), scalars, features, usable)
