"""Exact search of an archive in memory, and the rules that every archive follows.

Nobody finds themselves: a query's own patient is never returned. One study is one case, however
often it was reconstructed, and no patient fills the list.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ctclip.embeddings import EmbeddingError, EmbeddingTable, Transform
from ctclip.embeddings.table import Kind, require_same_space
from ctclip.retrieval.filters import FILTER_FIELDS, Filter

CHOICE_FIELDS = ("sex", "hospital", "manufacturer")
MAX_CHOICES = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """What to look for, as a point in the joint space."""

    vector: np.ndarray
    """``(E,)`` float32, L2-normalised."""

    exclude_patients: frozenset[str] = frozenset()
    """Patients that must not be returned: those whom the query comes from."""

    ordinary: float | None = None
    """Similarity that 95 % of random pairs stay below; no better is no find."""

    expected: float | None = None
    """Mean similarity of random pairs."""

    spread: float = 1.0
    """Standard deviation of the similarity of random pairs: what a part's weight is measured in."""

    name: str = "query"
    """What to call it in a figure or a log; no identifier of a patient outside the archive."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Hit:
    """One similar case."""

    volume_id: str
    """The most similar volume of the study."""

    study_id: str
    patient_id: str
    similarity: float
    """Cosine in [-1, 1]."""

    labels: np.ndarray
    """``(18,)`` 1, 0 or nan, in the order of ``FINDINGS``."""

    fields: dict[str, str] = field(default_factory=dict)
    scores: np.ndarray | None = None
    """``(18,)`` zero-shot probabilities, where the archive has them."""

    is_ordinary: bool = False
    """Whether one random pair in twenty of the archive's cases is as similar."""


class Archive(Protocol):
    """Something that can be searched: a table in memory or a vector store."""

    def search(
        self, query: Query, k: int = 10, per_patient: int = 1, where: Filter | None = None
    ) -> list[Hit]:
        """The ``k`` most similar studies, best first."""
        ...

    def rows(self, *, volume_id: str | None = None, study_id: str | None = None) -> EmbeddingTable:
        """The archive's rows of a volume or a study."""
        ...

    def project(
        self, vector: np.ndarray, provenance: Mapping[str, str], kind: Kind = "volume"
    ) -> np.ndarray:
        """Bring a model's output into the archive's space."""
        ...

    def studies(self, beginning: str = "", limit: int = 50) -> list[str]:
        """Studies whose identifier begins with a text, in order."""
        ...

    def values(self) -> dict[str, list[str]]:
        """The fields that a filter may read, with their values where they are few."""
        ...

    def __len__(self) -> int: ...


class MemoryArchive:
    """Exact search by one matrix product; the whole archive is held in memory."""

    def __init__(self, table: EmbeddingTable) -> None:
        if table.kind != "volume":
            raise EmbeddingError("only volumes are searched; this is a table of reports")
        self.table = table
        self._vectors = table.vectors_for_reports.astype(np.float64)
        self._order = np.argsort(np.array(table.volume_id))  # ties go to the smaller identifier

    def search(
        self, query: Query, k: int = 10, per_patient: int = 1, where: Filter | None = None
    ) -> list[Hit]:
        """The ``k`` most similar studies, best first.

        Args:
            query: What to look for.
            k: How many studies to return; fewer when the archive has no more.
            per_patient: How many studies of one patient may be returned.
            where: Conditions on the returned cases.

        Raises:
            EmbeddingError: If the query's width differs from the archive's.
        """
        check_query(query, self.table.width, k, per_patient)
        keep = (where or Filter()).mask(self.table)
        similarity = similarities(self._vectors, query.vector)
        order = self._order[np.argsort(-similarity[self._order], kind="stable")]
        candidates = (self._hit(row, float(similarity[row]), query) for row in order if keep[row])
        return collapse(candidates, query, k, per_patient)

    def rows(self, *, volume_id: str | None = None, study_id: str | None = None) -> EmbeddingTable:
        """The archive's rows of a volume or a study.

        Raises:
            EmbeddingError: If there is none.
        """
        column, wanted = (
            (self.table.volume_id, volume_id) if volume_id else (self.table.study_id, study_id)
        )
        found = [row for row, value in enumerate(column) if value == wanted]
        if not found:
            raise EmbeddingError(f"the archive has no case {wanted!r} among its {len(self.table)}")
        return self.table.select(found)

    def project(
        self, vector: np.ndarray, provenance: Mapping[str, str], kind: Kind = "volume"
    ) -> np.ndarray:
        """Bring a model's output into the archive's space.

        Args:
            vector: ``(E,)`` L2-normalised, of a scan or a text.
            provenance: Of what made the vector: ``space_of(checkpoint)``.
            kind: ``"report"`` for a text.

        Raises:
            EmbeddingError: If it is of another model or preprocessing.
        """
        return project(vector, provenance, kind, self.table.provenance, self.table.transform)

    def studies(self, beginning: str = "", limit: int = 50) -> list[str]:
        """Studies whose identifier begins with a text, in order."""
        return sorted({s for s in self.table.study_id if s.startswith(beginning)})[:limit]

    def values(self) -> dict[str, list[str]]:
        """The fields that a filter may read, with their values where they are few."""
        return distinct_values(self.table.fields)

    def __len__(self) -> int:
        return len(self.table)

    def _hit(self, row: int, similarity: float, query: Query) -> Hit:
        table = self.table
        return Hit(
            volume_id=table.volume_id[row],
            study_id=table.study_id[row],
            patient_id=table.patient_id[row],
            similarity=similarity,
            labels=table.labels[row],
            fields={name: column[row] for name, column in table.fields.items()},
            scores=None if table.scores is None else table.scores[row],
            is_ordinary=query.ordinary is not None and similarity <= query.ordinary,
        )


def distinct_values(fields: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Values to choose from, for fields that are chosen from; others are ranges or not filtered."""
    found = {}
    for name in FILTER_FIELDS:
        if name in fields:
            values = sorted(set(fields[name]) - {""}) if name in CHOICE_FIELDS else []
            found[name] = values[:MAX_CHOICES]
    return found


def similarities(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """``(N,)`` float64 cosines, rounded so that every archive orders near-ties alike.

    Args:
        vectors: ``(N, E)`` L2-normalised; float64, because float32 sums depend on the shape.
        query: ``(E,)`` L2-normalised.
    """
    return np.round(vectors.astype(np.float64, copy=False) @ query.astype(np.float64), 6)


def project(
    vector: np.ndarray,
    provenance: Mapping[str, str],
    kind: Kind,
    space: Mapping[str, str],
    transform: Transform | None,
) -> np.ndarray:
    """Check that a vector is of the archive's model, and apply the archive's transform."""
    require_same_space({**space, "transform": ""}, {**provenance, "transform": ""})
    return vector if transform is None else transform(vector[None], kind)[0]


def collapse(candidates: Iterable[Hit], query: Query, k: int, per_patient: int) -> list[Hit]:
    """Apply the archive's rules to candidates that come best first."""
    hits: list[Hit] = []
    studies: set[str] = set()
    patients: dict[str, int] = {}
    for hit in candidates:
        if len(hits) == k:
            break
        taken = patients.get(hit.patient_id, 0)
        if (
            hit.patient_id in query.exclude_patients
            or hit.study_id in studies
            or taken >= per_patient
        ):
            continue
        studies.add(hit.study_id)
        patients[hit.patient_id] = taken + 1
        hits.append(hit)
    return hits


def check_query(query: Query, width: int, k: int, per_patient: int) -> None:
    """Refuse a query that can't be answered.

    Raises:
        EmbeddingError: If the vector has another width, or isn't a unit vector.
        ValueError: If ``k`` or ``per_patient`` isn't positive.
    """
    if k < 1 or per_patient < 1:
        raise ValueError(f"k and per_patient must be at least 1, got {k} and {per_patient}")
    if query.vector.shape != (width,):
        raise EmbeddingError(f"the query is {query.vector.shape}, the archive's vectors ({width},)")
    norm = float(np.linalg.norm(query.vector))
    if not abs(norm - 1.0) < 1e-3:
        raise EmbeddingError(f"the query's vector has norm {norm:.4g}, expected 1")


def from_rows(rows: EmbeddingTable, name: str | None = None) -> Query:
    """Look for cases like some of the archive: a volume, or all volumes of a study.

    Args:
        rows: What ``archive.rows`` returned.
        name: What to call the query; by default the first row's study.
    """
    return Query(
        vector=unit(rows.vectors_for_reports.mean(axis=0)),
        exclude_patients=frozenset(rows.patient_id),
        name=name or rows.study_id[0],
    )


def weighted(parts: Sequence[tuple[float, Query]]) -> Query:
    """Look for several things at once: a scan and a text, or more like these, less like those.

    Cosines to a scan and to a text live on different scales, because the two modalities sit
    apart in the joint space. Dividing each part by its own spread makes the weights mean what
    they say.

    Args:
        parts: Weight and query; a negative weight asks for less of it.

    Raises:
        ValueError: If the parts cancel out.
    """
    if not parts:
        raise ValueError("nothing to search for: give at least one scan, study or text")
    shares = [weight / part.spread for weight, part in parts]
    total = np.zeros_like(parts[0][1].vector, dtype=np.float64)
    expected, excess_squared, is_known = 0.0, 0.0, True
    for share, (_, part) in zip(shares, parts, strict=True):
        total += share * part.vector
        if share < 0 or part.ordinary is None or part.expected is None:
            is_known = False
        else:  # as if the parts varied independently
            expected += share * part.expected
            excess_squared += (share * (part.ordinary - part.expected)) ** 2
    length = float(np.linalg.norm(total))
    if length < 1e-6:
        raise ValueError("the parts of the query cancel each other out; change their weights")
    return Query(
        vector=(total / length).astype(np.float32),
        exclude_patients=frozenset().union(*(part.exclude_patients for _, part in parts)),
        ordinary=(expected + excess_squared**0.5) / length if is_known else None,
        expected=expected / length if is_known else None,
        name=" + ".join(part.name for _, part in parts),
    )


def unit(vector: np.ndarray) -> np.ndarray:
    """A vector scaled to length 1, float32."""
    vector = np.asarray(vector, dtype=np.float64)
    return (vector / np.linalg.norm(vector)).astype(np.float32)
