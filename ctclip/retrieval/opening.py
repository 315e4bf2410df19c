"""An archive by its address, with what its similarities and scores mean."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.embeddings import EmbeddingTable, space_of
from ctclip.findings import FINDINGS
from ctclip.retrieval.index import MilvusArchive
from ctclip.retrieval.phrase import finding_phrases
from ctclip.retrieval.question import Background
from ctclip.retrieval.reference import Reference
from ctclip.retrieval.search import Archive, MemoryArchive

if TYPE_CHECKING:
    from ctclip.retrieval.service import Scorer


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An archive ready to be asked."""

    archive: Archive
    background: Background
    reference: Reference | None


def open_archive(
    index: str | None,
    table: Path | None,
    reports: Path | None = None,
    scorer: "Scorer | None" = None,
    *,
    name: str = "ctclip",
    token: str = "",
) -> Opened:
    """Open an index, or a table in memory; exactly one of them is given.

    Args:
        index: URI of an index that ctclip-index built.
        table: ``volumes.parquet``.
        reports: ``reports.parquet`` beside the table.
        scorer: Adds zero-shot scores to a table that has none.
        name: The index's name within its store.
        token: Of a server.
    """
    if index is not None:
        store = MilvusArchive(index, name, token)
        return Opened(archive=store, background=store.background, reference=store.reference)
    assert table is not None
    volumes = EmbeddingTable.load(table)
    if scorer is not None:
        volumes = with_scores(volumes, scorer)
    texts = EmbeddingTable.load(reports) if reports else None
    phrases = None if scorer is None else finding_phrases(scorer, volumes)
    return Opened(
        archive=MemoryArchive(volumes),
        background=Background.of(volumes, texts, phrases),
        reference=Reference.of(volumes),
    )


def with_scores(table: EmbeddingTable, scorer: "Scorer") -> EmbeddingTable:
    """An export with zero-shot scores, computed where it has none and has raw vectors."""
    if table.scores is not None or table.transform is not None:
        return table
    table.require_same_space(space_of(scorer.checkpoint))
    found = scorer.score_vectors(table.vectors)
    scores = np.array([[row[finding] for finding in FINDINGS] for row in found], dtype=np.float32)
    return replace(table, scores=scores)
