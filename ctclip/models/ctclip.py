"""The two towers joined: volumes and reports in one space, under open_clip's names.

B batch, C channels, D H W voxels, L tokens of text, E embedding width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from ctclip.config import require_at_least, require_finite
from ctclip.models.ctvit import CTViT, CTViTConfig
from ctclip.models.inflate import inflate_from
from ctclip.models.text import TextConfig, build_text_tower, freeze, set_trainable
from ctclip.models.vit3d import VisionConfig, ViT3D

if TYPE_CHECKING:
    from open_clip.hf_model import HFTextEncoder

MAX_LOGIT_SCALE = math.log(100.0)
"""Bound of CLIP (Radford et al. 2021); without it the scale runs away on small data."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Both towers and the joint space."""

    embed_dim: int = 512
    vision: VisionConfig = field(default_factory=VisionConfig)

    ctvit: CTViTConfig | None = None
    """Set to put CT-CLIP's volume tower in the place of ``vision``."""

    text: TextConfig = field(default_factory=TextConfig)

    logit_scale_init: float = math.log(1 / 0.07)
    """Log of the scale that multiplies cosines in the loss."""

    logit_bias_init: float | None = None
    """Set for a sigmoid loss (SigLIP uses -10); None leaves the bias out."""

    def __post_init__(self) -> None:
        require_at_least(self, "model.", 1, "embed_dim")
        require_finite(self, "model.", "logit_scale_init", "logit_bias_init")

    @property
    def channels(self) -> int:
        """HU windows that the volume tower takes."""
        return self.ctvit.channels if self.ctvit is not None else self.vision.channels


class CTCLIP(nn.Module):
    """A volume tower and a text tower that share an embedding space.

    Attribute and method names are open_clip's, so its losses, trainers and zero-shot classifier
    builder run on it unchanged.

    Args:
        visual: Tower with ``forward``, ``forward_readouts`` and ``patches``.
        text: Tower from token ids to embeddings.
        logit_scale_init: Log of the logit scale at the start.
        logit_bias_init: Logit bias at the start; ``None`` for no bias.
    """

    def __init__(
        self,
        visual: "ViT3D | CTViT",
        text: "HFTextEncoder",
        *,
        logit_scale_init: float = math.log(1 / 0.07),
        logit_bias_init: float | None = None,
    ) -> None:
        super().__init__()
        self.visual: ViT3D | CTViT = visual
        self.text: HFTextEncoder = text
        # Shape (1,): DeepSpeed can't broadcast 0-dim parameters.
        self.logit_scale = nn.Parameter(torch.full((1,), float(logit_scale_init)))
        self.logit_bias: nn.Parameter | None = None
        if logit_bias_init is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), float(logit_bias_init)))
        self.output_dict = True

    @property
    def context_length(self) -> int:
        """Longest text in tokens."""
        return int(self.text.context_length)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.text.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embed volumes for comparison with sentences and prompts.

        Args:
            image: ``(B, C, D, H, W)`` in [-1, 1], as ``ctclip.data.volume.window`` makes it.
            normalize: Scale each embedding to length 1.

        Returns:
            ``(B, E)``.

        Raises:
            ValueError: If shape, type or values can't be a windowed CT.
        """
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_image_readouts(self, image: Tensor, normalize: bool = False) -> dict[str, Tensor]:
        """Embed volumes once for prompts and once for whole reports.

        Returns:
            ``{"prompt": (B, E), "report": (B, E)}``; the same tensor twice if there is only one
            read-out.
        """
        features = self.visual.forward_readouts(image)
        if normalize:
            features = {name: F.normalize(value, dim=-1) for name, value in features.items()}
        return {"prompt": features["prompt"], "report": features.get("report", features["prompt"])}

    def encode_patches(self, image: Tensor) -> Tensor:
        """Embed every patch in the joint space, ``(B, d, h, w, E)``, not normalised.

        With mean and attention pooling (and in CT-CLIP) the mean over patches is the embedding of
        :meth:`encode_image` exactly: a prompt's score splits over regions.
        """
        return self.visual.patches(image)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embed token ids ``(B, L)`` into ``(B, E)``."""
        if not torch.compiler.is_compiling() and text.shape[-1] > self.context_length:
            raise ValueError(
                f"text has {text.shape[-1]} tokens, the model reads {self.context_length}; use the "
                "tokenizer that belongs to the checkpoint"
            )
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def scale(self) -> Tensor:
        """The factor on cosines, ``(1,)``.

        Clamped here and not by overwriting the parameter after a step: under ZeRO such writes are
        lost, because the optimiser holds its own copy.
        """
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled similarities ``(B_image, B_text)`` and their transpose."""
        cosines = self.encode_image(image, normalize=True) @ self.encode_text(text, True).T
        logits = self.scale() * cosines
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        """Embed a batch of pairs, normalised; either side may be left out.

        Returns:
            ``image_features`` and ``text_features`` ``(B, E)``, ``logit_scale`` ``(1,)`` already
            exponentiated, ``logit_bias`` if there is one, and ``report_image_features`` if the
            tower has two read-outs.
        """
        output: dict[str, Tensor] = {"logit_scale": self.scale()}
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        if image is not None:
            readouts = self.encode_image_readouts(image, normalize=True)
            output["image_features"] = readouts["prompt"]
            if readouts["report"] is not readouts["prompt"]:
                output["report_image_features"] = readouts["report"]
        if text is not None:
            output["text_features"] = self.encode_text(text, normalize=True)
        return output

    def set_grad_checkpointing(
        self, enable: bool = True, context_fn: Callable[[], Any] = noop_context_fn
    ) -> None:
        """Recompute activations in backward, in both towers.

        Args:
            enable: Or keep them all.
            context_fn: Contexts of the text tower's forward and its repetition, as
                ``torch.utils.checkpoint`` takes them; the volume tower has no dropout to repeat.
        """
        self.visual.set_grad_checkpointing(enable)
        bert: Any = self.text.transformer
        if enable:
            options = {"use_reentrant": False, "context_fn": context_fn}
            bert.gradient_checkpointing_enable(options)
        else:
            bert.gradient_checkpointing_disable()

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the volume tower, projection included (open_clip's name)."""
        if unlocked_groups:
            raise ValueError("only the whole volume tower can be locked")
        freeze(self.visual)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower except its projection and its last layers (open_clip's name)."""
        config = TextConfig(
            train="last-n" if unlocked_layers else "frozen", train_layers=unlocked_layers or 1
        )
        set_trainable(self.text, config)

    def no_weight_decay(self) -> set[str]:
        """Parameters that must not shrink: vectors, positions, learned tokens."""
        tables = ("prefix", "queries", "positions")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim < 2 or any(table in name for table in tables)
        }


def build_model(
    config: ModelConfig,
    *,
    hf_config: dict[str, Any] | None = None,
    pretrained_text: bool = True,
) -> CTCLIP:
    """Build the model that a config describes.

    Args:
        config: Both towers.
        hf_config: Full config of the BERT, as a checkpoint stores it; nothing is then downloaded,
            for neither tower.
        pretrained_text: Load the named BERT's weights.

    Returns:
        A model in training mode, fp32, on the CPU.
    """
    visual: ViT3D | CTViT
    if config.ctvit is not None:
        visual = CTViT.from_config(config.ctvit, config.embed_dim)
    else:
        visual = ViT3D.from_config(config.vision, config.embed_dim)
        if config.vision.inflate_from is not None and hf_config is None:
            inflate_from(visual, config.vision.inflate_from)
    return CTCLIP(
        visual,
        build_text_tower(
            config.text, config.embed_dim, hf_config=hf_config, pretrained=pretrained_text
        ),
        logit_scale_init=config.logit_scale_init,
        logit_bias_init=config.logit_bias_init,
    )
