"""Embeddings in which each finding is visible to a chosen degree, for tests and benchmarks."""

import numpy as np

from ctclip.embeddings import EmbeddingTable
from ctclip.findings import FINDINGS


def table(
    n: int = 1500,
    width: int = 64,
    separation: float | np.ndarray = 4.0,
    prevalence: float = 0.2,
    seed: int = 0,
    split: str = "train",
) -> EmbeddingTable:
    """Two volumes per patient; a finding moves the embedding along a direction of its own.

    Args:
        separation: How far, in standard deviations of the noise along that direction; one number
            or one per finding. 0 makes a finding invisible.
    """
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(99).normal(size=(width, width)))[0][:18]
    patient = np.arange(n) // 2
    labels = (rng.random((n // 2 + 1, 18)) < prevalence)[patient]
    shift = labels * np.broadcast_to(separation, 18)
    vectors = rng.normal(size=(n, width)) + shift @ directions
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return EmbeddingTable(
        volume_id=[f"{split}_{i}_a_1" for i in range(n)],
        study_id=[f"{split}_{i}_a" for i in range(n)],
        patient_id=[f"{split}_{i}" for i in patient],
        split=[split] * n,
        vectors=vectors.astype(np.float32),
        labels=labels.astype(np.float32),
        provenance={"checkpoint": "0" * 64, "fingerprint": "known", "model": "known"},
    )


def corrupt(labels: np.ndarray, rate: float, kind: str, seed: int = 0) -> np.ndarray:
    """Rows of ``labels`` (N,) to make wrong: a share of all ("flip") or of positives ("drop")."""
    rng = np.random.default_rng(seed)
    pool = np.arange(len(labels)) if kind == "flip" else np.flatnonzero(labels == 1.0)
    return rng.choice(pool, round(rate * len(pool)), replace=False)


EMPHYSEMA = FINDINGS.index("Emphysema")
