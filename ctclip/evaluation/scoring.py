"""From embeddings to scores: a prompt pair is a direction, so all scores are one matrix product."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ctclip.evaluation import prompts
from ctclip.evaluation.scores import ScoreTable
from ctclip.findings import FINDINGS

if TYPE_CHECKING:
    from ctclip.checkpoint import Checkpoint
    from ctclip.embeddings import EmbeddingTable

ScoreKind = Literal["softmax", "cosine-difference", "head"]


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """How volumes are scored. Written into the header of the score table."""

    prompts: str | None = None
    """Name of a prompt set that ships with ctclip, or path of a YAML file; by default ``ct-clip``
    for CT-CLIP's own checkpoints, else ``default``."""

    score: ScoreKind | None = None
    """Probability of "present" against "absent" (softmax), the difference of the two cosines, or
    the probability that the checkpoint's linear head gives; by default the head where there is one
    (CT-CLIP's ClassFine), else softmax."""

    patches: int = 0
    """Score patches one by one and average the best so many; 0 scores the volume as a whole."""

    window: tuple[int, int, int] | None = None
    """Slide a window of so many voxels (D, H, W) over the volume; ``None`` sees all at once."""

    space: Literal["raw", "centred", "whitened"] = "raw"
    """Centring or whitening of the joint space, fitted on the cohort's training split."""

    replicates: int = 1000
    """Bootstrap replicates behind each interval."""

    accept: tuple[str, ...] = ()
    """Reasons to hold one scan back, such as "8-bit", that are accepted; not for a cohort."""

    rescale: tuple[float, float] | None = None
    """Slope and intercept for one scan, applied only if it does not hold HU; not for a cohort."""

    seed: int = 0
    batch_size: int = 4
    workers: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.replicates < 0 or self.batch_size < 1:
            raise ValueError("replicates must be >= 0 and batch_size >= 1")
        if self.patches < 0:
            raise ValueError(f"patches must be >= 0, got {self.patches}")
        if (self.patches or self.window) and self.space != "raw":
            raise ValueError("centring and whitening apply to whole volumes, not to parts")


def scores(
    vectors: np.ndarray,
    prompt_vectors: np.ndarray,
    logit_scale: float,
    kind: Literal["softmax", "cosine-difference"] = "softmax",
) -> np.ndarray:
    """Score volumes against prompt pairs.

    The softmax over a pair depends only on the difference of its two logits, so both kinds
    rank alike (and have the same AUROC) within a finding; only the softmax is a probability.

    Args:
        vectors: ``(N, E)`` volumes, L2-normalised.
        prompt_vectors: ``(K, 2, E)``, index 0 = present, 1 = absent.
        logit_scale: ``1 / temperature``, already exponentiated.
        kind: What to return.

    Returns:
        ``(N, K)`` float64.
    """
    directions = (prompt_vectors[:, 0] - prompt_vectors[:, 1]).astype(np.float64)
    difference: np.ndarray = vectors.astype(np.float64) @ directions.T
    return difference if kind == "cosine-difference" else probability(difference, logit_scale)


def kind_of(checkpoint: "Checkpoint", config: ZeroShotConfig) -> ScoreKind:
    """What is scored with: as configured, else by what the checkpoint holds.

    Raises:
        ValueError: If a head is asked that isn't there, or for what only prompts can do.
    """
    is_whole = not config.patches and config.window is None and config.space == "raw"
    has_head = checkpoint.head is not None
    kind = config.score or ("head" if has_head and is_whole else "softmax")
    if kind == "head" and not has_head:
        raise ValueError("the checkpoint holds no linear head: leave score out")
    if kind == "head" and not is_whole:
        raise ValueError(
            "a linear head scores whole volumes in their own space: set score=softmax for "
            "patches, window or space"
        )
    return kind


def scores_of(
    checkpoint: "Checkpoint",
    vectors: np.ndarray,
    prompt_vectors: np.ndarray,
    kind: ScoreKind | None = None,
) -> np.ndarray:
    """``(N, 18)``: volumes ``(N, E)`` by the prompts, or by the checkpoint's linear head.

    Raises:
        ValueError: If the head doesn't know every finding.
    """
    kind = kind or kind_of(checkpoint, ZeroShotConfig())
    if kind != "head":
        return scores(vectors, prompt_vectors, scale_of(checkpoint), kind)
    head = checkpoint.head
    assert head is not None
    if missing := [finding for finding in FINDINGS if finding not in head.findings]:
        raise ValueError(
            f"the checkpoint's linear head doesn't know {missing[0]!r}: set score=softmax to score "
            "with prompts"
        )
    import torch

    with torch.inference_mode():
        device = head.linear.weight.device
        chances = head(torch.from_numpy(vectors).float().to(device)).double().sigmoid()
    order = [head.findings.index(finding) for finding in FINDINGS]
    found: np.ndarray = chances.cpu().numpy()[:, order]
    return found


def probability(difference: np.ndarray, logit_scale: float) -> np.ndarray:
    """Softmax over a pair from the difference of its cosines."""
    from scipy.special import expit

    chance: np.ndarray = expit(logit_scale * difference)
    return chance


def moved(
    train: np.ndarray,
    vectors: np.ndarray,
    prompt_vectors: np.ndarray,
    space: Literal["centred", "whitened"],
) -> tuple[np.ndarray, np.ndarray]:
    """Volumes and prompts in a centred or whitened space fitted on training volumes.

    Args:
        train: ``(M, E)`` training volumes.
        vectors: ``(N, E)`` volumes to score.
        prompt_vectors: ``(K, 2, E)``; their own mean is what centring takes from them.
        space: Which.

    Returns:
        ``(N, E)`` and ``(K, 2, E)``, L2-normalised.
    """
    from ctclip.embeddings import transform

    flat = prompt_vectors.reshape(-1, prompt_vectors.shape[-1])
    fitted = transform.fit(train, flat, whiten=space == "whitened")
    return fitted(vectors, "volume"), fitted(flat, "report").reshape(prompt_vectors.shape)


def score_embeddings(
    checkpoint: "Checkpoint",
    table: "EmbeddingTable",
    config: ZeroShotConfig | None = None,
    model_name: str = "ctclip",
    *,
    train: "EmbeddingTable | None" = None,
    parts: np.ndarray | None = None,
) -> ScoreTable:
    """Score an embedding table that the same checkpoint made.

    Args:
        checkpoint: The model.
        table: Its embeddings.
        config: Prompts and kind of score.
        model_name: Name in figures and tables.
        train: Training embeddings that centring or whitening is fitted on.
        parts: ``(N, 18)`` cosine differences from :mod:`ctclip.evaluation.regions`, which then
            take the place of the embeddings' own.

    Raises:
        EmbeddingError: If another checkpoint made the embeddings.
        ValueError: If the space needs training embeddings and there are none.
    """
    config = config or ZeroShotConfig()
    table.require_same_space(
        {
            "checkpoint": checkpoint.sha256,
            "fingerprint": checkpoint.volume_config.fingerprint(),
            "model": model_name,
        }
    )
    prompt_set = prompts.of(checkpoint, config.prompts)
    prompt_vectors = prompts.encode_prompts(checkpoint, prompt_set)
    vectors = table.vectors
    if config.space != "raw":
        if train is None:
            raise ValueError(f"space {config.space!r} is fitted on training embeddings: give some")
        vectors, prompt_vectors = moved(train.vectors, vectors, prompt_vectors, config.space)
    kind = kind_of(checkpoint, config)
    if parts is None:
        values = scores_of(checkpoint, vectors, prompt_vectors, kind)
    else:
        values = parts if kind == "cosine-difference" else probability(parts, scale_of(checkpoint))
    return ScoreTable(
        volume_id=np.asarray(table.volume_id, dtype=str),
        study_id=np.asarray(table.study_id, dtype=str),
        patient_id=np.asarray(table.patient_id, dtype=str),
        split=np.asarray(table.split, dtype=str),
        findings=FINDINGS,
        labels=table.labels.astype(np.float64),
        scores=values,
        header=header(checkpoint, prompt_set, config, model_name)
        | {"prompt_direction_spread": round(prompts.direction_spread(prompt_vectors), 4)},
        meta={name: np.asarray(column, dtype=str) for name, column in table.fields.items()},
    )


def header(
    checkpoint: "Checkpoint", prompt_set: prompts.PromptSet, config: ZeroShotConfig, name: str
) -> dict[str, Any]:
    """What a score table says about where its scores come from."""
    kind = kind_of(checkpoint, config)
    return {
        "model": name,
        "checkpoint": checkpoint.sha256,
        "fingerprint": checkpoint.volume_config.fingerprint(),
        "label_informed": kind == "head" or bool(checkpoint.provenance.get("label_informed")),
        "step": checkpoint.provenance.get("step"),
        "prompts": "none (linear head)" if kind == "head" else prompt_set.label,
        "score": kind,
        "space": config.space,
        "patches": config.patches,
        "window": list(config.window) if config.window else None,
    }


def scale_of(checkpoint: "Checkpoint") -> float:
    """The model's factor on cosines, ``1 / temperature``."""
    return float(checkpoint.model.logit_scale.detach().float().exp().clamp(max=100).item())
