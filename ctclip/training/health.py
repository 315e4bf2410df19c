"""Is the joint space in use, or has it collapsed? Numbers that no loss curve shows."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def embedding_health(image: Tensor, text: Tensor) -> dict[str, float]:
    """Describe paired embeddings.

    Args:
        image: ``(B, E)``, any length.
        text: ``(B, E)``, the paired texts.

    Returns:
        ``effective_dim``: participation ratio of the volumes' covariance, between 1 (a line) and
        ``min(B - 1, E)``; ``alignment``: mean squared distance of a pair; ``uniformity``: log mean
        Gaussian potential between volumes (Wang & Isola 2020), lower is more spread out;
        ``report_recall_1`` and ``_5``: how often a volume's own report is among the nearest of the
        batch (an equal report counts as its own).
    """
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    centred = image - image.mean(dim=0)
    # The Gram matrix has the covariance's non-zero eigenvalues and is the smaller one for small B.
    gram = centred @ centred.T
    total = gram.diagonal().sum()
    distance = torch.pdist(image).square()
    cosine = image @ text.T
    # Equal reports differ in the last bit of their cosines; they are not ahead of each other.
    # "Not below" instead of "above": what is no number finds nothing.
    rank = (~(cosine <= cosine.diagonal()[:, None] + 1e-6)).sum(dim=1)
    return {
        "effective_dim": float(total.square() / gram.square().sum().clamp(min=1e-12)),
        "alignment": float((image - text).square().sum(dim=-1).mean()),
        "report_recall_1": float((rank < 1).float().mean()),
        "report_recall_5": float((rank < 5).float().mean()),
        "uniformity": float(torch.log(torch.exp(-2.0 * distance).mean()))
        if len(image) > 1
        else 0.0,
    }
