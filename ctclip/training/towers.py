"""The two towers as the engine sees them: one forward from a micro-batch to its features."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ctclip.training.dropout import make_reproducible, splitmix64
from ctclip.training.grad_cache import Features

if TYPE_CHECKING:
    from ctclip.models.ctclip import CTCLIP


@dataclass(frozen=True)
class MicroBatch:
    """What passes through the towers at once."""

    volume: Callable[[], Tensor]
    """Gives ``(m, C, D, H, W)`` in [-1, 1] on the device; called in every forward, so that only
    the micro-batch at hand is there."""

    seed: int
    """Of what isn't dropout but random."""

    texts: dict[str, Tensor]
    """Token ids ``(n, L)`` by view: ``report``, ``sentence`` (m rows), ``prompts`` (2F rows)."""

    keys: dict[str, Tensor]
    """Per view and for ``volume``: ``(n,)`` int64 keys of the rows' dropout masks."""


class Towers(nn.Module):
    """Both towers behind one forward, so that one engine holds all parameters.

    Args:
        model: The model; its state dict is the part of this module's under ``model.``.
        precision: bf16 runs the towers under autocast; features come back in float32.
        checkpointing: Recompute activations in backward instead of keeping them.
    """

    def __init__(
        self, model: "CTCLIP", precision: Literal["fp32", "bf16"], *, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._bf16 = precision == "bf16"
        self._sample_keys = make_reproducible(model)
        if checkpointing:
            model.set_grad_checkpointing(context_fn=self._sample_keys.kept_for_backward)

    def forward(self, batch: MicroBatch) -> Features:
        """Embed a micro-batch.

        Returns:
            ``image_prompt`` and ``image_report`` ``(m, E)``, one entry per text view, and
            ``logit_scale`` ``(1,)`` exponentiated when the micro-batch holds ``prompts`` (the last
            one of a step does). Float32, not normalised.
        """
        volume = batch.volume()
        with torch.autocast(volume.device.type, torch.bfloat16, enabled=self._bf16):
            # What isn't dropout (patch dropout) draws from torch's stream: restart it, so that
            # GradCache's second forward of this micro-batch repeats the first.
            torch.manual_seed(batch.seed)
            self._sample_keys.keys = batch.keys["volume"]
            readouts = self.model.encode_image_readouts(volume, normalize=False)
            features = {f"image_{name}": feature for name, feature in readouts.items()}
            for view, tokens in batch.texts.items():
                self._sample_keys.keys = batch.keys[view]
                features[view] = self.model.encode_text(tokens, normalize=False)
            self._sample_keys.keys = None
        features = {name: feature.float() for name, feature in features.items()}
        if "prompts" in batch.texts:
            features["logit_scale"] = self.model.scale()
            if self.model.logit_bias is not None:
                features["logit_bias"] = self.model.logit_bias
        return features


def row_keys(seed: int, step: int, view: str, rows: Tensor) -> Tensor:
    """Keys of the rows' dropout masks in one step.

    Args:
        seed: Of the run.
        step: Optimiser step.
        view: Which input of the row: two texts of one study get different masks.
        rows: ``(n,)`` int64, what identifies a row whatever rank holds it.

    Returns:
        ``(n,)`` int64.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{view}".encode(), digest_size=8).digest()
    salt = int.from_bytes(digest, "big", signed=True)
    return splitmix64(rows ^ salt)
