"""Embeddings become one scalar.

Every loss here returns *this rank's share*: averaged over ranks, value and gradient are those of
the global batch. Rows of other ranks come through :func:`ctclip.distributed.gather_with_grad`, so
a rank's loss reaches the embeddings that other ranks computed.

``b`` rows on this rank, ``B`` rows on all ranks, ``E`` embedding width, ``F`` findings.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ctclip import distributed


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    identity: Tensor,
    *,
    soft_targets: float = 0.0,
) -> Tensor:
    """Symmetric InfoNCE between CT volumes and their texts over the global batch.

    Two reconstructions of one study share one report, and a hospital's normal report is the same
    for many studies. Such pairs are neither positives nor negatives of each other: they are left
    out of the softmax instead of being pushed apart.

    Args:
        image: ``(b, E)``, L2-normalised, this rank's volumes.
        text: ``(b, E)``, L2-normalised, their texts in the same order.
        logit_scale: ``(1,)`` or scalar, ``1 / temperature``, already exponentiated.
        identity: ``(b,)`` or ``(b, K)`` int64. Two rows that agree in any column (same study, same
            report) ignore each other. Negative values agree with nothing.
        soft_targets: Share of the target that goes to other rows in proportion to how alike their
            texts are (0 = one-hot). A report that says nearly the same is a false negative.

    Returns:
        Scalar float32: mean over this rank's ``b`` volumes and ``b`` texts.

    Raises:
        ValueError: If the shapes of the arguments don't fit each other.
    """
    _check_pair(image, text)
    own, ignored = _ignored_pairs(identity, len(image))
    all_image = distributed.gather_with_grad(image.float())
    all_text = distributed.gather_with_grad(text.float())
    scale = logit_scale.float().reshape(())
    minus_infinity = float("-inf")
    per_image = (scale * image.float() @ all_text.T).masked_fill(ignored, minus_infinity)
    per_text = (scale * text.float() @ all_image.T).masked_fill(ignored, minus_infinity)
    if soft_targets == 0.0:
        return (F.cross_entropy(per_image, own) + F.cross_entropy(per_text, own)) / 2

    with torch.no_grad():
        alike = (scale * text.float() @ all_text.T).masked_fill(ignored, minus_infinity)
        target = soft_targets * alike.softmax(dim=1)
        target[torch.arange(len(own)), own] += 1.0 - soft_targets
    return (_soft_cross_entropy(per_image, target) + _soft_cross_entropy(per_text, target)) / 2


def siglip(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, identity: Tensor
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, Zhai et al. 2023) over the global batch.

    Args:
        image: ``(b, E)``, L2-normalised, this rank's volumes.
        text: ``(b, E)``, L2-normalised, their texts in the same order.
        logit_scale: ``1 / temperature``, already exponentiated.
        logit_bias: Scalar added to every logit; starts near ``-log(B)`` because one pair in ``B``
            is a positive.
        identity: As in :func:`info_nce`.

    Returns:
        Scalar float32: summed over the ``B`` texts, averaged over this rank's ``b`` volumes.

    Raises:
        ValueError: If the shapes of the arguments don't fit each other.
    """
    _check_pair(image, text)
    own, ignored = _ignored_pairs(identity, len(image))
    all_text = distributed.gather_with_grad(text.float())
    logits = logit_scale.float() * image.float() @ all_text.T + logit_bias.float()
    sign = torch.full_like(logits, -1.0)
    sign[torch.arange(len(own)), own] = 1.0
    return -F.logsigmoid(sign * logits).masked_fill(ignored, 0.0).sum() / len(image)


def opposite_sentence(
    image: Tensor,
    present: Tensor,
    absent: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    log_prior_odds: Tensor | None = None,
    silence: float = 0.0,
) -> Tensor:
    """Tell "X is present" from "X is not present" for the findings that a report speaks about.

    This is the question that zero-shot scoring asks, so the logit is the same: the scaled
    difference of the two cosines.

    Args:
        image: ``(b, E)``, L2-normalised.
        present: ``(F, E)``, L2-normalised texts that state each finding.
        absent: ``(F, E)``, L2-normalised texts that negate it.
        target: ``(b, F)``: 1 stated, 0 negated, nan not mentioned.
        logit_scale: ``1 / temperature``, already exponentiated.
        log_prior_odds: ``(F,)`` added to the logits, so that the embedding has to carry what a
            scan shows rather than how common a finding is.
        silence: Weight of "not mentioned" as a negation; 0 leaves it out.

    Returns:
        Scalar float32: binary cross-entropy, averaged over the (weighted) mentions of all ranks.
        Zero when there are none.

    Raises:
        ValueError: If the shapes of the arguments don't fit each other.
    """
    if target.shape != (len(image), len(present)) or present.shape != absent.shape:
        raise ValueError(
            f"opposite_sentence wants target (b, F) and present, absent (F, E), got "
            f"{tuple(target.shape)}, {tuple(present.shape)}, {tuple(absent.shape)}"
        )
    logits = logit_scale.float() * image.float() @ (present - absent).float().T
    if log_prior_odds is not None:
        logits = logits + log_prior_odds
    known = ~target.isnan()
    losses = F.binary_cross_entropy_with_logits(
        logits, torch.where(known, target, 0.0).to(logits.dtype), reduction="none"
    )
    weight = torch.where(known, 1.0, silence).to(logits.dtype)
    total_weight = weight.sum()
    world = distributed.world_size()
    if world > 1:
        dist.all_reduce(total_weight)
    return world * (losses * weight).sum() / total_weight.clamp(min=1.0)


def direction_overlap(present: Tensor, absent: Tensor) -> Tensor:
    """Mean squared cosine between the present-minus-absent directions of different findings.

    A text tower left to itself puts all of them on one axis, and a prompt pair then asks "is
    anything there?" whatever the finding. As a loss it keeps the questions apart.

    Args:
        present: ``(F, E)``, L2-normalised.
        absent: ``(F, E)``, L2-normalised.

    Returns:
        Scalar in [0, 1]: 0 when all directions are orthogonal, 1 when they share one axis.
    """
    cosine = _direction_cosines(present, absent)
    num_findings = len(cosine)
    off_diagonal = cosine.square().sum() - cosine.diagonal().square().sum()
    return off_diagonal / max(num_findings * (num_findings - 1), 1)


@torch.no_grad()
def direction_spread(present: Tensor, absent: Tensor) -> float:
    """Mean absolute cosine between the present-minus-absent directions of different findings.

    Args:
        present: ``(F, E)``, L2-normalised.
        absent: ``(F, E)``, L2-normalised.

    Returns:
        Between 0 (every finding has its own direction) and 1 (all findings share one).
    """
    cosine = _direction_cosines(present, absent).abs()
    num_findings = len(cosine)
    off_diagonal = cosine.sum() - cosine.diagonal().sum()
    return float(off_diagonal / max(num_findings * (num_findings - 1), 1))


def sentence_classes(text: Tensor, group: Tensor, logit_scale: float) -> Tensor:
    """Pull texts of one meaning together and push texts of different meanings apart.

    Supervised contrastive loss (Khosla et al. 2020) on text alone, one direction of meaning per
    (finding, polarity). It conditions the text tower before a scan is ever seen.

    Args:
        text: ``(n, E)``, L2-normalised.
        group: ``(n,)`` int64, the meaning of each text.
        logit_scale: ``1 / temperature``.

    Returns:
        Scalar float32; texts without a partner of their meaning are left out.
    """
    logits = logit_scale * text.float() @ text.float().T
    itself = torch.eye(len(text), dtype=torch.bool, device=text.device)
    logits = logits.masked_fill(itself, float("-inf"))
    partner = (group[:, None] == group[None, :]) & ~itself
    log_share = torch.where(partner, logits.log_softmax(dim=1), 0.0)
    per_text = log_share.sum(dim=1) / partner.sum(dim=1).clamp(min=1)
    has_partner = partner.any(dim=1)
    return -(per_text * has_partner).sum() / has_partner.sum().clamp(min=1)


def log_odds(rate: Tensor, *, floor: float = 0.01) -> Tensor:
    """Log odds of rates in [0, 1], kept ``floor`` away from certainty."""
    clipped = rate.clamp(floor, 1.0 - floor)
    return torch.log(clipped) - torch.log1p(-clipped)


def siglip_bias(global_batch: int) -> float:
    """Starting bias of :func:`siglip`: the log odds of one positive among ``global_batch``."""
    return -math.log(max(global_batch - 1, 1))


def _check_pair(image: Tensor, text: Tensor) -> None:
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(
            f"image and text must both be (b, E), got {tuple(image.shape)} and {tuple(text.shape)}"
        )


def _ignored_pairs(identity: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Column of each row's own pair ``(b,)``, and which pairs to leave out ``(b, B)``."""
    identity = identity.reshape(len(identity), -1)
    if len(identity) != rows:
        raise ValueError(f"identity has {len(identity)} rows for {rows} volumes")
    everyone = distributed.gather(identity)
    first = distributed.rank() * rows if distributed.world_size() > 1 else 0
    own = first + torch.arange(rows, device=identity.device)
    agree = (identity[:, None, :] == everyone[None, :, :]) & (identity[:, None, :] >= 0)
    ignored = agree.any(dim=2)
    ignored[torch.arange(rows), own] = False
    return own, ignored


def _soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    log_share = logits.log_softmax(dim=1)
    return -torch.where(target > 0, target * log_share, 0.0).sum(dim=1).mean()


def _direction_cosines(present: Tensor, absent: Tensor) -> Tensor:
    direction = F.normalize((present - absent).float(), dim=-1)
    return direction @ direction.T
