"""Planted truth: embeddings in which each finding is visible to a chosen degree.

What tests and benchmarks of the audit and of the train-set fit measure themselves against.
"""

from typing import Literal

import numpy as np

from ctclip.embeddings import EmbeddingTable
from ctclip.findings import FINDINGS


def table(
    n: int = 1500,
    *,
    width: int = 64,
    separation: float | np.ndarray = 4.0,
    prevalence: float | np.ndarray = 0.2,
    seed: int = 0,
    split: str = "train",
) -> EmbeddingTable:
    """Two volumes per patient; a finding moves the embedding along a direction of its own.

    Args:
        n: Number of volumes.
        width: Embedding width ``E``, at least 18.
        separation: How far, in standard deviations of the noise along that direction; one number
            or one per finding. 0 makes a finding invisible.
        prevalence: One number or one per finding.
        seed: Of patients and noise; the directions are always the same.
        split: Name of the split, and prefix of the identifiers.
    """
    rng = np.random.default_rng(seed)
    patient = np.arange(n) // 2
    labels = (rng.random((n // 2 + 1, 18)) < prevalence)[patient]
    shift = labels * np.broadcast_to(separation, 18)
    vectors = rng.normal(size=(n, width)) + shift @ directions(width)
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


def directions(width: int) -> np.ndarray:
    """``(18, E)`` orthonormal: where each finding moves an embedding."""
    basis: np.ndarray = np.linalg.qr(np.random.default_rng(99).normal(size=(width, width)))[0]
    return basis[: len(FINDINGS)]


def corrupt(
    labels: np.ndarray, rate: float, kind: Literal["flip", "drop"], seed: int = 0
) -> np.ndarray:
    """Choose labels to make wrong.

    Args:
        labels: ``(N,)`` of one finding.
        rate: Share of all labels ("flip") or of the positive ones ("drop").
        kind: "flip" or "drop".
        seed: Of the choice.

    Returns:
        Their rows.
    """
    rng = np.random.default_rng(seed)
    pool = np.arange(len(labels)) if kind == "flip" else np.flatnonzero(labels == 1.0)
    return rng.choice(pool, round(rate * len(pool)), replace=False)
