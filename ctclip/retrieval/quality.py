"""How good an export is for finding cases: every number with its interval, chance and pool."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ctclip.embeddings import EmbeddingTable, health
from ctclip.findings import FINDINGS
from ctclip.retrieval import metrics
from ctclip.retrieval.metrics import Estimate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What to measure."""

    table: Path
    """``volumes.parquet``"""

    reports: Path | None = None
    """``reports.parquet``: adds report-to-volume recall."""

    truth: Path | None = None
    """CSV of ``volume_id`` and the finding columns to judge by, instead of the table's labels:
    what was planted in a phantom cohort."""

    split: str | None = None
    k: int = 10
    out: Path | None = None
    """JSON file."""


def run(config: QualityConfig) -> dict[str, dict[str, Estimate]]:
    """Measure, print, and write.

    Returns:
        ``like cases``, ``own report`` (with reports) and ``per finding``; CT-CLIP's own MAP@K,
        which has neither interval nor chance, goes into the file only.
    """
    from rich.console import Console
    from rich.table import Table

    table = EmbeddingTable.load(config.table)
    reports = EmbeddingTable.load(config.reports) if config.reports else None
    if config.split is not None:
        table = table.of_split(config.split)
        reports = reports.of_split(config.split) if reports is not None else None
    truth = _truth(config.truth, table) if config.truth else None
    found = {"like cases": metrics.volume_to_volume(table)}
    if reports is not None:
        found["own report"] = metrics.report_to_volume(reports, table)
    found["per finding"] = metrics.per_finding(table, config.k, truth)

    console = Console()
    console.print(str(health(table)))
    for title, estimates in found.items():
        heading = f"{title}: precision@{config.k}" if title == "per finding" else title
        shown = Table(title=heading)
        for column in ("", "value", "95 % interval", "chance", "queries", "pool"):
            shown.add_column(column)
        for name, e in estimates.items():
            interval = f"{e.low:.3f} to {e.high:.3f}"
            counts = (str(e.num_queries), str(e.pool))
            shown.add_row(name, f"{e.value:.3f}", interval, f"{e.chance:.3f}", *counts)
        console.print(shown)
    if config.out is not None:
        _write(config.out, table, found)
    return found


def _write(out: Path, table: EmbeddingTable, found: dict[str, dict[str, Estimate]]) -> None:
    labels = np.nan_to_num(table.labels)
    num_candidates = int((labels.sum(axis=1) > 0).sum())
    ks = [k for k in metrics.CT_CLIP_KS if k <= num_candidates]
    per_k = metrics.ct_clip_map_at_k(table.vectors_for_reports, labels, ks) if ks else {}
    payload = {
        "provenance": table.provenance,
        "health": asdict(health(table)),
        **{
            title: {name: asdict(estimate) for name, estimate in estimates.items()}
            for title, estimates in found.items()
        },
        "CT-CLIP's MAP@K, each K by itself": per_k,
        "CT-CLIP's MAP@K as its script prints it (running mean)": metrics.running_mean(per_k),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(payload, indent=1, ensure_ascii=False), encoding="utf-8")
    logger.info("retrieval quality: %s", out)


def _truth(path: Path, table: EmbeddingTable) -> np.ndarray:
    import pandas as pd

    frame = pd.read_csv(path).set_index("volume_id")
    missing = [volume for volume in table.volume_id if volume not in frame.index]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the table's {len(table)} volumes, e.g. {missing[0]}"
        )
    truth: np.ndarray = frame.loc[table.volume_id, list(FINDINGS)].to_numpy(np.float32)
    return truth
