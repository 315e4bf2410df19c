"""Embed a cohort once: sharded, resumable, shared out over processes."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ctclip.data.cohort import CorruptVolumeError, note_unreadable
from ctclip.embeddings.encode import embed_texts, encode_batch, progress
from ctclip.embeddings.table import EmbeddingError, EmbeddingTable, Kind, concatenate
from ctclip.findings import FINDINGS

if TYPE_CHECKING:
    from torch import Tensor

    from ctclip.checkpoint import Checkpoint
    from ctclip.data.cache import PreparedCohort
    from ctclip.data.manifest import VolumeRecord

logger = logging.getLogger(__name__)

DEFAULT_FIELDS = ("sex", "age", "manufacturer", "kernel")
"""What a table carries about a patient unless told otherwise: no text, name or date."""

_DATE = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)(?:[T ].*)?")
"""ISO 8601 and DICOM's; a table carries the first, which a filter can compare."""

REPORT_FIELDS = ("report", "findings", "impression")
MAX_AGE_YEARS = 89
"""Older ages are stored as one class, as HIPAA's Safe Harbor asks; list ``exact_age`` to keep."""

SHARD_ROWS = 64
"""Volumes per shard: what an interrupted export loses at most, per process."""


def embed_volumes(
    checkpoint: "Checkpoint",
    cohort: "PreparedCohort",
    records: "Sequence[VolumeRecord] | None" = None,
    *,
    out: str | Path | None = None,
    batch_size: int = 4,
    workers: int = 0,
    device: str = "cpu",
    fields: Sequence[str] = DEFAULT_FIELDS,
) -> EmbeddingTable:
    """Embed prepared volumes, once.

    A volume that was damaged or lost after it was prepared gets no row: no other volume can stand
    in its place here. It is named in the log and, with ``out``, in ``unreadable_volumes.jsonl``
    beside it.

    With ``out``, rows that the file already holds of the same voxels are not computed again, and
    finished shards survive a kill: calling again goes on where it was. Labels and fields are the
    cohort's of now. Under ``torchrun`` or ``deepspeed`` the
    processes share the work and every one returns the whole table.

    Args:
        checkpoint: The model with its preprocessing.
        cohort: Volumes prepared with the same preprocessing.
        records: Which of them, in the order of the result; ``None`` means all.
        out: Parquet file to write and to resume from; its shards lie beside it until it is done.
        batch_size: Volumes per forward pass.
        workers: Processes that read ahead.
        device: For example ``"cuda:0"``.
        fields: Names of metadata to carry along, beside ``report``, ``findings`` and
            ``impression``. Nothing that isn't listed gets into the table.

    Returns:
        One row per record that could be read, in order.

    Raises:
        EmbeddingError: If the cohort was prepared differently from what the model was trained
            on, ``out`` is of another model or carries other fields, or no volume can be read.
    """
    import torch

    records = list(cohort.records if records is None else records)
    expected = checkpoint.volume_config.fingerprint()
    if cohort.fingerprint != expected:
        raise EmbeddingError(
            f"the checkpoint {checkpoint.sha256[:12]} was trained on preprocessing {expected}, "
            f"the cohort is prepared as {cohort.fingerprint}; prepare it again with the "
            "checkpoint's settings: ctclip-prepare --like <checkpoint>"
        )
    provenance = space_of(checkpoint)
    content = {record.volume_id: f"{cohort.checksums[record.volume_id]:08x}" for record in records}
    model = checkpoint.model.to(device).eval()

    def embed(mine: "Sequence[VolumeRecord]") -> Iterator[EmbeddingTable]:
        batches: Any = torch.utils.data.DataLoader(
            _Volumes(cohort, mine),  # type: ignore[arg-type]
            batch_size=batch_size,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            collate_fn=list,
        )
        start = 0
        for read in progress(batches, len(batches), "embed", "step"):
            batch = _readable(mine[start : start + len(read)], read, out)
            start += len(read)
            if batch:
                hu = torch.stack([voxels for voxels in read if isinstance(voxels, torch.Tensor)])
                with torch.inference_mode():
                    prompt, report = encode_batch(checkpoint, model, hu.to(device))
                yield _rows(batch, prompt, report, "volume", provenance, fields, content)

    shards = None if out is None else _Shards(out, provenance, fields, content)
    table = _share_out(records, embed, shards)
    if table is None:
        raise EmbeddingError(f"none of the {len(records)} volumes to embed can be read")
    return table


def embed_reports(
    checkpoint: "Checkpoint",
    records: "Sequence[VolumeRecord]",
    *,
    out: str | Path | None = None,
    sections: Literal["both", "findings", "impression"] = "both",
    batch_size: int = 32,
    device: str = "cpu",
    fields: Sequence[str] = DEFAULT_FIELDS,
) -> EmbeddingTable:
    """Embed the report of every study that has one, once; shared out and resumed like volumes.

    A report that was edited, added or removed makes all of them be embedded again.

    Args:
        checkpoint: The model.
        records: Volumes; the volumes of a study share one report, which gives one row.
        out: Parquet file to write and to resume from.
        sections: Which part of the report to embed.
        batch_size: Reports per forward pass.
        device: For example ``"cuda:0"``.
        fields: Names of metadata to carry along; the text itself only when listed.

    Returns:
        A table of kind ``"report"`` in the order in which the studies first appear.

    Raises:
        EmbeddingError: If no record has a report.
    """
    from ctclip.data.report import report_text

    texts: dict[str, str] = {}
    studies: dict[str, VolumeRecord] = {}
    for record in records:
        text = report_text(record.findings, record.impression, sections)
        if text and record.study_id not in texts:
            texts[record.study_id], studies[record.study_id] = text, record
    if not texts:
        raise EmbeddingError(
            f"none of the {len(records)} records has a report (sections={sections})"
        )
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]
    provenance = {**space_of(checkpoint), "sections": sections, "texts": digest}
    content = {
        record.volume_id: hashlib.sha256(texts[study].encode()).hexdigest()[:16]
        for study, record in studies.items()
    }

    def embed(mine: "Sequence[VolumeRecord]") -> Iterator[EmbeddingTable]:
        starts = range(0, len(mine), batch_size)
        for start in progress(starts, len(starts), "embed text", "step"):
            batch = mine[start : start + batch_size]
            wanted = [texts[record.study_id] for record in batch]
            vectors = embed_texts(checkpoint, wanted, batch_size=batch_size, device=device)
            yield _rows(batch, vectors, None, "report", provenance, fields, content)

    shards = None if out is None else _Shards(out, provenance, fields, content)
    table = _share_out(list(studies.values()), embed, shards)
    assert table is not None  # there is a text, and a text can't be unreadable
    return table


def _share_out(
    records: "Sequence[VolumeRecord]",
    embed: "Callable[[Sequence[VolumeRecord]], Iterable[EmbeddingTable]]",
    shards: "_Shards | None",
) -> EmbeddingTable | None:
    """Embed what no shard holds yet, each process its part; every process returns the whole.

    Args:
        records: In the order of the result.
        embed: Turns records into tables, batch by batch, in their order.
        shards: Where finished parts are kept; None keeps them in memory.
    """
    from ctclip import distributed

    done = shards.read() if shards else []
    known = {volume for table in done for volume in table.volume_id}
    todo = [record for record in records if record.volume_id not in known]
    if known:
        logger.info("%d of %d rows are embedded already", len(records) - len(todo), len(records))
    distributed.barrier()  # all have seen the same shards before anybody adds one

    rows: list[EmbeddingTable] = []
    for batch in embed(todo[distributed.rank() :: distributed.world_size()]):
        rows.append(batch)
        if shards and sum(map(len, rows)) >= SHARD_ROWS:
            done.append(shards.write(concatenate(rows)))
            rows = []
    if rows:
        table = concatenate(rows)
        done.append(shards.write(table) if shards else table)
    if shards:
        distributed.barrier()
        done = shards.read()
    elif distributed.world_size() > 1:
        done = [table for part in distributed.gather_objects(done) for table in part]
    if not done:
        return None

    table = concatenate(done)
    row_of = {volume: row for row, volume in enumerate(table.volume_id)}
    records = [record for record in records if record.volume_id in row_of]
    table = table.select([row_of[record.volume_id] for record in records])
    assert table.content is not None
    table = _rows(  # what is said of a scan may have changed since it was embedded
        records,
        table.vectors,
        table.report_vectors,
        table.kind,
        table.provenance,
        list(table.fields),
        dict(zip(table.volume_id, table.content, strict=True)),
    )
    if shards:
        distributed.barrier()  # nobody deletes shards that another process is reading
        if distributed.is_main():
            shards.finish(table)
        distributed.barrier()
    return table


class _Volumes:
    """Prepared volumes as a PyTorch dataset; a class so that workers can be spawned."""

    def __init__(self, cohort: "PreparedCohort", records: "Sequence[VolumeRecord]") -> None:
        self.cohort, self.volume_ids = cohort, [record.volume_id for record in records]

    def __len__(self) -> int:
        return len(self.volume_ids)

    def __getitem__(self, index: int) -> "Tensor | CorruptVolumeError":
        import torch

        try:
            return torch.from_numpy(self.cohort.read(self.volume_ids[index]))
        except CorruptVolumeError as error:
            return error


def _readable(
    records: "Sequence[VolumeRecord]",
    read: "Sequence[Tensor | CorruptVolumeError]",
    out: str | Path | None,
) -> "list[VolumeRecord]":
    """The records whose voxels came; the others are noted."""
    kept = []
    for record, voxels in zip(records, read, strict=True):
        if not isinstance(voxels, CorruptVolumeError):
            kept.append(record)
            continue
        logger.warning("a volume can't be read and is left out: %s", voxels)
        if out is not None:
            note_unreadable(Path(out).parent, record.volume_id, voxels)
    return kept


def space_of(checkpoint: "Checkpoint") -> dict[str, str]:
    """The provenance of what a checkpoint embeds: equal means comparable."""
    step = checkpoint.provenance.get("step", "?")
    mark = ", label-informed" if checkpoint.provenance.get("label_informed") else ""
    return {
        "checkpoint": checkpoint.sha256,
        "fingerprint": checkpoint.volume_config.fingerprint(),
        "model": f"ctclip step {step}{mark}",
    }


def _rows(
    records: "Sequence[VolumeRecord]",
    prompt: np.ndarray,
    report: np.ndarray | None,
    kind: Kind,
    provenance: dict[str, str],
    fields: Sequence[str],
    content: Mapping[str, str],
) -> EmbeddingTable:
    labels = [[record.labels.get(name, np.nan) for name in FINDINGS] for record in records]
    return EmbeddingTable(
        volume_id=[record.volume_id for record in records],
        study_id=[record.study_id for record in records],
        patient_id=[record.patient_id for record in records],
        split=[record.split for record in records],
        vectors=prompt,
        labels=np.array(labels, dtype=np.float32).reshape(len(records), len(FINDINGS)),
        kind=kind,
        provenance=provenance,
        report_vectors=report,
        fields={name: [_field(record, name) for record in records] for name in fields},
        content=[content[record.volume_id] for record in records],
    )


def _field(record: "VolumeRecord", name: str) -> str:
    if name == "report":
        return " ".join(part for part in (record.findings, record.impression) if part)
    if name in REPORT_FIELDS:
        return getattr(record, name) or ""
    if name == "exact_age":
        return record.meta.get("age", "")
    value = record.meta.get(name, "")
    if name == "age":
        try:
            return str(MAX_AGE_YEARS + 1) if float(value) > MAX_AGE_YEARS else value
        except ValueError:
            return ""
    if name == "date":
        found = _DATE.fullmatch(value.strip())
        return "-".join(found.groups()) if found else ""
    return value


class _Shards:
    """The finished parts of an export: ``<out>.parts/<hash of the rows' content>.parquet``.

    A shard's name follows from its content, so writing it twice changes nothing, and processes
    of a restarted job may cut the work differently.
    """

    def __init__(
        self,
        out: str | Path,
        provenance: dict[str, str],
        fields: Sequence[str],
        content: Mapping[str, str],
    ) -> None:
        self.out = Path(out)
        self.folder = self.out.with_name(self.out.name + ".parts")
        self.provenance, self.fields, self.content = provenance, list(fields), content

    def read(self) -> list[EmbeddingTable]:
        paths = [self.out] if self.out.is_file() else []
        paths += sorted(self.folder.glob("*.parquet"))
        tables = [EmbeddingTable.load(path) for path in paths if not path.name.startswith(".")]
        for path, table in zip(paths, tables, strict=True):
            try:
                table.require_same_space(self.provenance)
            except EmbeddingError as error:
                raise EmbeddingError(f"{path}: {error}; or choose another --out") from None
            if list(table.fields) != self.fields:
                raise EmbeddingError(
                    f"{path} carries the fields {list(table.fields)}, asked for are {self.fields}; "
                    "delete it or choose another --out"
                )
        texts = self.provenance.get("texts")  # shards of other texts are of no use
        usable = [table for table in tables if table.provenance.get("texts") == texts]
        return [rows for rows in map(self._up_to_date, usable) if len(rows)]

    def _up_to_date(self, table: EmbeddingTable) -> EmbeddingTable:
        """The rows whose scan or text is still what it was; older tables don't say, hence none."""
        was = table.content or [""] * len(table)
        pairs = enumerate(zip(table.volume_id, was, strict=True))
        return table.select([row for row, (id_, of) in pairs if self.content.get(id_) == of])

    def write(self, table: EmbeddingTable) -> EmbeddingTable:
        made_of = [self.provenance.get("texts", ""), *table.volume_id, *(table.content or [])]
        key = "\n".join(made_of)
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        table.save(self.folder / f"{name}.parquet")
        return table

    def finish(self, table: EmbeddingTable) -> None:
        table.save(self.out)
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()
