"""What a pretraining step asks of the embeddings: the recipe's terms and their weights."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip import losses
from ctclip.config import require_at_least, require_in
from ctclip.training.grad_cache import Features


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which terms, and how much of each. A weight of 0 switches a term off."""

    contrastive: Literal["info_nce", "siglip"] = "info_nce"

    report: float = 1.0
    """Volume against whole report (CLIP; CT-CLIP, Hamamci et al. 2024)."""

    sentence: float = 0.0
    """Volume against one random sentence of its report (HLIP's sentence dropout, 2025)."""

    opposite: float = 1.0
    """"X is present" against "X is not present" for what the report mentions (COLIPRI, 2026)."""

    directions: float = 0.1
    """Keeps the present-minus-absent directions of different findings orthogonal. Matters only
    while the text tower learns."""

    soft_targets: float = 0.0
    """Share of the contrastive target that goes to studies with similar reports."""

    ignore_normal_pairs: bool = False
    """Leave pairs of two normal studies out of the softmax: each other's report fits both."""

    silence: float = 0.5
    """Weight of "not mentioned" as a negation in the opposite-sentence term: radiologists rarely
    write down what isn't there, but they do overlook things."""

    prior_odds: bool = True
    """Add each finding's log odds among mentions to its opposite-sentence logit."""

    label_informed: bool = False
    """Take the opposite-sentence targets from the label table (1, 0, empty = unknown) instead of
    the report's own mentions. Checkpoints and results are marked; not comparable with label-free
    ones."""

    def __post_init__(self) -> None:
        weights = ("report", "sentence", "opposite", "directions", "silence")
        require_at_least(self, "loss.", 0, *weights)
        require_in(self, "loss.", 0, 1, "soft_targets")
        if self.report == self.sentence == self.opposite == 0.0:
            raise ValueError("loss.report, loss.sentence and loss.opposite are all 0: no loss left")
        self._refuse_what_nothing_reads()

    def _refuse_what_nothing_reads(self) -> None:
        if self.contrastive == "siglip" and self.soft_targets:
            raise ValueError(
                f"loss.soft_targets={self.soft_targets} shapes the target of a softmax, and "
                f"loss.contrastive=siglip has none; set loss.soft_targets=0 or "
                f"loss.contrastive=info_nce"
            )
        contrasts = {
            "contrastive=siglip": self.contrastive == "siglip",
            f"soft_targets={self.soft_targets}": self.soft_targets > 0,
            "ignore_normal_pairs=true": self.ignore_normal_pairs,
        }
        for setting, is_set in contrasts.items():
            if is_set and self.report == self.sentence == 0.0:
                raise ValueError(
                    f"loss.{setting} is for the contrast with other studies, and its terms "
                    f"loss.report and loss.sentence are both 0; remove it or give one a weight"
                )
        if self.label_informed and self.opposite == 0.0:
            raise ValueError(
                "loss.label_informed=true is for the opposite sentences, and loss.opposite is 0: "
                "no label would be used; remove it or give loss.opposite a weight"
            )


@dataclass(frozen=True)
class Targets:
    """What this rank's rows are compared with."""

    identity: Tensor
    """``(b, K)`` int64, see :func:`ctclip.losses.info_nce`: study, report as written, report as
    shown, normality."""

    sentence_identity: Tensor
    """``(b, K)`` int64: the same with the sentence in place of the report as shown."""

    polarity: Tensor
    """``(b, F)`` 1, 0 or nan."""


class Objective:
    """The recipe as a function of features and targets.

    Args:
        config: Terms and weights.
        finding_rate: ``(F,)`` how often a finding is stated, among what counts as mentioned.
    """

    def __init__(self, config: LossConfig, finding_rate: Tensor) -> None:
        self._config = config
        self._log_prior_odds = losses.log_odds(finding_rate) if config.prior_odds else None

    def __call__(self, features: Features, targets: Targets) -> tuple[Tensor, dict[str, float]]:
        """Weigh the terms.

        Args:
            features: ``image_prompt``, ``image_report`` ``(b, E)``; ``report``, ``sentence``
                ``(b, E)``; ``prompts`` ``(2F, E)``, present before absent; ``logit_scale``
                ``(1,)`` exponentiated; ``logit_bias`` ``(1,)``. Not normalised. Terms that are
                off may be missing.
            targets: What the rows are compared with.

        Returns:
            This rank's share of the loss, and each term's value for the log.
        """
        config = self._config
        unit = {
            name: F.normalize(feature, dim=-1)
            for name, feature in features.items()
            if not name.startswith("logit")
        }
        scale = features["logit_scale"]
        terms: dict[str, tuple[float, Tensor]] = {}
        for name, readout, identity in (
            ("report", "image_report", targets.identity),
            ("sentence", "image_prompt", targets.sentence_identity),
        ):
            weight = getattr(config, name)
            if weight:
                terms[name] = (
                    weight,
                    self._contrast(unit[readout], unit[name], features, identity),
                )
        if config.opposite or config.directions:
            present, absent = unit["prompts"].chunk(2)
            if config.opposite:
                image = unit["image_prompt"]
                prior = self._log_prior_odds
                silence = 0.0 if config.label_informed else config.silence
                value = losses.opposite_sentence(
                    image, present, absent, targets.polarity, scale, prior, silence
                )
                terms["opposite"] = (config.opposite, value)
            if config.directions:
                overlap = losses.direction_overlap(present, absent)
                terms["directions"] = (config.directions, overlap)
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        scalars = {f"loss_{name}": value.item() for name, (_, value) in terms.items()}
        return total, scalars

    def _contrast(
        self, image: Tensor, text: Tensor, features: Features, identity: Tensor
    ) -> Tensor:
        scale = features["logit_scale"]
        if self._config.contrastive == "siglip":
            return losses.siglip(image, text, scale, features["logit_bias"], identity)
        return losses.info_nce(image, text, scale, identity, soft_targets=self._config.soft_targets)
