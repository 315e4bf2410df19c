"""Dropout whose mask belongs to the sample, not to the process that happens to hold it.

torch draws dropout masks from one stream per process, so the same study gets another mask when the
batch is split differently. Here the mask is a hash of (seed, step, sample, layer, position):
training is then the same on any number of processes and micro-batches, the second forward of
GradCache repeats the first, and resuming needs no generator state.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctclip.models.bert_family import is_attention

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass
class SampleKeys:
    """The keys of the rows now passing through the network, shared by all its dropout layers."""

    keys: Tensor | None = None
    """``(B,)`` int64, one per row; None falls back on torch's dropout."""

    def kept_for_backward(
        self,
    ) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """``context_fn`` of activation checkpointing: the repetition gets the forward's keys."""
        return contextlib.nullcontext(), self._holding(self.keys)

    @contextlib.contextmanager
    def _holding(self, keys: Tensor | None) -> Iterator[None]:
        before, self.keys = self.keys, keys
        try:
            yield
        finally:
            self.keys = before


class SampleDropout(nn.Module):
    """Drop-in for ``nn.Dropout`` with one reproducible mask per row.

    Args:
        p: Share of elements that is zeroed.
        layer: Distinguishes the layers of one network.
        sample_keys: Where the rows' keys are found during forward.
    """

    def __init__(self, p: float, layer: int, sample_keys: SampleKeys) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.sample_keys = sample_keys

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share ``p`` of ``x`` ``(B * k, ...)`` and rescale the rest; identity in eval."""
        if not self.training or self.p == 0.0:
            return x
        keys = self.sample_keys.keys
        if keys is None:
            return nn.functional.dropout(x, self.p)
        columns = x.numel() // len(keys)
        # Each hash gives four elements their 16 bits: a quarter of the work of one hash for each.
        position = torch.arange(-(-columns // 4), device=x.device)
        counter = keys[:, None] * _MIX_1 + (position * 65_537 + self.layer) * _GOLDEN
        bits = splitmix64(counter).view(torch.int16)[:, :columns].reshape(x.shape)
        dropped = round(self.p * 2**16)
        return torch.where(bits >= dropped - 2**15, x / (1.0 - dropped / 2**16), 0.0)


def make_reproducible(model: nn.Module) -> SampleKeys:
    """Replace every ``nn.Dropout`` of a model; weights and state dict stay as they are.

    Dropout inside attention is switched off: the fused kernel draws its own mask, and DeBERTa's
    distances are shared by all rows.

    Returns:
        The object in which the caller sets the keys of the rows before a forward.
    """
    sample_keys = SampleKeys()
    layer = 0
    for module in list(model.modules()):
        in_attention = is_attention(module)
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                p = 0.0 if in_attention else child.p
                setattr(module, name, SampleDropout(p, layer, sample_keys))
                layer += 1
    return sample_keys


def splitmix64(x: Tensor) -> Tensor:
    """Scramble int64 counters into uniform 64-bit patterns (Steele et al. 2014)."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
