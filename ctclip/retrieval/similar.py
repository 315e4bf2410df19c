"""The body of ``ctclip-similar``: a question, an export → similar cases as table and picture."""

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.embeddings import embed_file, space_of
from ctclip.findings import FINDINGS
from ctclip.retrieval import figure
from ctclip.retrieval.filters import Filter
from ctclip.retrieval.opening import open_archive
from ctclip.retrieval.phrase import findings_in, text_query
from ctclip.retrieval.question import Background, Comparison, compare_findings, compose, excerpt
from ctclip.retrieval.reference import Reference, findings_of
from ctclip.retrieval.search import Archive, Hit, Query, from_rows
from ctclip.retrieval.service import Scorer

if TYPE_CHECKING:
    from ctclip.data.cache import PreparedCohort

logger = logging.getLogger(__name__)

CSV_COLUMNS = (
    "rank",
    "study_id",
    "volume_id",
    "similarity",
    "is_ordinary",
    "shared",
    "only_hit",
    "only_query",
    "excerpt",
)


@dataclass(frozen=True, kw_only=True)
class SimilarConfig:
    """One question to an archive. A scan or study, and a text, may be asked together.

    Give a table or an index.
    """

    table: Path | None = None
    """``volumes.parquet`` that ctclip-embed wrote, searched in memory."""

    index: str | None = None
    """URI of an index that ctclip-index built."""

    index_name: str = "ctclip"
    index_token: str = ""
    reports: Path | None = None
    """``reports.parquet`` beside ``table``; tells which similarity to a text is ordinary."""

    volume: str | None = None
    study: str | None = None
    scan: Path | None = None
    """A NIfTI file or DICOM folder that the archive has never seen."""

    accept: tuple[str, ...] = ()
    """Reasons to hold that scan back, such as "8-bit", that are accepted."""

    rescale: tuple[float, float] | None = None
    """Slope and intercept for that scan, applied only if it does not hold HU."""

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
        if (self.index is None) == (self.table is None):
            raise ValueError("give either the table (volumes.parquet) or the index (its URI)")
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"text_weight must be between 0 and 1, got {self.text_weight}")


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A question's point in space, and what is known of the scan or study behind it."""

    query: Query
    findings: np.ndarray | None


def run(config: SimilarConfig, scorer: Scorer | None = None) -> list[Hit]:
    """Search, print the hits, and write them with their slices.

    Args:
        config: The question.
        scorer: The model: needed to ask by a new scan or a text. With it, findings are compared
            by zero-shot scores, without it by labels.

    Returns:
        The hits, best first.

    Raises:
        ValueError: If a scan or a text is asked without a model.
        EmbeddingError: If the archive and the model don't belong together, or it doesn't hold
            the study that is asked for.
    """
    from rich.console import Console
    from rich.table import Table

    if (config.scan or config.text) and scorer is None:
        raise ValueError("a scan or a text has to be embedded first: give the checkpoint (--ckpt)")
    opened = open_archive(
        config.index,
        config.table,
        config.reports,
        scorer,
        name=config.index_name,
        token=config.index_token,
    )
    archive, reference = opened.archive, opened.reference
    asked = _ask(config, archive, opened.background, reference, scorer)
    hits = archive.search(asked.query, config.k, config.per_patient, config.where)
    compared = [
        compare_findings(asked.findings, theirs)
        for hit in hits
        if (theirs := findings_of(hit.scores, hit.labels, reference)) is not None
    ]
    title = f"Cases similar to {asked.query.name} ({len(archive)} volumes searched)"
    shown = Table(title=title)
    for heading in ("#", "study", "similarity", "shared", "only this case", "only the query"):
        # A study has to be copied whole; folded, it fits any width.
        shown.add_column(heading, overflow="fold", min_width=12 if heading == "study" else None)
    has_excerpt = any(excerpt(hit.fields) for hit in hits)
    if has_excerpt:
        shown.add_column("report")
    for rank, (hit, seen) in enumerate(zip(hits, compared, strict=True), 1):
        mark = " (like many random pairs)" if hit.is_ordinary else ""
        cells = [str(rank), hit.study_id, f"{hit.similarity:.3f}{mark}"]
        cells += [", ".join(names) for names in (seen.shared, seen.only_hit, seen.only_query)]
        shown.add_row(*cells, *([excerpt(hit.fields)] if has_excerpt else []))
    Console().print(shown)
    if config.out is not None:
        _write(config, archive, asked, hits, compared)
    return hits


def _ask(
    config: SimilarConfig,
    archive: Archive,
    background: Background,
    reference: Reference | None,
    scorer: Scorer | None,
) -> _Asked:
    """Turn the question into a point of the joint space."""
    like: list[Query] = []
    scores = labels = None
    rows = [archive.rows(volume_id=config.volume)] if config.volume else []
    rows += [archive.rows(study_id=study) for study in (config.study, *config.more) if study]
    if rows:
        like += [from_rows(row) for row in rows]
        labels = rows[0].labels[0]
        scores = None if rows[0].scores is None else rows[0].scores[0]
        if config.volume:
            like[0] = replace(like[0], name=config.volume)
    text = None
    if scorer is not None and config.scan:
        space = space_of(scorer.checkpoint)
        prompt, vector = embed_file(
            scorer.checkpoint,
            config.scan,
            device=config.device,
            accept=config.accept,
            rescale=config.rescale,
        )
        like.append(Query(vector=archive.project(vector, space), name=config.scan.name))
        found = scorer.score_vectors(prompt[None])[0]
        scores = np.array([found[finding] for finding in FINDINGS], dtype=np.float32)
        labels = None
    if scorer is not None and config.text:
        text = text_query(config.text, archive, scorer, background, config.device)
        if not like:
            labels = findings_in(config.text)
    unlike = [from_rows(archive.rows(study_id=study)) for study in config.less]
    query = compose(like, unlike, text, background, text_weight=config.text_weight)
    return _Asked(query=query, findings=findings_of(scores, labels, reference))


def _write(
    config: SimilarConfig,
    archive: Archive,
    asked: _Asked,
    hits: Sequence[Hit],
    compared: Sequence[Comparison],
) -> None:
    from ctclip.data.cache import PreparedCohort

    assert config.out is not None
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "similar.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for rank, (hit, seen) in enumerate(zip(hits, compared, strict=True), 1):
            row = [rank, hit.study_id, hit.volume_id, f"{hit.similarity:.6f}", int(hit.is_ordinary)]
            names = [";".join(part) for part in (seen.shared, seen.only_hit, seen.only_query)]
            writer.writerow([*row, *names, excerpt(hit.fields)])
    if config.cohort is None:
        return
    cohort = PreparedCohort.open(config.cohort)
    panels = [_query_panel(config, archive, asked, cohort)]
    for rank, (hit, seen) in enumerate(zip(hits, compared, strict=True), 1):
        panels.append(
            figure.Panel(
                title=f"{rank} · {hit.study_id}\n{hit.similarity:.3f}",
                hu=cohort.read(hit.volume_id),
                spacing_mm=cohort.volume_config.spacing_mm,
                shared=seen.shared,
                other=seen.only_hit,
            )
        )
    figure.save(panels, config.out / "similar.png")
    logger.info("similar cases: %s", config.out / "similar.png")


def _query_panel(
    config: SimilarConfig,
    archive: Archive,
    asked: _Asked,
    cohort: "PreparedCohort",
) -> figure.Panel:
    from ctclip.data import volume

    hu = None
    study = config.study or (config.more[0] if config.more else None)
    if config.scan:
        scan = volume.read(config.scan, rescale=config.rescale)  # embedded, so it was checked
        hu = volume.preprocess(scan, cohort.volume_config)
    elif config.volume:
        hu = cohort.read(config.volume)
    elif study:
        hu = cohort.read(archive.rows(study_id=study).volume_id[0])
    own = [] if asked.findings is None else compare_findings(None, asked.findings).only_hit
    return figure.Panel(
        title=f"Query\n{asked.query.name[:40]}",
        hu=hu,
        spacing_mm=cohort.volume_config.spacing_mm,
        other=own,
    )
