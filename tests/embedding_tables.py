"""Embedding tables of known content for tests."""

from collections.abc import Mapping

import numpy as np

from ctclip.embeddings import EmbeddingTable
from ctclip.findings import FINDINGS


def random_table(
    num_rows: int,
    width: int = 16,
    volumes_per_patient: int = 2,
    seed: int = 0,
    checkpoint: str = "a" * 64,
    fingerprint: str = "0123456789ab",
    fields: Mapping[str, list[str]] | None = None,
) -> EmbeddingTable:
    """Random unit vectors; every patient has one study of ``volumes_per_patient`` volumes."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_rows, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    patients = [row // volumes_per_patient for row in range(num_rows)]
    return EmbeddingTable(
        volume_id=[f"p{p}_a_{row % volumes_per_patient + 1}" for row, p in enumerate(patients)],
        study_id=[f"p{p}_a" for p in patients],
        patient_id=[f"p{p}" for p in patients],
        split=["valid"] * num_rows,
        vectors=vectors,
        labels=(rng.random((num_rows, len(FINDINGS))) < 0.3).astype(np.float32),
        provenance={"checkpoint": checkpoint, "fingerprint": fingerprint, "model": "test"},
        fields=dict(fields or {}),
    )
