"""From tokens to one embedding: mean, CLS token, or attention with learned queries.

A read-out owns its projection into the joint space. ``shares`` splits the embedding over patches.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

READOUTS = ("prompt", "report")
"""Names of the read-outs: one for sentences and prompts, one for whole reports."""


class MeanReadout(nn.Module):
    """Project the mean of the patch tokens."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = _projection(width, embed_dim)

    def forward(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """``(B, P, M)`` and ``(B, N, M)`` to ``(B, E)``."""
        return self.proj(patches.mean(dim=1))

    def shares(self, patches: Tensor) -> Tensor:
        """``(B, N, E)`` whose mean over N is the embedding."""
        return self.proj(patches)


class ClsReadout(nn.Module):
    """Project one of the prefix tokens."""

    def __init__(self, width: int, embed_dim: int, token: int) -> None:
        super().__init__()
        self.token = token
        self.proj = _projection(width, embed_dim)

    def forward(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """``(B, P, M)`` and ``(B, N, M)`` to ``(B, E)``."""
        return self.proj(prefix[:, self.token])

    def shares(self, patches: Tensor) -> Tensor:
        """``(B, N, E)``: each token projected as the CLS token is; not a split of the embedding."""
        return self.proj(patches)


class AttentionReadout(nn.Module):
    """Learned queries look for their findings; what each saw has its own projection.

    A mean over thousands of tokens dilutes a nodule that fills one of them; a query that attends to
    it doesn't. Giving every query its own block of the projection lets findings keep apart.
    """

    def __init__(self, width: int, embed_dim: int, heads: int, queries: int) -> None:
        super().__init__()
        self.heads = heads
        # Unit variance: keys have it too, so queries differ in what they see from the first step.
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.to_kv = nn.Linear(width, 2 * width)
        nn.init.xavier_uniform_(self.to_kv.weight[:width])
        nn.init.xavier_uniform_(self.to_kv.weight[width:])
        nn.init.zeros_(self.to_kv.bias)
        self.proj = _projection(queries * width, embed_dim)

    def _query_key_value(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kv = rearrange(self.to_kv(patches), "b n (two g c) -> two b g n c", two=2, g=self.heads)
        q = rearrange(self.queries.to(patches.dtype), "q (g c) -> 1 g q c", g=self.heads)
        return q.expand(len(patches), -1, -1, -1), kv[0], kv[1]

    def forward(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """``(B, P, M)`` and ``(B, N, M)`` to ``(B, E)``."""
        seen = F.scaled_dot_product_attention(*self._query_key_value(patches))
        return self.proj(rearrange(seen, "b g q c -> b (q g c)"))

    def shares(self, patches: Tensor) -> Tensor:
        """``(B, N, E)`` whose mean over N is the embedding."""
        q, k, v = self._query_key_value(patches)
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        blocks = rearrange(self.proj.weight, "e (q m) -> q m e", q=q.shape[2])
        total = patches.new_zeros(*patches.shape[:2], blocks.shape[-1])
        for i, block in enumerate(blocks):
            total = total + rearrange(weights[:, :, i, :, None] * v, "b g n c -> b n (g c)") @ block
        return total * patches.shape[1]


def make_readout(
    pooling: Literal["attention", "mean", "cls"],
    width: int,
    embed_dim: int,
    heads: int,
    queries: int,
    token: int,
) -> nn.Module:
    """Build one read-out; ``token`` is its CLS token's index."""
    match pooling:
        case "mean":
            return MeanReadout(width, embed_dim)
        case "cls":
            return ClsReadout(width, embed_dim, token)
        case "attention":
            return AttentionReadout(width, embed_dim, heads, queries)


def _projection(width: int, embed_dim: int) -> nn.Linear:
    proj = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(proj.weight, std=width**-0.5)
    return proj
