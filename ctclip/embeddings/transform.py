"""Centring and whitening of a joint space, fitted on training data and stored with the vectors."""

import hashlib
import io
from dataclasses import dataclass
from typing import Literal

import numpy as np

SHRINKAGE = 0.1
"""Share of the mean variance added to every direction, so that noise isn't blown up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Transform:
    """Subtract each modality's mean, optionally decorrelate, and normalise again.

    Volumes and texts sit apart in a contrastive space, so each has its own mean; where no
    reports were seen in fitting, texts keep theirs.
    """

    volume_mean: np.ndarray
    """``(E,)`` float32."""

    text_mean: np.ndarray
    """``(E,)`` float32, zeros where no reports were seen."""

    matrix: np.ndarray | None = None
    """``(E, E)`` float16, None for centring alone. Half precision halves the header."""

    def __call__(self, vectors: np.ndarray, kind: Literal["volume", "report"]) -> np.ndarray:
        """Transform ``(N, E)`` vectors; the result is float32 and L2-normalised."""
        moved = vectors - (self.volume_mean if kind == "volume" else self.text_mean)
        if self.matrix is not None:
            moved = moved @ self.matrix.astype(np.float32)
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        return (moved / np.maximum(norms, 1e-12)).astype(np.float32)

    @property
    def name(self) -> str:
        """What kind it is, with a hash of its numbers."""
        kind = "centred" if self.matrix is None else "whitened"
        parts = [self.volume_mean, self.text_mean]
        parts += [] if self.matrix is None else [self.matrix]
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
        return f"{kind}-{digest.hexdigest()[:12]}"

    def to_bytes(self) -> bytes:
        """Serialise; :meth:`from_bytes` restores it bit for bit."""
        buffer = io.BytesIO()
        arrays = {"volume_mean": self.volume_mean, "text_mean": self.text_mean}
        if self.matrix is not None:
            arrays["matrix"] = self.matrix
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Transform":
        """Restore what :meth:`to_bytes` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(
                volume_mean=arrays["volume_mean"],
                text_mean=arrays["text_mean"],
                matrix=arrays.get("matrix"),
            )


def fit(volumes: np.ndarray, texts: np.ndarray | None = None, *, whiten: bool = False) -> Transform:
    """Fit on training data.

    Args:
        volumes: ``(N, E)`` L2-normalised embeddings of training volumes.
        texts: ``(M, E)`` embeddings of training reports, if there are.
        whiten: Also make the volumes' directions uncorrelated and of equal variance.

    Raises:
        ValueError: If there are fewer than two volumes.
    """
    if len(volumes) < 2:
        raise ValueError(f"centring needs at least 2 training volumes, got {len(volumes)}")
    volume_mean = volumes.mean(axis=0, dtype=np.float64)
    matrix = None
    if whiten:
        centred = volumes.astype(np.float64) - volume_mean
        covariance = centred.T @ centred / len(centred)
        values, directions = np.linalg.eigh(covariance)
        damped = values.clip(min=0) + SHRINKAGE * values.clip(min=0).mean() + 1e-12
        # scaled to unit mean so that half precision holds it
        scale = damped**-0.5 / (damped**-0.5).mean()
        matrix = ((directions * scale) @ directions.T).astype(np.float16)
    return Transform(
        volume_mean=volume_mean.astype(np.float32),
        text_mean=(
            np.zeros_like(volume_mean) if texts is None else texts.mean(axis=0, dtype=np.float64)
        ).astype(np.float32),
        matrix=matrix,
    )
