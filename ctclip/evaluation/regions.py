"""Scores from parts of a volume: regions with top-k pooling, and sliding windows.

A nodule fills a few patches of thousands; averaged over the volume it drowns. Scoring patches one
by one and keeping the best few lets it count, at the price of more noise for findings that fill
the chest. Windows let a model that was trained on crops see a larger scan piece by piece.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ctclip.progress import track

if TYPE_CHECKING:
    from ctclip.checkpoint import Checkpoint
    from ctclip.data.cohort import PreparedCohort
    from ctclip.data.manifest import VolumeRecord


def top_k(patches: Tensor, directions: Tensor, k: int) -> Tensor:
    """Score patches one by one and average the best.

    Args:
        patches: ``(B, d, h, w, E)`` in the joint space, any length.
        directions: ``(K, E)`` present minus absent.
        k: Patches that count; all of them if there are fewer.

    Returns:
        ``(B, K)`` mean cosine difference of the best ``k`` patches.
    """
    flat = F.normalize(patches.flatten(1, 3), dim=-1)
    scores = flat @ directions.T
    best: Tensor = scores.topk(min(k, scores.shape[1]), dim=1).values.mean(dim=1)
    return best


def peak(
    checkpoint: "Checkpoint", hu: np.ndarray, direction: np.ndarray, device: str = "cpu"
) -> tuple[int, int, int]:
    """Where in a scan a finding looks most likely: the patch with the largest share of its score.

    Args:
        checkpoint: The model.
        hu: ``(D, H, W)`` int16, preprocessed.
        direction: ``(E,)`` present minus absent prompt.
        device: For example ``"cuda:0"``.

    Returns:
        Voxel (d, h, w) in the middle of that patch.
    """
    from ctclip.data.volume import window as to_channels

    model = checkpoint.model.to(device).eval()
    with torch.inference_mode():
        voxels = torch.from_numpy(hu)[None].to(device).float()
        patches = model.encode_patches(to_channels(voxels, checkpoint.volume_config.windows_hu))[0]
        heat = (patches.float() @ torch.from_numpy(direction).to(patches).float()).cpu().numpy()
    best = np.unravel_index(int(heat.argmax()), heat.shape)
    d, h, w = (
        int((index + 0.5) * size / count)
        for index, size, count in zip(best, hu.shape, heat.shape, strict=True)
    )
    return d, h, w


def windows(
    size: Sequence[int], window: Sequence[int], overlap: float = 0.5
) -> Iterator[tuple[slice, slice, slice]]:
    """Boxes of one size that cover a volume, the last of each axis flush with its end.

    Args:
        size: Voxels (D, H, W) of the volume.
        window: Voxels (d, h, w) of a box; an axis longer than the volume's is cut to it.
        overlap: Share of a box that the next one repeats.
    """
    starts = []
    for total, edge in zip(size, window, strict=True):
        length = min(edge, total)
        count = 1 + int(np.ceil((total - length) / max(length * (1 - overlap), 1)))
        places = np.linspace(0, total - length, count).round().astype(int)
        starts.append([slice(int(p), int(p) + length) for p in np.unique(places)])
    yield from itertools.product(*starts)  # type: ignore[misc]


def score_records(
    checkpoint: "Checkpoint",
    cohort: "PreparedCohort",
    records: "Sequence[VolumeRecord]",
    prompt_vectors: np.ndarray,
    *,
    patches: int = 0,
    window: Sequence[int] | None = None,
    device: str = "cpu",
) -> np.ndarray:
    """Cosine differences of volumes that are looked at in parts.

    Args:
        checkpoint: The model.
        cohort: Prepared volumes.
        records: Which of them.
        prompt_vectors: ``(K, 2, E)``.
        patches: Best patches that count per window; 0 scores each window as a whole.
        window: Voxels (D, H, W); the mean over windows is the result. ``None`` takes the volume.
        device: For example ``"cuda:0"``.

    Returns:
        ``(N, K)`` float64.
    """
    from ctclip.data.volume import window as to_channels

    model = checkpoint.model.to(device).eval()
    directions = torch.from_numpy(prompt_vectors[:, 0] - prompt_vectors[:, 1]).to(device)
    rows = []
    with torch.inference_mode():
        for record in track(records, len(records), "score parts", "volume"):
            hu = torch.from_numpy(cohort.read(record.volume_id))[None].to(device).float()
            image = to_channels(hu, checkpoint.volume_config.windows_hu)
            boxes = windows(image.shape[2:], window or image.shape[2:])
            parts = []
            for box in boxes:
                crop = image[:, :, box[0], box[1], box[2]]
                if patches:
                    parts.append(top_k(model.encode_patches(crop), directions, patches))
                else:
                    parts.append(model.encode_image(crop, normalize=True) @ directions.T)
            rows.append(torch.cat(parts).mean(dim=0).double().cpu().numpy())
    return np.stack(rows)
