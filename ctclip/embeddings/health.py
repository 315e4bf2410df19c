"""How much of the space an export uses, and transforms that use it better.

Published CT embeddings collapse to a handful of dimensions: every pair is alike, and similarity
says little. Centring removes what all cases share; whitening also gives rare directions a voice.
"""

from dataclasses import dataclass

import numpy as np

from ctclip.embeddings.table import EmbeddingTable

NUM_PAIRS = 20_000
"""Random pairs behind a mean cosine; its standard error is then below 0.01."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a set of vectors looks like from outside."""

    num_rows: int
    width: int
    effective_dimension: float
    """Participation ratio of the covariance's eigenvalues, (Σλ)² / Σλ²: 1 to ``width``."""

    mean_cosine: float
    """Between random pairs of different patients; near 1 the space has collapsed to a cone."""

    std_cosine: float

    def __str__(self) -> str:
        return (
            f"{self.num_rows} vectors of width {self.width}: effective dimension "
            f"{self.effective_dimension:.1f}, random pairs' cosine "
            f"{self.mean_cosine:.3f} ± {self.std_cosine:.3f}"
        )


def health(table: EmbeddingTable, seed: int = 0) -> Health:
    """Measure the effective dimension and the cosines of random pairs.

    Args:
        table: At least two patients.
        seed: Of the pairs.
    """
    vectors = table.vectors_for_reports
    cosines = random_pair_cosines(vectors, vectors, table.patient_id, table.patient_id, seed)
    return Health(
        num_rows=len(table),
        width=table.width,
        effective_dimension=effective_dimension(vectors),
        mean_cosine=float(cosines.mean()) if cosines.size else float("nan"),
        std_cosine=float(cosines.std()) if cosines.size else float("nan"),
    )


def effective_dimension(vectors: np.ndarray) -> float:
    """Participation ratio of the covariance of ``(N, E)`` vectors; 0 when all are equal."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    covariance = centred.T @ centred / len(centred)
    total = float(np.trace(covariance))
    return total**2 / float((covariance**2).sum()) if total > 1e-12 else 0.0


def random_pair_cosines(
    one: np.ndarray,
    other: np.ndarray,
    one_patient: list[str],
    other_patient: list[str],
    seed: int = 0,
) -> np.ndarray:
    """Cosines of up to ``NUM_PAIRS`` pairs of different patients.

    Args:
        one: ``(N, E)`` L2-normalised.
        other: ``(M, E)`` L2-normalised.
        one_patient: ``N`` patients.
        other_patient: ``M`` patients.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    left = rng.integers(len(one), size=NUM_PAIRS)
    right = rng.integers(len(other), size=NUM_PAIRS)
    strangers = np.array(one_patient)[left] != np.array(other_patient)[right]
    left, right = left[strangers], right[strangers]
    return np.einsum("pe,pe->p", one[left], other[right])
