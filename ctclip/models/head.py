"""A linear classifier on embeddings, beside the joint space: CT-CLIP's ClassFine, linear probes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LinearHead(nn.Module):
    """Normalised image embeddings to one logit for each finding.

    Args:
        embed_dim: E.
        findings: Names in the order of the outputs.
        relu: Cut negative coordinates first, as ClassFine does.
    """

    def __init__(self, embed_dim: int, findings: Sequence[str], relu: bool = False) -> None:
        super().__init__()
        self.findings = tuple(findings)
        self.relu = relu
        self.linear = nn.Linear(embed_dim, len(self.findings))

    def forward(self, embeddings: Tensor) -> Tensor:
        """``(B, E)``, L2-normalised, to logits ``(B, findings)``."""
        return self.linear(torch.relu(embeddings) if self.relu else embeddings)
