"""What is asked, and what an answer means: mixed queries, random pairs, shared findings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ctclip.embeddings import EmbeddingTable
from ctclip.embeddings.health import random_pair_cosines
from ctclip.findings import FINDINGS
from ctclip.retrieval.search import Query, weighted

ORDINARY_QUANTILE = 0.95
"""A similarity that this share of random pairs stays below is ordinary."""

PHRASE_VOLUMES = 10_000
"""As many of an archive's volumes tell what similarity to a phrase is ordinary."""

EXCERPT_FIELDS = ("impression", "report", "findings")
EXCERPT_CHARACTERS = 400

LESS_WEIGHT = 0.5
"""How strongly "less like those" counts beside "more like these" (Rocchio's usual ratio)."""


@dataclass(frozen=True, kw_only=True)
class Background:
    """What similarity means in one archive: the cosines of pairs of different patients."""

    volume_spread: float = 1.0
    volume_mean: float | None = None
    volume_ordinary: float | None = None
    text_spread: float = 1.0
    text_mean: float | None = None
    text_ordinary: float | None = None
    phrase_spread: float = 1.0
    phrase_mean: float | None = None
    phrase_ordinary: float | None = None

    @classmethod
    def of(
        cls,
        volumes: EmbeddingTable,
        reports: EmbeddingTable | None = None,
        phrases: np.ndarray | None = None,
    ) -> "Background":
        """Measure it on random pairs of different patients.

        Args:
            volumes: The archive; a backup brings along what can't be measured on it alone.
            reports: Of the same patients: what similarity to a report is ordinary.
            phrases: ``(18, E)`` points of the findings' names, see
                :func:`ctclip.retrieval.phrase.finding_phrases`: each goes with every volume.
        """
        found: dict[str, float] = json.loads(volumes.provenance.get(_key(volumes), "{}"))
        for name, other in (("volume", volumes), ("text", reports)):
            if other is None:
                continue
            volumes.require_same_space(other)
            cosines = random_pair_cosines(
                other.vectors_for_reports,
                volumes.vectors_for_reports,
                other.patient_id,
                volumes.patient_id,
            )
            found |= _distribution(name, cosines)
        if phrases is not None:
            cosines = volumes.vectors_for_reports[:PHRASE_VOLUMES] @ phrases.T
            found |= _distribution("phrase", cosines.ravel())
        return cls(**found)

    def kept_in(self, volumes: EmbeddingTable) -> EmbeddingTable:
        """The archive as a table that brings this along, for :meth:`of`."""
        kept = {_key(volumes): json.dumps(asdict(self))}
        return replace(volumes, provenance={**volumes.provenance, **kept})


def _key(volumes: EmbeddingTable) -> str:
    return f"background {volumes.provenance.get('transform', '')}".strip()  # true of one space


def _distribution(name: str, cosines: np.ndarray) -> dict[str, float]:
    if cosines.size < 2:
        return {}
    return {
        f"{name}_mean": float(cosines.mean()),
        f"{name}_spread": max(float(cosines.std()), 1e-6),
        f"{name}_ordinary": float(np.quantile(cosines, ORDINARY_QUANTILE)),
    }


def compose(
    like: Sequence[Query],
    unlike: Sequence[Query],
    text: Query | None,
    background: Background,
    text_weight: float = 0.5,
) -> Query:
    """One query from scans, studies and a text.

    Args:
        like: Scans or studies to be like; their mean counts.
        unlike: Studies to be unlike.
        text: A text to agree with, see :func:`ctclip.retrieval.phrase.text_query`.
        background: Of the archive, so that the weights mean what they say.
        text_weight: The text's weight when there is something else too.

    Raises:
        ValueError: If nothing is asked.
    """

    def known(query: Query) -> Query:
        return replace(
            query,
            ordinary=background.volume_ordinary,
            expected=background.volume_mean,
            spread=background.volume_spread,
        )

    cases = [(1.0 / len(like), known(query)) for query in like]
    cases += [(-LESS_WEIGHT / len(unlike), known(query)) for query in unlike]
    if text is None:
        return weighted(cases)
    if not cases:
        return text
    parts = [((1 - text_weight) * weight, query) for weight, query in cases]
    return weighted([*parts, (text_weight, text)])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Findings of a query and of a hit."""

    shared: list[str]
    only_hit: list[str]
    """Present in the hit; absent in the query, or not known there."""

    only_query: list[str]


def compare_findings(asked: np.ndarray | None, found: np.ndarray) -> Comparison:
    """Which findings a query and a hit have in common, and which only one of them has.

    Args:
        asked: ``(18,)`` 1, 0 or nan of the query; None when nothing is known of it.
        found: ``(18,)`` of the hit.
    """
    mine = np.zeros(len(FINDINGS), dtype=bool) if asked is None else asked == 1
    theirs = found == 1

    def names(where: np.ndarray) -> list[str]:
        return [FINDINGS[index] for index in np.flatnonzero(where)]

    return Comparison(
        shared=names(mine & theirs),
        only_hit=names(theirs & ~mine),
        only_query=names(mine & ~theirs),
    )


def excerpt(fields: Mapping[str, str]) -> str:
    """The beginning of a case's report, where the export was told to carry one."""
    report = next((fields[name] for name in EXCERPT_FIELDS if fields.get(name)), "")
    text = " ".join(report.split())
    if len(text) > EXCERPT_CHARACTERS:
        text = text[:EXCERPT_CHARACTERS].rsplit(" ", 1)[0] + " …"
    return text
