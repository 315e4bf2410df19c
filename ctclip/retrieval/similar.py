"""The body of ``ctclip-similar``: a question, an export → similar cases as table and picture."""

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.embeddings import EmbeddingTable, embed_file, embed_texts, space_of
from ctclip.retrieval import figure
from ctclip.retrieval.filters import Filter
from ctclip.retrieval.question import Background, compare_findings, compose
from ctclip.retrieval.search import Archive, Hit, MemoryArchive, Query, from_rows

if TYPE_CHECKING:
    from ctclip.data.cache import PreparedCohort

logger = logging.getLogger(__name__)

CSV_COLUMNS = ("rank", "study_id", "volume_id", "similarity", "is_ordinary", "shared", "other")


@dataclass(frozen=True, kw_only=True)
class SimilarConfig:
    """One question to an archive. A scan or study, and a text, may be asked together."""

    table: Path
    """``volumes.parquet`` that ctclip-embed wrote."""

    checkpoint: Path | None = None
    """Needed to ask by a new scan or by text."""

    reports: Path | None = None
    """``reports.parquet``; tells which similarity between a text and a scan is ordinary."""

    volume: str | None = None
    study: str | None = None
    scan: Path | None = None
    """A NIfTI file or DICOM folder that the archive has never seen."""

    text: str | None = None
    more: tuple[str, ...] = ()
    """Studies of the archive to be like."""

    less: tuple[str, ...] = ()
    """Studies of the archive to be unlike."""

    text_weight: float = 0.5
    """Weight of the text when a scan or study is given too; the rest is the scan's."""

    k: int = 5
    per_patient: int = 1
    where: Filter = field(default_factory=Filter)
    cohort: Path | None = None
    """Prepared cohort, for the picture."""

    out: Path | None = None
    """Folder for ``similar.csv`` and ``similar.png``."""

    device: str = "cpu"

    def __post_init__(self) -> None:
        if not (self.volume or self.study or self.scan or self.text or self.more):
            raise ValueError("nothing to search for: give volume, study, scan, text or more")
        if (self.scan or self.text) and self.checkpoint is None:
            raise ValueError("a scan or a text has to be embedded first: give the checkpoint")
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"text_weight must be between 0 and 1, got {self.text_weight}")


def run(config: SimilarConfig) -> list[Hit]:
    """Search, print the hits, and write them with their slices.

    Returns:
        The hits, best first.

    Raises:
        EmbeddingError: If the archive and the checkpoint don't belong together, or it doesn't
            hold the study that is asked for.
    """
    from rich.console import Console
    from rich.table import Table

    table = EmbeddingTable.load(config.table)
    reports = EmbeddingTable.load(config.reports) if config.reports else None
    archive = MemoryArchive(table)
    query = build_query(config, archive, Background.of(table, reports))
    hits = archive.search(query, config.k, config.per_patient, config.where)

    shown = Table(title=f"Cases similar to {query.name} ({len(table)} volumes searched)")
    for heading in ("#", "study", "similarity", "shared", "also present"):
        shown.add_column(heading)
    asked = _own_labels(config, archive)
    for rank, hit in enumerate(hits, 1):
        shared, other = compare_findings(asked, hit.labels)
        mark = " (no better than a random pair)" if hit.is_ordinary else ""
        similarity = f"{hit.similarity:.3f}{mark}"
        shown.add_row(str(rank), hit.study_id, similarity, ", ".join(shared), ", ".join(other))
    Console().print(shown)
    if config.out is not None:
        _write(config, archive, query, hits, asked)
    return hits


def build_query(config: SimilarConfig, archive: Archive, background: Background) -> Query:
    """Turn the question into a point of the joint space.

    Raises:
        EmbeddingError: If the archive doesn't hold a study that is asked for.
    """
    from ctclip import checkpoint as checkpoints

    like = []
    if config.volume:
        like.append(from_rows(archive.rows(volume_id=config.volume), config.volume))
    like += [from_rows(archive.rows(study_id=s)) for s in (config.study, *config.more) if s]
    text = None
    if config.scan or config.text:
        assert config.checkpoint is not None
        checkpoint = checkpoints.load(config.checkpoint, device=config.device)
        space = space_of(checkpoint)
        if config.scan:
            _, vector = embed_file(checkpoint, config.scan, device=config.device)
            like.append(Query(vector=archive.project(vector, space), name=config.scan.name))
        if config.text:
            vector = embed_texts(checkpoint, [config.text], device=config.device)[0]
            text = Query(vector=archive.project(vector, space, "report"), name=f"“{config.text}”")
    unlike = [from_rows(archive.rows(study_id=study)) for study in config.less]
    return compose(like, unlike, text, background, text_weight=config.text_weight)


def _own_labels(config: SimilarConfig, archive: Archive) -> np.ndarray | None:
    if config.volume:
        return archive.rows(volume_id=config.volume).labels[0]
    study = config.study or (config.more[0] if config.more else None)
    return archive.rows(study_id=study).labels[0] if study else None


def _write(
    config: SimilarConfig,
    archive: Archive,
    query: Query,
    hits: Sequence[Hit],
    asked: np.ndarray | None,
) -> None:
    from ctclip.data.cache import PreparedCohort

    assert config.out is not None
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "similar.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["rank", "study_id", "volume_id", "similarity", "is_ordinary", "shared", "other"]
        )
        for rank, hit in enumerate(hits, 1):
            shared, other = compare_findings(asked, hit.labels)
            row = [rank, hit.study_id, hit.volume_id, f"{hit.similarity:.6f}", int(hit.is_ordinary)]
            writer.writerow([*row, ";".join(shared), ";".join(other)])
    if config.cohort is None:
        return
    cohort = PreparedCohort.open(config.cohort)
    spacing = cohort.volume_config.spacing_mm
    panels = [_query_panel(config, archive, query, cohort, asked)]
    for rank, hit in enumerate(hits, 1):
        shared, other = compare_findings(asked, hit.labels)
        panels.append(
            figure.Panel(
                title=f"{rank} · {hit.study_id}\n{hit.similarity:.3f}",
                hu=cohort.read(hit.volume_id),
                spacing_mm=spacing,
                shared=shared,
                other=other,
            )
        )
    figure.save(panels, config.out / "similar.png")
    logger.info("similar cases: %s", config.out / "similar.png")


def _query_panel(
    config: SimilarConfig,
    archive: Archive,
    query: Query,
    cohort: "PreparedCohort",
    asked: np.ndarray | None,
) -> figure.Panel:
    from ctclip.data import volume

    hu = None
    study = config.study or (config.more[0] if config.more else None)
    if config.scan:
        hu = volume.preprocess(volume.read(config.scan), cohort.volume_config)
    elif config.volume:
        hu = cohort.read(config.volume)
    elif study:
        hu = cohort.read(archive.rows(study_id=study).volume_id[0])
    _, other = compare_findings(None, asked) if asked is not None else ([], [])
    return figure.Panel(
        title=f"Query\n{query.name[:40]}",
        hu=hu,
        spacing_mm=cohort.volume_config.spacing_mm,
        other=other,
    )
