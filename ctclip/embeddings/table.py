"""The table of embeddings: identifiers, vectors, labels and the model that they come from."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctclip.embeddings.transform import Transform
from ctclip.findings import FINDINGS

Kind = Literal["volume", "report"]

HEADER_KEY = b"ctclip.embeddings"
TRANSFORM_KEY = b"ctclip.transform"
FORMAT_VERSION = 1
SPACE_KEYS = ("checkpoint", "fingerprint", "transform")
"""Provenance that must agree before two tables may be compared."""


class EmbeddingError(ValueError):
    """A table that is malformed, or two tables that don't belong together."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingTable:
    """Embeddings of ``N`` volumes or reports with what is needed to evaluate and search them.

    Rows of a ``"report"`` table are studies: their ``volume_id`` is the study's first volume.
    """

    volume_id: list[str]
    study_id: list[str]
    patient_id: list[str]
    split: list[str]
    vectors: np.ndarray
    """``(N, E)`` float32, L2-normalised: the read-out that is compared with prompts."""

    labels: np.ndarray
    """``(N, 18)`` float32 in the order of ``FINDINGS``: 1, 0 or nan for unknown."""

    kind: Kind = "volume"
    provenance: dict[str, str] = field(default_factory=dict)
    """At least ``checkpoint`` (SHA-256) and ``fingerprint`` (of the preprocessing)."""

    report_vectors: np.ndarray | None = None
    """``(N, E)``: the read-out trained against whole reports, where the model has its own."""

    fields: dict[str, list[str]] = field(default_factory=dict)
    """Columns that the user asked for: sex, age, hospital, report ...; empty string = unknown."""

    scores: np.ndarray | None = None
    """``(N, 18)`` float32 zero-shot probabilities, where somebody computed them."""

    content: list[str] | None = None
    """What each row was computed from, as a checksum: another means that the row is out of date."""

    transform: Transform | None = None
    """The centring or whitening that ``vectors`` went through, if any."""

    def __post_init__(self) -> None:
        num_rows = len(self.volume_id)
        columns = {"study_id": self.study_id, "patient_id": self.patient_id, "split": self.split}
        if self.content is not None:
            columns["content"] = self.content
        for name, column in {**columns, **self.fields}.items():
            if len(column) != num_rows:
                raise EmbeddingError(f"{name} has {len(column)} rows, volume_id has {num_rows}")
        if self.labels.shape != (num_rows, len(FINDINGS)):
            raise EmbeddingError(
                f"labels are {self.labels.shape}, expected {(num_rows, len(FINDINGS))}"
            )
        if self.scores is not None and self.scores.shape != self.labels.shape:
            raise EmbeddingError(f"scores are {self.scores.shape}, labels {self.labels.shape}")
        for name, matrix in (("vectors", self.vectors), ("report_vectors", self.report_vectors)):
            if matrix is None:
                continue
            if matrix.ndim != 2 or matrix.shape[0] != num_rows or matrix.dtype != np.float32:
                raise EmbeddingError(
                    f"{name} are {matrix.dtype} {matrix.shape}, expected float32 ({num_rows}, E)"
                )
            norms = np.linalg.norm(matrix, axis=1)
            wrong = np.flatnonzero(~(np.abs(norms - 1.0) < 1e-3))
            if wrong.size:
                raise EmbeddingError(
                    f"{name} of {self.volume_id[wrong[0]]!r} has norm {norms[wrong[0]]:.4g}, "
                    f"expected 1 ({wrong.size} of {num_rows} rows); normalise before building a "
                    "table, and look for nan in the model's output"
                )

    def __len__(self) -> int:
        return len(self.volume_id)

    @property
    def width(self) -> int:
        """Embedding width ``E``."""
        return int(self.vectors.shape[1])

    @property
    def vectors_for_reports(self) -> np.ndarray:
        """``(N, E)``: the vectors to compare with whole reports rather than with prompts."""
        return self.vectors if self.report_vectors is None else self.report_vectors

    def select(self, rows: Sequence[int] | np.ndarray) -> "EmbeddingTable":
        """The given rows, in the given order, as a new table.

        Args:
            rows: Indices, or a boolean mask of length ``N``.
        """
        index = np.asarray(rows)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)

        def pick(column: list[str]) -> list[str]:
            return [column[row] for row in index]

        return replace(
            self,
            volume_id=pick(self.volume_id),
            study_id=pick(self.study_id),
            patient_id=pick(self.patient_id),
            split=pick(self.split),
            vectors=self.vectors[index],
            labels=self.labels[index],
            report_vectors=None if self.report_vectors is None else self.report_vectors[index],
            scores=None if self.scores is None else self.scores[index],
            fields={name: pick(column) for name, column in self.fields.items()},
            content=None if self.content is None else pick(self.content),
        )

    def of_split(self, split: str) -> "EmbeddingTable":
        """The rows of one split.

        Raises:
            EmbeddingError: If the table has no such row.
        """
        rows = [row for row, name in enumerate(self.split) if name == split]
        if not rows:
            raise EmbeddingError(
                f"the table has no row of split {split!r}; it has {sorted(set(self.split))}"
            )
        return self.select(rows)

    def row_of(self, volume_id: str) -> int:
        """The row of a volume.

        Raises:
            EmbeddingError: If the table doesn't hold it.
        """
        try:
            return self.volume_id.index(volume_id)
        except ValueError:
            raise EmbeddingError(
                f"no volume {volume_id!r} among the {len(self)} of this table; "
                f"the first is {self.volume_id[0]!r}"
                if len(self)
                else f"no volume {volume_id!r}: the table is empty"
            ) from None

    def require_same_space(self, other: "EmbeddingTable | Mapping[str, str]") -> None:
        """Check that another table, or a provenance, is of the same model and preprocessing.

        Raises:
            EmbeddingError: If they differ; the message names both.
        """
        theirs = other.provenance if isinstance(other, EmbeddingTable) else other
        require_same_space(self.provenance, theirs)

    def transformed(self, transform: Transform) -> "EmbeddingTable":
        """The same rows in a centred or whitened space, which is another space: it won't mix.

        Raises:
            EmbeddingError: If the table went through a transform already.
        """
        if self.transform is not None:
            raise EmbeddingError("the table is transformed already; start from the raw export")
        return replace(
            self,
            vectors=transform(self.vectors_for_reports, self.kind),
            report_vectors=None,
            transform=transform,
            provenance={**self.provenance, "transform": transform.name},
        )

    def save(self, path: str | Path) -> None:
        """Write one Parquet file, atomically; the header travels in the schema's metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, pa.Array] = {
            "volume_id": pa.array(self.volume_id, pa.string()),
            "study_id": pa.array(self.study_id, pa.string()),
            "patient_id": pa.array(self.patient_id, pa.string()),
            "split": pa.array(self.split, pa.string()),
            "vector": _vector_column(self.vectors),
        }
        if self.content is not None:
            columns["content"] = pa.array(self.content, pa.string())
        if self.report_vectors is not None:
            columns["report_vector"] = _vector_column(self.report_vectors)
        for index, finding in enumerate(FINDINGS):
            values = np.ascontiguousarray(self.labels[:, index])
            columns[f"label:{finding}"] = pa.array(values, pa.float32(), mask=np.isnan(values))
            if self.scores is not None:
                scores = np.ascontiguousarray(self.scores[:, index])
                columns[f"score:{finding}"] = pa.array(scores, pa.float32())
        for name, column in self.fields.items():
            columns[f"field:{name}"] = pa.array(column, pa.string())
        header = {"version": FORMAT_VERSION, "kind": self.kind, "provenance": self.provenance}
        metadata = {HEADER_KEY: json.dumps(header).encode()}
        if self.transform is not None:
            metadata[TRANSFORM_KEY] = self.transform.to_bytes()
        table = pa.table(columns).replace_schema_metadata(metadata)

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")  # a killed writer leaves one at most
        try:
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "EmbeddingTable":
        """Read a table written by :meth:`save`.

        Raises:
            FileNotFoundError: If there is no such file.
            EmbeddingError: If the file isn't such a table.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no embedding table {path}; run: ctclip-embed --ckpt <model> --cohort <prepared>"
            )
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise EmbeddingError(f"{path} is not a readable Parquet file: {error}") from None
        header = _header(path, table.schema.metadata)
        fields = [name for name in table.column_names if name.startswith("field:")]
        return cls(
            volume_id=table["volume_id"].to_pylist(),
            study_id=table["study_id"].to_pylist(),
            patient_id=table["patient_id"].to_pylist(),
            split=table["split"].to_pylist(),
            vectors=_matrix(table["vector"]),
            labels=_finding_columns(table, "label"),
            kind=header["kind"],
            provenance=header["provenance"],
            report_vectors=(
                _matrix(table["report_vector"]) if "report_vector" in table.column_names else None
            ),
            fields={name.removeprefix("field:"): table[name].to_pylist() for name in fields},
            content=table["content"].to_pylist() if "content" in table.column_names else None,
            scores=(
                _finding_columns(table, "score")
                if f"score:{FINDINGS[0]}" in table.column_names
                else None
            ),
            transform=(
                Transform.from_bytes(table.schema.metadata[TRANSFORM_KEY])
                if TRANSFORM_KEY in table.schema.metadata
                else None
            ),
        )


def require_same_space(ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Check that two provenances are of one model and preprocessing.

    Raises:
        EmbeddingError: If they differ; the message names both.
    """
    for key in SPACE_KEYS:
        if ours.get(key) != theirs.get(key):
            raise EmbeddingError(
                f"these embeddings don't belong together: {key} is {ours.get(key)!r} "
                f"({ours.get('model', 'unnamed')}) and {theirs.get(key)!r} "
                f"({theirs.get('model', 'unnamed')}); export both with the same checkpoint and "
                "the same prepared cohort"
            )


def concatenate(tables: Sequence[EmbeddingTable]) -> EmbeddingTable:
    """Put tables below each other; a volume that comes twice keeps its first row.

    Raises:
        EmbeddingError: If they are of different models, preprocessing, kinds or columns.
    """
    if not tables:
        raise EmbeddingError("no tables to concatenate")
    first = tables[0]
    for other in tables[1:]:
        first.require_same_space(other)
        if other.kind != first.kind:
            raise EmbeddingError(f"a {first.kind} table can't be joined with a {other.kind} table")
        if list(other.fields) != list(first.fields):
            raise EmbeddingError(
                f"the tables carry different fields: {list(first.fields)} and {list(other.fields)}"
            )
        for name in ("report_vectors", "scores"):
            if (getattr(other, name) is None) != (getattr(first, name) is None):
                raise EmbeddingError(f"one table has {name}, the other has none")

    def join(columns: Sequence[list[str]]) -> list[str]:
        return [value for column in columns for value in column]

    def stack(matrices: Sequence[np.ndarray | None]) -> np.ndarray | None:
        present = [matrix for matrix in matrices if matrix is not None]
        return np.concatenate(present) if present else None

    contents = [t.content for t in tables if t.content is not None]
    joined = replace(
        first,
        volume_id=join([t.volume_id for t in tables]),
        study_id=join([t.study_id for t in tables]),
        patient_id=join([t.patient_id for t in tables]),
        split=join([t.split for t in tables]),
        vectors=np.concatenate([t.vectors for t in tables]),
        labels=np.concatenate([t.labels for t in tables]),
        report_vectors=stack([t.report_vectors for t in tables]),
        scores=stack([t.scores for t in tables]),
        fields={name: join([t.fields[name] for t in tables]) for name in first.fields},
        content=join(contents) if len(contents) == len(tables) else None,
    )
    rows = {volume: row for row, volume in reversed(list(enumerate(joined.volume_id)))}
    return joined if len(rows) == len(joined) else joined.select(sorted(rows.values()))


def _vector_column(vectors: np.ndarray) -> Any:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _matrix(column: Any) -> np.ndarray:
    array = column.combine_chunks()
    width = array.type.list_size
    return np.array(array.flatten().to_numpy(), dtype=np.float32).reshape(len(array), width)


def _finding_columns(table: Any, prefix: str) -> np.ndarray:
    columns = [table[f"{prefix}:{finding}"] for finding in FINDINGS]
    arrays = [column.to_numpy(zero_copy_only=False).astype(np.float32) for column in columns]
    return np.stack(arrays, axis=1)


def _header(path: Path, metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    if not metadata or HEADER_KEY not in metadata:
        raise EmbeddingError(f"{path} is a Parquet file but not an embedding table of ctclip")
    header: dict[str, Any] = json.loads(metadata[HEADER_KEY])
    if header["version"] > FORMAT_VERSION:
        raise EmbeddingError(
            f"{path} has format version {header['version']}, this ctclip reads up to "
            f"{FORMAT_VERSION}; update ctclip"
        )
    return header
