"""Teach the text tower the questions before a scan is seen.

A fresh text tower, and a pretrained one too, puts "effusion" and "no effusion" almost on one
point, and every present-minus-absent direction on one axis. Volumes then learn one thing: is
anything there? A few hundred steps on the training reports' own sentences, seconds of work, give
each finding its own direction first. No label table and no volume is used.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ctclip import distributed, losses
from ctclip.config import require_at_least, require_in, require_positive
from ctclip.progress import track
from ctclip.training.text_views import (
    SentenceBank,
    StudyText,
    TextViewConfig,
    polarity_table,
    prompts,
    report_view,
)

if TYPE_CHECKING:
    from ctclip.models.ctclip import CTCLIP
    from ctclip.models.text import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextWarmupConfig:
    """The text tower's own training before the first volume."""

    steps: int = 300
    """0 switches it off."""

    lr: float = 1e-3
    """For a small random BERT; a pretrained one wants about 2e-5."""

    batch_size: int = 32
    """Reports per step, beside one sentence pair per finding."""

    scale: float = 15.0
    """1 / temperature of the losses on cosines."""

    directions: float = 2.0
    """Weight of the overlap between the findings' present-minus-absent directions."""

    template_share: float = 0.5

    def __post_init__(self) -> None:
        require_at_least(self, "text_warmup.", 0, "steps", "directions")
        require_at_least(self, "text_warmup.", 1, "batch_size")
        require_positive(self, "text_warmup.", "lr", "scale")
        require_in(self, "text_warmup.", 0, 1, "template_share")


def warm_up(
    model: "CTCLIP",
    tokenizer: "Tokenizer",
    studies: Sequence[StudyText],
    bank: SentenceBank,
    config: TextWarmupConfig,
    views: TextViewConfig,
    *,
    silence: float,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Train the text tower on the training reports alone.

    Three aims at once: sentences of one (finding, polarity) lie together and apart from all
    others; the present-minus-absent directions of different findings are orthogonal; and a whole
    report lies on the side of each direction that its own sentences say.

    Args:
        model: Its text tower is changed in place, the volume tower is not touched.
        tokenizer: The model's.
        studies: Training reports.
        bank: Sentences of the same reports.
        config: How long and how hard.
        views: How a report becomes one text.
        silence: See :class:`ctclip.training.objective.LossConfig`.
        seed: Makes the warm-up repeatable and the same on every rank.
        device: Where the model is.

    Returns:
        ``spread_before`` and ``spread_after``: prompt-direction spread of the standard prompts.
    """
    before = prompt_spread(model, tokenizer, device)
    if config.steps == 0:
        return {"spread_before": before, "spread_after": before}
    parameters = [p for p in model.text.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.lr,
        total_steps=config.steps,
        pct_start=0.2 if config.steps == 10 else 0.1,  # it divides by 0 where the rise is one step
    )
    rate = torch.as_tensor(bank.rate(silence), dtype=torch.float32, device=device)
    log_prior_odds = losses.log_odds(rate)
    rng = np.random.default_rng([seed, 20_260])
    torch.manual_seed(seed)
    model.train()

    def embed(texts: list[str]) -> torch.Tensor:
        return F.normalize(model.encode_text(tokenizer(texts).to(device)).float(), dim=-1)

    hidden = not distributed.is_main()
    for _ in track(range(config.steps), config.steps, "text warm-up", "step", hidden=hidden):
        first, second = (bank.pairs(rng, config.template_share) for _ in range(2))
        # Encoded apart: in one batch, every sentence would be padded to the longest report.
        sentences = embed([*first[0], *first[1], *second[0], *second[1]])
        chosen = [studies[i] for i in rng.integers(len(studies), size=config.batch_size)]
        reports = embed([report_view(study, views, rng) for study in chosen])
        num_sentences = 2 * len(first[0])
        meaning = torch.arange(num_sentences, device=device).repeat(2)
        loss = losses.sentence_classes(sentences, meaning, config.scale)
        for present, absent in (half.chunk(2) for half in sentences.chunk(2)):
            loss = loss + config.directions * losses.direction_overlap(present, absent)
            loss = (
                loss
                + losses.opposite_sentence(
                    reports,
                    present,
                    absent,
                    torch.from_numpy(polarity_table(chosen)).to(device),
                    torch.tensor(config.scale),
                    log_prior_odds,
                    silence,
                )
                / 2
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    after = prompt_spread(model, tokenizer, device)
    if not hidden:
        logger.info(
            "text warm-up: prompt-direction spread %.2f -> %.2f "
            "(0 = every finding its own direction)",
            before,
            after,
        )
    return {"spread_before": before, "spread_after": after}


@torch.no_grad()
def prompt_spread(model: "CTCLIP", tokenizer: "Tokenizer", device: torch.device) -> float:
    """Mean absolute cosine between the findings' directions under the standard prompts."""
    was_training = model.training
    model.eval()
    present, absent = prompts()
    embedded = model.encode_text(tokenizer([*present, *absent]).to(device), normalize=True)
    model.train(was_training)
    return losses.direction_spread(*embedded.float().chunk(2))
