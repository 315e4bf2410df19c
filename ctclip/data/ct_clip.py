"""CT-CLIP's own preprocessing, step for step, for its released weights.

It differs from ours in what it fixes and what it leaves out: axes are S, L, P (slices transposed
against the usual display), arithmetic is in float64, the clip to [-1000, 1000] HU comes after
interpolation in training and before it in inference, and nothing is averaged when voxels grow.
"""

from typing import Literal

import numpy as np

from ctclip.data.resample import resample

CLIP_HU = (-1000.0, 1000.0)

SPACING_MM = (1.5, 0.75, 0.75)
SIZE = (240, 480, 480)
"""(S, L, P)."""

Clip = Literal["last", "first"]


def to_slp(hu_spl: np.ndarray) -> np.ndarray:
    """House orientation (S, P, L) to CT-CLIP's (S, L, P); a view."""
    return hu_spl.transpose(0, 2, 1)


def preprocess(
    hu_slp: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    clip: Clip = "last",
    target_mm: tuple[float, float, float] = SPACING_MM,
    size: tuple[int, int, int] = SIZE,
) -> np.ndarray:
    """Bring HU to CT-CLIP's input.

    Args:
        hu_slp: ``(S, L, P)`` in HU.
        spacing_mm: Its spacing in the same order.
        clip: ``last`` as in CT-CLIP's training, ``first`` as in its inference; the two differ by
            up to 0.09 where bone or metal meets air.
        target_mm: Wanted spacing.
        size: Wanted size.

    Returns:
        ``size`` float32 in [-1, 1], padded with -1.
    """
    out = resample(
        hu_slp,
        spacing_mm,
        target_mm,
        size,
        clip_hu=CLIP_HU if clip == "first" else None,
        fill_hu=CLIP_HU[0],
        antialias=False,
        precision=np.float64,
        dtype=np.float32,
    )
    np.clip(out, *CLIP_HU, out=out)
    out /= np.float32(1000)
    return out
