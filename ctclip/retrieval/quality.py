"""How good an export is for finding cases: every number with its interval, chance and pool."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.embeddings import EmbeddingTable, health
from ctclip.findings import FINDINGS
from ctclip.retrieval import metrics
from ctclip.retrieval.metrics import Estimate
from ctclip.retrieval.phrase import finding_phrases

if TYPE_CHECKING:
    from ctclip.retrieval.service import Scorer

logger = logging.getLogger(__name__)

CT_CLIP = "CT-CLIP's MAP@K, each K by itself"
CT_CLIP_PRINTED = "CT-CLIP's MAP@K as its script prints it (running mean)"


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
    """Only this split, as queries and as pool; all rows by default."""

    ks: tuple[int, ...] = (1, 5, 10, 50)
    """Cut-offs of volume-to-volume quality."""

    recall_ks: tuple[int, ...] = (1, 5, 10, 50, 100)
    """Cut-offs of report-to-volume recall."""

    per_finding_k: int = 10
    relevant_from: float = 0.5
    """Label overlap (Jaccard) from which a case counts as relevant."""

    replicates: int = 1000
    """Of the patient-grouped bootstrap."""

    seed: int = 0
    out: Path | None = None
    """Folder of ``retrieval.json`` and ``retrieval.md``."""

    def __post_init__(self) -> None:
        for name in ("ks", "recall_ks"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive cut-offs, got {getattr(self, name)}")
        if self.per_finding_k < 1 or self.replicates < 1:
            raise ValueError("per_finding_k and replicates must be at least 1")


def run(config: QualityConfig, scorer: "Scorer | None" = None) -> dict[str, dict[str, Estimate]]:
    """Measure, print, and write.

    Args:
        config: What to measure.
        scorer: The model: adds searches by a finding's name.

    Returns:
        ``like cases``, ``own report`` (with reports), ``per finding`` and ``finding by name``
        (with a model); CT-CLIP's own MAP@K, which has neither interval nor chance, is printed and
        written only.
    """
    from rich.console import Console
    from rich.table import Table

    table = EmbeddingTable.load(config.table)
    reports = EmbeddingTable.load(config.reports) if config.reports else None
    if config.split is not None:
        table = table.of_split(config.split)
        reports = reports.of_split(config.split) if reports is not None else None
    if config.truth is not None:
        table = _judged_by(config.truth, table)
    found = measure(table, reports, config, scorer)

    console = Console()
    console.print(str(health(table)))
    for title, headings, rows in _tables(table, found, config):
        shown = Table(title=title)
        for heading in headings:
            shown.add_column(heading)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    if config.out is not None:
        _write(config, table, found)
    return found


def measure(
    table: EmbeddingTable,
    reports: EmbeddingTable | None,
    config: QualityConfig,
    scorer: "Scorer | None" = None,
) -> dict[str, dict[str, Estimate]]:
    """The numbers alone; see :func:`run`."""
    draws = {"seed": config.seed, "replicates": config.replicates}
    found = {
        "like cases": metrics.volume_to_volume(table, config.ks, config.relevant_from, **draws)
    }
    if reports is not None:
        found["own report"] = metrics.report_to_volume(reports, table, config.recall_ks, **draws)
    found["per finding"] = metrics.per_finding(table, config.per_finding_k, **draws)
    if scorer is not None:
        phrases = finding_phrases(scorer, table)
        found["finding by name"] = metrics.per_finding_text(table, phrases, **draws)
    return found


def _tables(
    table: EmbeddingTable, found: dict[str, dict[str, Estimate]], config: QualityConfig
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and rows of what is shown."""
    headings = ["", "value", "95 % interval", "chance", "queries", "pool"]
    titles = {
        "like cases": f"Volume → volume: like cases (relevant from overlap {config.relevant_from})",
        "own report": "Report → volume and volume → report",
        "per finding": f"Volume → volume by finding: precision@{config.per_finding_k}",
        "finding by name": "A finding's name → volumes: average precision",
    }
    tables = []
    for name, estimates in found.items():
        rows = []
        for row, e in estimates.items():
            numbers = [f"{e.value:.3f}", f"{e.low:.3f} to {e.high:.3f}", f"{e.chance:.3f}"]
            rows.append([row, *numbers, str(e.num_queries), str(e.pool)])
        tables.append((titles[name], headings, rows))
    per_k, pool = _ct_clips(table, config)
    if per_k:
        printed = metrics.running_mean(per_k)
        rows = [
            [f"MAP@{k}", f"{value:.3f}", f"{printed[k]:.3f}", str(len(table)), str(pool)]
            for k, value in per_k.items()
        ]
        tables.append(
            (
                "CT-CLIP's “MAP@K”, to compare with its paper only: mean label overlap, the query "
                "is among its candidates",
                ["", "each K by itself", "as printed (running mean)", "queries", "pool"],
                rows,
            )
        )
    return tables


def _ct_clips(table: EmbeddingTable, config: QualityConfig) -> tuple[dict[int, float], int]:
    """CT-CLIP's own numbers, for cut-offs that the pool allows, and the pool's size."""
    labels = np.nan_to_num(table.labels)
    pool = int((labels.sum(axis=1) > 0).sum())
    ks = [k for k in config.ks if k <= pool]
    return (metrics.ct_clip_map_at_k(table.vectors_for_reports, labels, ks) if ks else {}), pool


def _write(
    config: QualityConfig, table: EmbeddingTable, found: dict[str, dict[str, Estimate]]
) -> None:
    per_k, _ = _ct_clips(table, config)
    payload = {
        "provenance": table.provenance,
        "health": asdict(health(table)),
        **{
            title: {name: asdict(estimate) for name, estimate in estimates.items()}
            for title, estimates in found.items()
        },
        CT_CLIP: per_k,
        CT_CLIP_PRINTED: metrics.running_mean(per_k) if per_k else {},
    }
    model = table.provenance.get("model", "unnamed")
    lines = ["# How good the export is for finding cases", "", f"Model: {model}.", ""]
    lines += [str(health(table)), ""]
    for title, headings, rows in _tables(table, found, config):
        lines += [f"## {title}", "", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    assert config.out is not None
    config.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(payload, indent=1, ensure_ascii=False)
    (config.out / "retrieval.json").write_text(text + "\n", encoding="utf-8")
    (config.out / "retrieval.md").write_text("\n".join(lines), encoding="utf-8")
    logger.info("retrieval quality: %s", config.out / "retrieval.md")


def _judged_by(path: Path, table: EmbeddingTable) -> EmbeddingTable:
    """The table with the labels of a CSV."""
    from dataclasses import replace

    import pandas as pd

    frame = pd.read_csv(path)
    lacking = [name for name in ("volume_id", *FINDINGS) if name not in frame.columns]
    if lacking:
        raise ValueError(f"{path} has no column {', '.join(lacking)}")
    frame = frame.set_index("volume_id")
    missing = [volume for volume in table.volume_id if volume not in frame.index]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the table's {len(table)} volumes, e.g. {missing[0]}"
        )
    labels = frame.loc[table.volume_id, list(FINDINGS)].to_numpy(np.float32)
    return replace(table, labels=labels)
