"""The body of ``ctclip-embed``: a checkpoint and a prepared cohort → tables on disk."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ctclip.embeddings.export import DEFAULT_FIELDS, embed_reports, embed_volumes
from ctclip.embeddings.health import health
from ctclip.embeddings.table import EmbeddingError, EmbeddingTable

if TYPE_CHECKING:
    from ctclip.checkpoint import Checkpoint
    from ctclip.data.manifest import VolumeRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """What to embed, and what may travel with it."""

    checkpoint: Path
    """Model file; it carries its preprocessing."""

    cohort: Path
    """Folder that ctclip-prepare wrote."""

    out: Path
    """Folder for ``volumes.parquet`` and ``reports.parquet``."""

    kind: Literal["volumes", "reports", "both"] = "both"
    split: str | None = None
    """Only this split; all by default."""

    fields: tuple[str, ...] = DEFAULT_FIELDS
    """Columns to carry along; report text, names and dates only when listed here."""

    sections: Literal["both", "findings", "impression"] = "both"
    """Which part of a report is embedded."""

    batch_size: int = 4
    workers: int = 0
    device: str = "auto"
    """``auto`` uses this process's GPU where there is one."""


def run(config: EmbedConfig) -> dict[str, EmbeddingTable]:
    """Embed, write, and say how healthy the embeddings are.

    Started by ``torchrun`` or ``deepspeed``, the processes share the work. Called again, only
    what is missing is computed.

    Returns:
        The tables by kind: ``volume`` and/or ``report``.

    Raises:
        EmbeddingError: If the cohort has no such split, or was prepared for another model.
    """
    from rich.console import Console

    from ctclip import checkpoint as checkpoints
    from ctclip import distributed
    from ctclip.data.cache import PreparedCohort

    _join_processes()
    device = _device(config.device)
    checkpoint = checkpoints.load(config.checkpoint, device=device)
    cohort = PreparedCohort.open(config.cohort)
    records = cohort.records if config.split is None else cohort.split(config.split)
    if not records:
        raise EmbeddingError(f"{config.cohort} has no volume of split {config.split!r}")

    tables: dict[str, EmbeddingTable] = {}
    if config.kind in ("volumes", "both"):
        tables["volume"] = embed_volumes(
            checkpoint,
            cohort,
            records,
            out=config.out / "volumes.parquet",
            batch_size=config.batch_size,
            workers=config.workers,
            device=device,
            fields=config.fields,
        )
    has_reports = any(record.findings or record.impression for record in records)
    if config.kind == "reports" or (config.kind == "both" and has_reports):
        tables["report"] = embed_reports(
            checkpoint,
            records,
            out=config.out / "reports.parquet",
            sections=config.sections,
            device=device,
            fields=config.fields,
        )
        _say_what_was_cut(checkpoint)
    if distributed.is_main():
        if "date" in config.fields:
            _say_what_is_no_date(records, tables)
        console = Console()
        for kind, table in tables.items():
            console.print(f"{kind}s → {config.out / f'{kind}s.parquet'}: {health(table)}")
    return tables


def _say_what_was_cut(checkpoint: "Checkpoint") -> None:
    from ctclip import distributed

    tokenizer = checkpoint.tokenizer
    counts = distributed.gather_objects((tokenizer.truncated, tokenizer.tokens_cut))
    reports, tokens = (sum(count) for count in zip(*counts, strict=True))
    if distributed.is_main() and reports:
        logger.info(
            "%d of the reports embedded now are longer than %d tokens; truncation=%s left out %d",
            reports,
            tokenizer.context_length,
            tokenizer.truncation,
            tokens,
        )


def _say_what_is_no_date(
    records: Sequence["VolumeRecord"], tables: dict[str, EmbeddingTable]
) -> None:
    written = {record.volume_id: record.meta.get("date", "") for record in records}
    others = {
        volume: written[volume]
        for table in tables.values()
        for volume, day in zip(table.volume_id, table.fields["date"], strict=True)
        if written.get(volume) and not day
    }
    if others:
        logger.warning(
            "%d dates are left out, because they are neither 2024-01-31 nor 20240131: %r (%s) is "
            "the first",
            len(others),
            *next((day, volume) for volume, day in others.items()),
        )


def _device(name: str) -> str:
    from ctclip import distributed

    return str(distributed.own_device()) if name == "auto" else name


def _join_processes() -> None:
    """Join the other processes of a launcher; nothing to do in a plain run."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
