"""Scans and texts → unit vectors in the model's joint space."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctclip.progress import track

if TYPE_CHECKING:
    from torch import Tensor

    from ctclip.checkpoint import Checkpoint


def embed_texts(
    checkpoint: "Checkpoint", texts: Sequence[str], *, batch_size: int = 32, device: str = "cpu"
) -> np.ndarray:
    """Embed free text.

    Args:
        checkpoint: The model.
        texts: For example ``["bilateral pleural effusion with compressive atelectasis"]``.
        batch_size: Texts per forward pass.
        device: For example ``"cuda:0"``.

    Returns:
        ``(N, E)`` float32, L2-normalised.
    """
    import torch

    model = checkpoint.model.to(device).eval()
    starts = range(0, len(texts), batch_size)
    with torch.inference_mode():
        parts = [
            model.encode_text(
                checkpoint.tokenizer(list(texts[start : start + batch_size])).to(device),
                normalize=True,
            )
            for start in progress(starts, len(starts), "embed text", "step")
        ]
    return _normalised(torch.cat(parts))


def embed_file(
    checkpoint: "Checkpoint",
    path: str | Path,
    *,
    device: str = "cpu",
    accept: Iterable[str] = (),
    rescale: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Embed one scan that was never prepared.

    Args:
        checkpoint: The model with its preprocessing.
        path: NIfTI file or DICOM folder.
        device: For example ``"cuda:0"``.
        accept: Codes of reasons to hold a scan back, such as ``"8-bit"``, that are accepted.
        rescale: Slope and intercept, applied only if the file does not hold HU.

    Returns:
        Two ``(E,)`` float32 vectors: to compare with prompts, and with whole reports.

    Raises:
        VolumeError: If the scan can't be read, or its values are not HU and nobody accepted it.
    """
    from ctclip.data import checked, volume

    scan = checked.read(path, accept=accept, rescale=rescale)
    hu = volume.preprocess(scan, checkpoint.volume_config)
    return embed_voxels(checkpoint, hu, device=device)


def embed_voxels(
    checkpoint: "Checkpoint", hu: np.ndarray, *, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Embed one preprocessed scan.

    Args:
        checkpoint: The model.
        hu: ``(D, H, W)`` HU, as ``ctclip.data.volume.preprocess`` makes it.
        device: For example ``"cuda:0"``.

    Returns:
        Two ``(E,)`` float32 vectors: to compare with prompts, and with whole reports.
    """
    import torch

    with torch.inference_mode():
        model = checkpoint.model.to(device).eval()
        prompt, report = encode_batch(checkpoint, model, torch.from_numpy(hu)[None].to(device))
    return prompt[0], (prompt if report is None else report)[0]


def encode_batch(
    checkpoint: "Checkpoint", model: Any, hu: "Tensor"
) -> tuple[np.ndarray, np.ndarray | None]:
    """``(B, D, H, W)`` HU to both read-outs; None for the second where there is one."""
    from ctclip.data.volume import window

    image = window(hu.float(), checkpoint.volume_config.windows_hu)
    readouts = model.encode_image_readouts(image, normalize=True)
    prompt, report = readouts["prompt"], readouts["report"]
    return _normalised(prompt), None if report is prompt else _normalised(report)


def _normalised(vectors: "Tensor") -> np.ndarray:
    """Float32 unit rows whatever precision the model ran in."""
    vectors = vectors.float()
    return (vectors / vectors.norm(dim=-1, keepdim=True)).cpu().numpy()


def progress(items: Iterable[Any], total: int, what: str, unit: str) -> Iterable[Any]:
    """Iterate and show how far that is; silent on all but the main process."""
    from ctclip import distributed  # imports torch, which reading a table doesn't need

    return track(items, total, what, unit, hidden=not distributed.is_main() or total < 2)
