"""Does it matter which hospital wrote the report? The same studies in several styles.

For each style: how well its reports find their own volume, and how well they rank a finding
against volumes (the zero-shot direction, with the report's words in place of a prompt).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ctclip.evaluation import metrics
from ctclip.findings import FINDINGS

RANKS = (1, 5, 10)


def measure(
    volumes: np.ndarray,
    reports: Mapping[str, np.ndarray],
    labels: np.ndarray,
    findings: Sequence[str] = FINDINGS,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Retrieval and zero-shot quality of each style of report.

    Args:
        volumes: ``(N, E)`` one volume per study, L2-normalised.
        reports: Style to ``(N, E)`` embeddings of the same studies' reports in that style.
        labels: ``(N, K)``, nan = unknown.
        findings: ``K`` names.
        replicates: Bootstrap replicates over studies, paired over styles.
        seed: Of the draws.

    Returns:
        One row per style: recall at 1, 5 and 10, the median rank, the macro AUROC of directions
        (mean report with the finding minus mean report without, of the other studies), each
        recall with its 95 % interval, and the difference to the best style.
    """
    count = len(volumes)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(count, size=(replicates, count))
    ranks = {}
    for style, vectors in reports.items():
        similarity = vectors @ volumes.T
        ranks[style] = (similarity > np.diag(similarity)[:, None]).sum(axis=1) + 1
    best = max(ranks, key=lambda style: float((ranks[style] <= RANKS[-1]).mean()))
    rows = []
    for style, vectors in reports.items():
        row: dict[str, object] = {"style": style, "studies": count}
        for limit in RANKS:
            hit = (ranks[style] <= limit).astype(float)
            low, high = np.quantile(hit[drawn].mean(axis=1), (0.025, 0.975))
            row |= {f"recall@{limit}": hit.mean(), f"recall@{limit}_low": low,
                    f"recall@{limit}_high": high}  # fmt: skip
        lost = (ranks[best] <= RANKS[-1]).astype(float) - (ranks[style] <= RANKS[-1])
        low, high = np.quantile(lost[drawn].mean(axis=1), (0.025, 0.975))
        row |= {"median_rank": float(np.median(ranks[style])), f"lost@{RANKS[-1]}": lost.mean(),
                "lost_low": low, "lost_high": high}  # fmt: skip
        areas = [_direction_auroc(volumes, vectors, labels[:, k]) for k in range(len(findings))]
        row["macro_auroc"] = float(np.nanmean(areas)) if not np.isnan(areas).all() else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _direction_auroc(volumes: np.ndarray, reports: np.ndarray, labels: np.ndarray) -> float:
    """AUROC of volumes along "reports with it minus reports without", two-fold crossed."""
    half = np.arange(len(labels)) % 2 == 0
    scores = np.full(len(labels), np.nan)
    for side in (half, ~half):
        with_it, without = side & (labels == 1.0), side & (labels == 0.0)
        if not with_it.any() or not without.any():
            return float("nan")
        direction = reports[with_it].mean(axis=0) - reports[without].mean(axis=0)
        scores[~side] = volumes[~side] @ direction
    # the two halves have directions of their own: compare within each
    areas = [metrics.auroc(labels[side], scores[side]) for side in (half, ~half)]
    return float(np.nanmean(areas)) if not np.isnan(areas).all() else float("nan")
