"""An archive in a vector store: one file on a laptop, a Milvus server in a hospital.

The same client serves both. A file (Milvus Lite) is searched exactly. A server searches
approximately (HNSW) if that finds what an exact search would: it is measured on the archive's own
vectors when it is built, and an archive where it fails is searched exactly too. Where a filter
leaves few candidates, all are gone through: approximate search loses most of its hits there (recall
0.30 under a 1 % filter, measured).
"""

import base64
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctclip.embeddings import EmbeddingError, EmbeddingTable, Transform
from ctclip.embeddings.table import Kind
from ctclip.findings import FINDINGS
from ctclip.retrieval.filters import (
    AGE_COLUMN,
    UNKNOWN_LABEL,
    Filter,
    field_column,
    label_column,
    number,
    quoted,
    quoted_list,
    require_fields,
)
from ctclip.retrieval.question import Background
from ctclip.retrieval.reference import Reference
from ctclip.retrieval.search import (
    CHOICE_FIELDS,
    Hit,
    Query,
    check_query,
    collapse,
    distinct_values,
    project,
    similarities,
)

logger = logging.getLogger(__name__)

IndexType = Literal["FLAT", "HNSW"]
PartitionField = Literal["hospital", "manufacturer", "sex", "split"]
"""What an archive can be partitioned by: what a filter asks for by its values."""

HEADER_PROPERTY = "ctclip.header"
PURGE_PROPERTY = "ctclip.purge"
HEADER_VERSION = 1

BATCH_ROWS = 1000
FETCHED_ROWS = 64
MAX_LIMIT = 16_384
"""Milvus returns no more rows than this from one search."""

EXACT_ROWS = MAX_LIMIT
"""An approximate index is bypassed when a filter leaves no more rows than this: one answer of the
server holds them all, where reading them in batches waits seven times as long."""

ID_BYTES, FIELD_BYTES = 512, 60_000
ROUNDING = 4e-6
"""How far Milvus's float32 similarity may be from ours."""

HNSW_BUILD = {"M": 32, "efConstruction": 256}
HNSW_EF = (256, 512, 1024, 2048, 4096)
"""How many candidates a search keeps: the first that reaches :data:`MIN_RECALL`."""

MIN_RECALL = 0.99
RECALL_QUERIES, RECALL_K = 64, 10
RECALL_MARGIN = 0.005
"""So many queries tell the recall to about so much."""

PARTITIONS = 16
"""Values are spread over so many partitions by their hash."""

ONE_LIST = {"nlist": 1}
ALL_LISTS = 65_536
"""Milvus Lite's own FLAT copies all vectors for every query. An inverted file of one list looks at
every vector too, in FAISS and without the copy: 4 instead of 40 ms of CPU at 50,000 x 512."""


class MilvusArchive:
    """A searchable archive in Milvus; make one with :meth:`build`, or open it by URI.

    Args:
        uri: A file (``archive.db``) or a server (``http://host:19530``).
        name: The archive's name within the store.
        token: The server's ``user:password``.

    Raises:
        EmbeddingError: If there is no such archive, or another process has the file open.
    """

    def __init__(self, uri: str | Path, name: str = "ctclip", token: str = "") -> None:
        self.uri, self.name = str(uri), name
        self._client = _connect(self.uri, token)
        self._writing = threading.RLock()
        if not self._client.has_collection(name):
            self.close()
            raise EmbeddingError(
                f"{uri} holds no archive {name!r}; run: ctclip-index --action build uri={uri} "
                "table=volumes.parquet"
            )
        self._client.load_collection(name)
        self._read_header()
        if self.is_embedded and self._properties().get(PURGE_PROPERTY) == "pending":
            logger.warning("%s: finishing a withdrawal that was interrupted", uri)
            self.purge()

    @classmethod
    def build(
        cls,
        uri: str | Path,
        table: EmbeddingTable,
        *,
        background: Background | None = None,
        index: IndexType | None = None,
        partition_by: PartitionField | None = None,
        name: str = "ctclip",
        token: str = "",
    ) -> "MilvusArchive":
        """Build an archive from an export, replacing one of that name in a single step.

        Args:
            uri: A file or a server.
            table: Volumes; what it carries besides vectors becomes searchable.
            background: Similarity of random pairs; measured on the table by default.
            index: ``FLAT`` is exact; ``HNSW`` is fast and approximate, and given up for ``FLAT``
                where it finds less than 99 % of the ten nearest of the table's own vectors. By
                default exact in a file and ``HNSW`` on a server.
            partition_by: On a server, keep the volumes of one hospital (say) together: a search
                that is filtered by it goes through theirs alone.
            name: The archive's name within the store.
            token: The server's ``user:password``.

        Raises:
            EmbeddingError: If the table is of reports, a file is to be partitioned, or the table
                doesn't carry the field to partition by.
        """
        _require_volumes(table)
        if partition_by is not None:
            _require_partitions(str(uri), partition_by, table)
        reference = Reference.of(table)
        client = _connect(str(uri), token)
        try:
            header = {
                "version": HEADER_VERSION,
                "provenance": table.provenance,
                "fields": list(table.fields),
                "width": table.width,
                "has_scores": table.scores is not None,
                "values": distinct_values(table.fields),
                "index": index or ("FLAT" if _is_file(str(uri)) else "HNSW"),
                "partition_by": partition_by,
                "background": asdict(background or Background.of(table)),
                "reference": asdict(reference) if reference else None,
                "transform": (
                    base64.b64encode(table.transform.to_bytes()).decode() if table.transform else ""
                ),
            }
            _replace_collection(client, name, header, _batches(table), _is_file(str(uri)))
        finally:
            client.close()
        archive = cls(uri, name, token)
        if archive.index == "HNSW" and not archive._reaches_recall(table.vectors_for_reports):
            archive.close()
            return cls.build(
                uri,
                table,
                background=background,
                index="FLAT",
                partition_by=partition_by,
                name=name,
                token=token,
            )
        return archive

    def _reaches_recall(self, vectors: np.ndarray) -> bool:
        """Choose how wide to search, by exact answers; False if no width is wide enough."""
        count = min(RECALL_QUERIES, len(vectors))
        chosen = np.random.default_rng(0).choice(len(vectors), count, replace=False)
        k = min(RECALL_K + 1, len(vectors))  # each finds itself, which proves nothing
        similarity = [vectors @ vectors[row] for row in chosen]
        least = [np.partition(each, -k)[-k] - ROUNDING for each in similarity]
        for ef in HNSW_EF:
            answers = self._client.search(
                self.name,
                data=vectors[chosen].tolist(),
                limit=k,
                search_params={"metric_type": "IP", "params": {"ef": ef}},
            )
            found = [
                sum(hit["distance"] >= bound for hit in answer)
                for answer, bound in zip(answers, least, strict=True)
            ]
            recall = (sum(found) - count) / max((k - 1) * count, 1)
            if recall >= MIN_RECALL + RECALL_MARGIN or k == 1:
                self._header["ef"] = ef
                self._set_property(HEADER_PROPERTY, json.dumps(self._header))
                return True
        logger.warning(
            "approximate search finds %.0f %% of the nearest volumes here: %s is searched exactly",
            100 * recall,
            self.uri,
        )
        return False

    @property
    def is_embedded(self) -> bool:
        """Whether the archive is a file that this process alone holds."""
        return _is_file(self.uri)

    def __len__(self) -> int:
        return self._count("")

    def close(self) -> None:
        """Let go of the file or the connection."""
        self._client.close()
        if self.is_embedded:
            _release(self.uri)

    def __enter__(self) -> "MilvusArchive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def search(
        self, query: Query, k: int = 10, per_patient: int = 1, where: Filter | None = None
    ) -> list[Hit]:
        """The ``k`` most similar studies, best first; see :class:`MemoryArchive`."""
        check_query(query, self.width, k, per_patient)
        where = where or Filter()
        require_fields(where.fields, self.fields)
        # excluded patients are dropped afterwards: few rows, and no filter searches faster
        expression = where.expression()
        if self.index != "FLAT" and expression and self._count(expression) <= EXACT_ROWS:
            return self._search_all(query, k, per_patient, expression)
        limit = min(max(4 * k, 32), MAX_LIMIT)
        while True:
            hits, is_complete = self._search_top(query, k, per_patient, expression, limit)
            if is_complete:
                return hits
            if limit == MAX_LIMIT:
                return self._search_all(query, k, per_patient, expression)
            limit = min(4 * limit, MAX_LIMIT)

    def _search_top(
        self, query: Query, k: int, per_patient: int, expression: str, limit: int
    ) -> tuple[list[Hit], bool]:
        """Collapse the best ``limit`` rows; False where more rows could still change the answer."""
        parameters: dict[str, int] = {}
        if self.index == "HNSW":
            parameters["ef"] = max(self._header.get("ef", HNSW_EF[0]), 2 * limit)
        elif self.is_embedded:
            parameters["nprobe"] = ALL_LISTS
        found = self._ask(
            self._client.search,
            data=[query.vector.tolist()],
            limit=limit,
            filter=expression,
            output_fields=["*"],
            search_params={"metric_type": "IP", "params": parameters},
        )[0]
        rows = [{**hit["entity"], "volume_id": hit["volume_id"]} for hit in found]
        hits = collapse(self._ranked(rows, query), query, k, per_patient)
        if len(rows) < limit:
            return hits, True
        # rows that were not returned may tie with the last one
        bound = min(hit["distance"] for hit in found) + ROUNDING
        return hits, len(hits) == k and hits[-1].similarity > bound

    def _search_all(self, query: Query, k: int, per_patient: int, expression: str) -> list[Hit]:
        few = self._ask(
            self._client.query, filter=expression, output_fields=["vector"], limit=MAX_LIMIT
        )
        if not few:
            return []
        ids: list[str] = []
        exact: list[np.ndarray] = []
        for batch in [few] if len(few) < MAX_LIMIT else self._read(expression, "vector"):
            ids += [row["volume_id"] for row in batch]
            vectors = np.array([row["vector"] for row in batch], dtype=np.float32)
            exact.append(similarities(vectors, query.vector))
        order = np.lexsort((np.array(ids), -np.concatenate(exact)))
        best_first = self._in_order([ids[row] for row in order], query)
        return collapse(best_first, query, k, per_patient)

    def _in_order(self, ids: Sequence[str], query: Query) -> Iterator[Hit]:
        """Read volumes that are ordered already, a few at a time for as long as more are asked."""
        for start in range(0, len(ids), FETCHED_ROWS):
            wanted = quoted_list(ids[start : start + FETCHED_ROWS])
            found = self._ask(
                self._client.query, filter=f"volume_id in {wanted}", output_fields=["*"]
            )
            yield from self._ranked(found, query)

    def _ranked(self, rows: Sequence[Mapping[str, Any]], query: Query) -> Iterator[Hit]:
        if not rows:
            return
        table = self._table(rows)
        exact = similarities(table.vectors, query.vector)
        for row in np.lexsort((np.array(table.volume_id), -exact)):
            yield Hit(
                volume_id=table.volume_id[row],
                study_id=table.study_id[row],
                patient_id=table.patient_id[row],
                similarity=float(exact[row]),
                labels=table.labels[row],
                fields={name: column[row] for name, column in table.fields.items()},
                scores=None if table.scores is None else table.scores[row],
                is_ordinary=query.ordinary is not None and float(exact[row]) <= query.ordinary,
            )

    def rows(self, *, volume_id: str | None = None, study_id: str | None = None) -> EmbeddingTable:
        """The archive's rows of a volume or a study.

        Raises:
            EmbeddingError: If there is none.
        """
        column, wanted = ("volume_id", volume_id) if volume_id else ("study_id", study_id)
        expression = f"{column} == {quoted(wanted or '')}"
        rows = self._ask(self._client.query, filter=expression, output_fields=["*"])
        if not rows:
            raise EmbeddingError(f"the archive has no case {wanted!r} among its {len(self)}")
        table = self._table(rows)
        return table.select(np.argsort(np.array(table.volume_id)))

    def studies(self, beginning: str = "", limit: int = 50) -> list[str]:
        """Studies of the archive whose identifier begins with a text, in order."""
        # the store's wildcards only narrow it down; older servers know none but a last %
        expression = f"study_id like {quoted(beginning.split('%')[0] + '%')}" if beginning else ""
        rows = self._ask(
            self._client.query, filter=expression, output_fields=["study_id"], limit=MAX_LIMIT
        )
        return sorted({r["study_id"] for r in rows if r["study_id"].startswith(beginning)})[:limit]

    def values(self) -> dict[str, list[str]]:
        """The fields that a filter may read, with the values to choose from."""
        values: dict[str, list[str]] = self._header["values"]
        return values

    def project(
        self, vector: np.ndarray, provenance: Mapping[str, str], kind: Kind = "volume"
    ) -> np.ndarray:
        """Bring a model's output into the archive's space; see :class:`MemoryArchive`."""
        return project(vector, provenance, kind, self.provenance, self.transform)

    def insert(self, table: EmbeddingTable) -> None:
        """Add volumes, or replace those of the same identifier; durable when it returns.

        Interrupted, it is repeated: what it had added is then replaced. In a partitioned archive a
        volume that is being replaced is absent for a moment, and an interruption can leave it so
        until then.

        Raises:
            EmbeddingError: If the table is of reports, of another model, or carries other fields.
        """
        _require_volumes(table)
        table.require_same_space(self.provenance)
        if list(table.fields) != self.fields or (table.scores is not None) != self.has_scores:
            raise EmbeddingError(
                f"the archive carries the fields {self.fields} (scores: {self.has_scores}), the "
                f"table {list(table.fields)} (scores: {table.scores is not None})"
            )
        with self._writing:
            known, new = self.values(), distinct_values(table.fields)
            self._set_values(
                distinct_values({name: [*known[name], *values] for name, values in new.items()})
            )
            for batch in _batches(table):
                _write(self._client, self.name, self._header, batch)

    def withdraw(self, patients: Iterable[str]) -> int:
        """Remove all that the archive holds of some patients, from its files too.

        In a file, the store is rewritten without them before this returns; interrupted, that is
        finished when the archive is opened again. A server is told to compact, and drops the
        bytes when its retention time has passed.

        Returns:
            How many volumes were removed.
        """
        expression = f"patient_id in {quoted_list(sorted(set(patients)))}"
        with self._writing:
            removed = self._count(expression)
            self._set_property(PURGE_PROPERTY, "pending")
            self._client.delete(self.name, filter=expression)
            self.purge()
        return removed

    def studies_of(self, patients: Iterable[str]) -> set[str]:
        """The studies that the archive holds of some patients."""
        expression = f"patient_id in {quoted_list(sorted(set(patients)))}"
        return set(self._column("study_id", expression))

    def purge(self) -> None:
        """Rewrite the store so that nothing of deleted rows is left in it."""
        with self._writing:
            left: dict[str, list[str]] = {name: [] for name in self.fields}
            for name in left.keys() & set(CHOICE_FIELDS):
                left[name] = list(set(self._column(field_column(name))))
            self._set_values(distinct_values(left))
            if self.is_embedded:
                _replace_collection(self._client, self.name, self._header, self._read(""), True)
            else:
                self._client.flush(self.name)
                self._client.compact(self._client.describe_alias(self.name)["collection_name"])
                self._set_property(PURGE_PROPERTY, "done")

    def backup(self, path: str | Path) -> int:
        """Write the whole archive as one table, from which :meth:`build` restores it.

        Nothing is written to the archive meanwhile, so the copy is of one moment.

        Returns:
            The number of volumes.
        """
        with self._writing:
            rows = [row for batch in self._read("") for row in batch]
            if not rows:
                raise EmbeddingError(f"the archive {self.name!r} is empty; nothing to back up")
            table = self.background.kept_in(self._table(rows))
        table.save(path)
        return len(table)

    def _ask(self, method: Any, **options: Any) -> Any:
        from pymilvus.exceptions import MilvusException

        try:
            return method(self.name, **options)
        except MilvusException as error:
            raise EmbeddingError(
                f"the archive {self.uri} refused the search: {error.message}; is the server "
                "up, and does the question hold anything unusual?"
            ) from None

    def _count(self, expression: str) -> int:
        rows = self._ask(self._client.query, filter=expression, output_fields=["count(*)"])
        return int(rows[0]["count(*)"])

    def _column(self, column: str, expression: str = "") -> Iterator[str]:
        return (row[column] for batch in self._read(expression, column) for row in batch)

    def _read(self, expression: str, column: str = "*") -> Iterator[list[dict[str, Any]]]:
        iterator = self._ask(
            self._client.query_iterator,
            filter=expression,
            output_fields=[column],
            batch_size=BATCH_ROWS,
        )
        try:
            while batch := iterator.next():
                yield list(batch)
        finally:
            iterator.close()

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> EmbeddingTable:
        labels = np.array(
            [[row[label_column(finding)] for finding in FINDINGS] for row in rows], dtype=np.float32
        )
        labels[labels == UNKNOWN_LABEL] = np.nan
        return EmbeddingTable(
            volume_id=[row["volume_id"] for row in rows],
            study_id=[row["study_id"] for row in rows],
            patient_id=[row["patient_id"] for row in rows],
            split=[row["split"] for row in rows],
            vectors=np.array([row["vector"] for row in rows], dtype=np.float32),
            labels=labels,
            provenance=self.provenance,
            fields={name: [row[field_column(name)] for row in rows] for name in self.fields},
            scores=(
                np.array([row["scores"] for row in rows], dtype=np.float32)
                if self.has_scores
                else None
            ),
            transform=self.transform,
        )

    def _set_values(self, values: dict[str, list[str]]) -> None:
        self._header["values"] = values
        self._set_property(HEADER_PROPERTY, json.dumps(self._header))

    def _properties(self) -> dict[str, str]:
        return self._client.describe_collection(self.name).get("properties", {})

    def _set_property(self, key: str, value: str) -> None:
        collection = self._client.describe_alias(self.name)["collection_name"]
        self._client.alter_collection_properties(collection, properties={key: value})

    def _read_header(self) -> None:
        self._header = json.loads(self._properties()[HEADER_PROPERTY])
        self.provenance: dict[str, str] = self._header["provenance"]
        self.fields: list[str] = self._header["fields"]
        self.width: int = self._header["width"]
        self.has_scores: bool = self._header["has_scores"]
        self.index: IndexType = self._header["index"]
        self.partition_by: PartitionField | None = self._header.get("partition_by")
        self.background = Background(**self._header["background"])
        reference = self._header["reference"]
        self.reference = Reference(**reference) if reference else None
        packed = self._header["transform"]
        self.transform = Transform.from_bytes(base64.b64decode(packed)) if packed else None


def _require_volumes(table: EmbeddingTable) -> None:
    if table.kind != "volume":
        raise EmbeddingError(
            "only volumes are searched; this is a table of reports: give table=volumes.parquet, "
            "and reports=reports.parquet beside it when building"
        )


def _require_partitions(uri: str, partition_by: PartitionField, table: EmbeddingTable) -> None:
    if _is_file(uri):
        raise EmbeddingError(
            f"{uri} is a file, and only a server keeps partitions: leave partition_by out, or give "
            "uri=http://host:19530"
        )
    if partition_by != "split":
        require_fields([partition_by], list(table.fields))


def _is_file(uri: str) -> bool:
    return "://" not in uri


def _connect(uri: str, token: str) -> Any:
    try:
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the index needs pymilvus; run: pip install 'ctclip[retrieval]' (without it, "
            "ctclip-similar searches an exported table exactly, in memory)"
        ) from None
    logging.getLogger("pymilvus").setLevel(logging.ERROR)
    if _is_file(uri):
        # Milvus Lite complains of each optional call that it doesn't know, with a traceback
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
    try:
        return MilvusClient(uri=uri, token=token)
    except MilvusException as error:
        raise EmbeddingError(
            f"can't open the archive {uri}: {error.message}; is another process using the file, "
            "or the server down?"
        ) from None


def _release(uri: str) -> None:
    """Unlock the file: closing a client leaves Milvus Lite's engine running until exit."""
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(uri)


def _replace_collection(
    client: Any,
    name: str,
    header: dict[str, Any],
    batches: Iterable[list[dict[str, Any]]],
    is_embedded: bool,
) -> None:
    """Fill a new collection, point the archive's name at it, and drop the old one."""
    collection = f"{name}_{time.time_ns()}"
    _create_collection(client, collection, header, is_embedded)
    for batch in batches:
        _write(client, collection, header, batch)
    client.flush(collection)
    if header["index"] == "HNSW":
        _load_indexed(client, collection)
    if client.has_collection(name):
        client.alter_alias(collection, name)
    else:
        client.create_alias(collection, name)
    for other in client.list_collections():
        stem, _, stamp = other.rpartition("_")
        if stem == name and stamp.isdigit() and other != collection:
            client.drop_collection(other)  # the old one, and what an interrupted rebuild left


def _write(
    client: Any, collection: str, header: Mapping[str, Any], batch: list[dict[str, Any]]
) -> None:
    if not header.get("partition_by"):
        client.upsert(collection, batch)
        return
    # Milvus 2.3's upsert puts rows into the partitions of other rows, where no filter finds them
    ids = quoted_list(row["volume_id"] for row in batch)
    client.delete(collection, filter=f"volume_id in {ids}")
    client.insert(collection, batch)


def _load_indexed(client: Any, collection: str) -> None:
    """Wait for the index and load it: rows are searched one by one until then, and not for long."""
    while not _is_indexed(client.describe_index(collection, "vector")):
        time.sleep(1)
    client.release_collection(collection)
    client.load_collection(collection)


def _is_indexed(state: Mapping[str, Any]) -> bool:
    """Whether every row is in the index.

    Its "pending_index_rows" don't tell: segments that are being merged count there, at times for
    ever, while the index of their rows is in use.
    """
    return state.get("indexed_rows", 0) >= state.get("total_rows", 0)


def _create_collection(
    client: Any, collection: str, header: dict[str, Any], is_embedded: bool
) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("volume_id", DataType.VARCHAR, is_primary=True, max_length=ID_BYTES)
    together = header.get("partition_by")

    def add_text(column: str, max_length: int, is_partition_key: bool = False) -> None:
        key = {"is_partition_key": True} if is_partition_key else {}
        schema.add_field(column, DataType.VARCHAR, max_length=max_length, **key)

    for column in ("study_id", "patient_id", "split"):
        add_text(column, ID_BYTES, column == together)
    for field in header["fields"]:
        add_text(field_column(field), 65_535, field == together)
    if "age" in header["fields"]:
        schema.add_field(AGE_COLUMN, DataType.DOUBLE)
    for finding in FINDINGS:
        schema.add_field(label_column(finding), DataType.INT8)
    if header["has_scores"]:
        schema.add_field(
            "scores", DataType.ARRAY, element_type=DataType.FLOAT, max_capacity=len(FINDINGS)
        )
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=header["width"])
    parameters = client.prepare_index_params()
    if header["index"] == "HNSW":
        kind, settings = "HNSW", HNSW_BUILD
    else:
        kind, settings = ("IVF_FLAT", ONE_LIST) if is_embedded else ("FLAT", {})
    # nested, because Milvus Lite reads no other form and ignores settings that it can't find
    parameters.add_index("vector", index_type=kind, metric_type="IP", params={"params": settings})
    client.create_collection(
        collection,
        schema=schema,
        index_params=parameters,
        consistency_level="Strong",
        properties={HEADER_PROPERTY: json.dumps(header)},
        **({"num_partitions": PARTITIONS} if together else {}),
    )


def _batches(table: EmbeddingTable) -> Iterator[list[dict[str, Any]]]:
    table = replace(table, vectors=table.vectors_for_reports, report_vectors=None)
    labels = np.where(np.isnan(table.labels), UNKNOWN_LABEL, table.labels).astype(int).tolist()
    columns = [label_column(finding) for finding in FINDINGS]
    for start in range(0, len(table), BATCH_ROWS):
        batch = []
        for row in range(start, min(start + BATCH_ROWS, len(table))):
            entity: dict[str, Any] = {
                "volume_id": table.volume_id[row],
                "study_id": table.study_id[row],
                "patient_id": table.patient_id[row],
                "split": table.split[row],
                "vector": table.vectors[row],
                **dict(zip(columns, labels[row], strict=True)),
            }
            for name, column in table.fields.items():
                entity[field_column(name)] = _shortened(column[row])
            if "age" in table.fields:
                age = number(table.fields["age"][row])
                entity[AGE_COLUMN] = age if age >= 0 else -1.0
            if table.scores is not None:
                entity["scores"] = table.scores[row].tolist()
            batch.append(entity)
        yield batch


def _shortened(text: str) -> str:
    """A text that fits the store's column; longer reports lose their end."""
    data = text.encode("utf-8")
    return text if len(data) <= FIELD_BYTES else data[:FIELD_BYTES].decode("utf-8", "ignore") + "…"
