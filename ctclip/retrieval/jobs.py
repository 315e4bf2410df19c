"""The bodies of ``ctclip-index`` and ``ctclip-page``."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ctclip.embeddings import EmbeddingError, EmbeddingTable
from ctclip.embeddings.transform import fit
from ctclip.retrieval.index import MilvusArchive
from ctclip.retrieval.opening import open_archive, with_scores
from ctclip.retrieval.page import ServeConfig, serve
from ctclip.retrieval.phrase import finding_phrases
from ctclip.retrieval.question import Background
from ctclip.retrieval.service import CaseService, Scorer, forget

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """What to do with an index, and where it is."""

    action: Literal["build", "insert", "withdraw", "backup", "info"]
    uri: str
    """A file (``archive.db``) or a Milvus server (``http://host:19530``)."""

    name: str = "ctclip"
    token: str = ""
    table: Path | None = None
    """``volumes.parquet``: what to build from or insert."""

    reports: Path | None = None
    """``reports.parquet``: tells which similarity to a text is ordinary."""

    transform: Literal["none", "centre", "whiten"] = "none"
    """Fitted on the table's training split when building (on all rows where there is none)."""

    index: Literal["FLAT", "HNSW"] | None = None
    partition_by: Literal["hospital", "manufacturer", "sex", "split"] | None = None
    """On a server: keep the volumes of one hospital (say) together."""

    patients: tuple[str, ...] = ()
    """Whom to withdraw."""

    state: Path | None = None
    """The page's folder of saved results: those that show a withdrawn patient go too."""

    out: Path | None = None
    """Where a backup goes."""


def run_index(config: IndexConfig, scorer: Scorer | None = None) -> None:
    """Build or change an index, and say what it holds.

    Args:
        config: What to do.
        scorer: Adds zero-shot scores to a table that has none.

    Raises:
        EmbeddingError: If the archive holds none of the patients to withdraw.
        ValueError: If the action lacks its input.
    """
    from rich.console import Console

    console = Console()
    if config.action == "build":
        table, background = _prepared(config, scorer)
        archive = MilvusArchive.build(
            config.uri,
            table,
            background=background,
            index=config.index,
            partition_by=config.partition_by,
            name=config.name,
            token=config.token,
        )
    else:
        archive = MilvusArchive(config.uri, config.name, config.token)
    with archive:
        if config.action == "insert":
            table = EmbeddingTable.load(_needed(config.table, "table"))
            if archive.has_scores and scorer is not None:
                table = with_scores(table, scorer)
            if archive.transform is not None and table.transform is None:
                table = table.transformed(archive.transform)
            archive.insert(table)
        elif config.action == "withdraw":
            if not config.patients:
                raise ValueError("name the patients to withdraw: patients=[p1,p2]")
            studies = archive.studies_of(config.patients)
            if not studies:
                raise EmbeddingError(
                    f"{config.uri} holds none of the patients {', '.join(config.patients)}, so "
                    "nothing was removed, no saved result either; check the spelling. If they were "
                    "withdrawn before without state=<folder>, delete the results there that show "
                    "them: the archive no longer knows which studies are theirs"
                )
            if unknown := [name for name in config.patients if not archive.studies_of([name])]:
                logger.warning(
                    "%s holds none of %s: nothing of theirs is removed; check the spelling",
                    config.uri,
                    ", ".join(unknown),
                )
            if config.state is not None:  # first: the archive alone knows whose the studies are
                num_results = forget(config.state, studies)
                console.print(f"removed {num_results} saved results from {config.state}")
            else:
                logger.warning(
                    "without state=<folder> the page's saved results that show these patients "
                    "stay, and can't be found later; their studies: %s",
                    ", ".join(sorted(studies)),
                )
            removed = archive.withdraw(config.patients)
            console.print(f"removed {removed} volumes of {len(config.patients)} patients")
        elif config.action == "backup":
            num_volumes = archive.backup(_needed(config.out, "out"))
            console.print(f"wrote {num_volumes} volumes to {config.out}")
        together = archive.partition_by
        partitioned = f", partitioned by {together}" if together else ""
        console.print(
            f"{config.uri} ({archive.index}{partitioned}): {len(archive)} volumes of width "
            f"{archive.width}, fields {', '.join(archive.fields) or 'none'}, "
            f"scores {archive.has_scores}, model {archive.provenance.get('checkpoint', '?')[:12]}"
        )


def _prepared(config: IndexConfig, scorer: Scorer | None) -> tuple[EmbeddingTable, Background]:
    table = EmbeddingTable.load(_needed(config.table, "table"))
    reports = EmbeddingTable.load(config.reports) if config.reports else None
    if scorer is not None:
        table = with_scores(table, scorer)
    if config.transform != "none":
        has_train = "train" in table.split
        texts = None
        if reports is not None:
            training = reports.of_split("train") if "train" in reports.split else reports
            texts = training.vectors_for_reports
        fitted_on = table.of_split("train") if has_train else table
        transform = fit(fitted_on.vectors_for_reports, texts, whiten=config.transform == "whiten")
        table = table.transformed(transform)
        reports = reports.transformed(transform) if reports is not None else None
    phrases = None if scorer is None else finding_phrases(scorer, table)
    return table, Background.of(table, reports, phrases)


def _needed(path: Path | None, name: str) -> Path:
    if path is None:
        raise ValueError(f"this needs {name}=<path>")
    return path


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """What the page searches and shows. Give an index or a table."""

    index: str | None = None
    """URI of an index that ctclip-index built."""

    index_name: str = "ctclip"
    index_token: str = ""
    table: Path | None = None
    """``volumes.parquet``, searched in memory."""

    reports: Path | None = None
    """``reports.parquet`` beside ``table``."""

    cohort: Path | None = None
    """Prepared cohort with the archive's volumes, to look at them."""

    state: Path | None = None
    """Folder for permanent results; without it links end with the process."""

    device: str = "cpu"
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        if (self.index is None) == (self.table is None):
            raise ValueError("give either index=<uri> or table=<volumes.parquet>")


def make_service(config: PageConfig, scorer: Scorer) -> CaseService:
    """Open the archive and put the model in front of it."""
    from ctclip.data.cache import PreparedCohort

    cohort = PreparedCohort.open(config.cohort) if config.cohort else None
    opened = open_archive(
        config.index,
        config.table,
        config.reports,
        scorer,
        name=config.index_name,
        token=config.index_token,
    )
    return CaseService(
        opened.archive,
        scorer,
        cohort=cohort,
        background=opened.background,
        reference=opened.reference,
        state=config.state,
        device=config.device,
    )


def run_page(config: PageConfig, scorer: Scorer) -> None:
    """Serve the page until interrupted."""
    serve(make_service(config, scorer), config.serve)
