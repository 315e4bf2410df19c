"""How much arithmetic a training step is, counted rather than guessed."""

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from ctclip.models.ctclip import CTCLIP

TYPICAL_TOKENS = 200
"""A CT-RATE report's length in CXR-BERT's tokens; the text tower is a small share of a step."""

BACKWARD = 2.0
"""A backward costs two forwards: one product for the inputs' gradient, one for the weights'.
A frozen tower has none."""


def per_study(model: "CTCLIP", size: tuple[int, int, int], channels: int) -> float:
    """FLOPs of one study, forward and backward, a multiply-add counted as two.

    Recomputation (activation checkpointing, GradCache's first forward) is not counted: utilisation
    is measured against the work that the result needs.

    Args:
        model: On the device that it trains on.
        size: Voxels (D, H, W) of the input.
        channels: HU windows.
    """
    was_training = model.training
    model.eval()
    if getattr(model.visual, "patch_dropout", 0.0) > 0.0:
        model.visual.train()  # it sees a share of the patches only
    volume = torch.zeros(1, channels, *size, device=model.device)
    tokens = torch.ones(1, min(TYPICAL_TOKENS, model.context_length), dtype=torch.long)
    total = 0.0
    for tower, encode, data in (
        (model.visual, model.encode_image, volume),
        (model.text, model.encode_text, tokens.to(model.device)),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encode(data)
        learns = any(parameter.requires_grad for parameter in tower.parameters())
        total += (1.0 + BACKWARD * learns) * counter.get_total_flops()
    model.train(was_training)
    return total
