"""One record per volume, and the CSV that a user writes to bring a cohort of their own.

patient ⊃ study (one exam, one report) ⊃ volume (one reconstruction). A column that is not known, or
a label or split that is none, stops the command and names its lines: the table was written for
something else. A row may be bad (no patient, a path outside the data folder, no such file): it is
left out and comes back as a problem for the ledger, with its line.
"""

import csv
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from ctclip.data import report
from ctclip.data.problems import ManifestError, Problem
from ctclip.data.table import (
    MANIFEST_COLUMNS,
    ClaimedSpacing,
    Row,
    Table,
    raise_all,
    read_table,
)
from ctclip.findings import FINDINGS

Split = Literal["train", "valid", "test"]

ID_COLUMNS = ("patient_id", "study_id", "volume_id", "split")

META_COLUMNS = (
    "sex",
    "age",
    "hospital",
    "manufacturer",
    "scanner",
    "kernel",
    "slice_thickness_mm",
    "contrast",
    "date",
)
"""Columns kept as ``meta`` under their own name; any other needs the prefix ``meta_``."""

READING_COLUMNS = ("series", "rescale_slope", "rescale_intercept", "spacing_mm")
"""Columns that say how a scan is read: which DICOM series, how stored numbers become HU (applied
only where the file does not hold HU), and the spacing to compare with the file's (``D H W``)."""

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".npz", ".dcm")

_SAFE_ID = re.compile(r"[^\x00-\x1f/\\:*?\"<>|]{1,200}")

SPLIT_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.8), ("valid", 0.9), ("test", 1.0))
"""Upper ends of a patient's hash where the table names no split: 80, 10 and 10 %."""


@dataclass(frozen=True, kw_only=True)
class VolumeRecord:
    """One reconstruction with its report and labels."""

    volume_id: str
    study_id: str
    patient_id: str
    split: Split
    path: Path | None
    """The scan on disk; None for a report without a scan."""

    findings: str | None = None
    impression: str | None = None
    labels: dict[str, float] = field(default_factory=dict)
    """1.0, 0.0, or nan where not annotated; keys are among the 18 findings."""

    meta: dict[str, str] = field(default_factory=dict)
    rescale: tuple[float, float] | None = None
    """Slope and intercept of a table, applied only if the file does not hold HU."""

    spacing_mm: ClaimedSpacing | None = None
    """Spacing (D, H, W) of a table, compared with the file's."""

    series: str | None = None
    """SeriesInstanceUID, where the path is a DICOM folder with several."""

    row: str = field(default="", compare=False)
    """The table's row that it comes from (``labels.csv:418``), for messages."""

    def label_row(self) -> list[float]:
        """The 18 labels in CT-RATE's order, nan where not known."""
        return [self.labels.get(name, math.nan) for name in FINDINGS]


def volume_stem(name: str) -> str:
    """A file's name without its volume suffix: ``train_1_a_1.nii.gz`` → ``train_1_a_1``."""
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    for suffix in VOLUME_SUFFIXES:
        if base.lower().endswith(suffix):
            return base[: -len(suffix)]
    return base


def is_safe_id(name: str) -> bool:
    """Whether an identifier can name a file in the cache."""
    return bool(_SAFE_ID.fullmatch(name)) and name not in (".", "..") and not name.startswith(".")


def inside(root: Path, relative: str) -> Path | None:
    """A path below ``root``, or None where the text points outside it."""
    joined = Path(os.path.normpath(root / relative))
    return joined if joined.is_relative_to(os.path.normpath(root)) else None


def parse_label(cell: str) -> float | None:
    """1, 0, or nan for an empty cell; None for anything else."""
    return {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "": math.nan}.get(cell)


def parse_labels(table: Table, row: Row, errors: list[str]) -> dict[str, float]:
    """The labels of a row, by column name; anything but 1, 0 and empty is an error."""
    labels = {}
    for name in FINDINGS:
        if name not in table.columns:
            continue
        value = parse_label(row.cells[name])
        if value is None:
            errors.append(
                f"line {row.line}: label {name!r} is {row.cells[name]!r}; expected 0, 1 or empty "
                "(not annotated)"
            )
        else:
            labels[name] = value
    return labels


def read_manifest(
    path: str | Path, root: str | Path | None = None
) -> tuple[list[VolumeRecord], list[Problem]]:
    """Read the project's own manifest: one row per volume.

    Columns: ``patient_id``, ``study_id``, ``path``; optionally ``volume_id`` (else the file's
    stem), ``split`` (else by a hash of the patient, 80/10/10), ``report`` or ``findings`` and
    ``impression``, any of the 18 findings (1, 0 or empty), :data:`READING_COLUMNS`, ``sex``,
    ``age``, ``hospital`` and the like, and ``meta_…`` for anything else.

    Args:
        path: ``.csv``, ``.csv.gz`` or ``.parquet``.
        root: Folder that the paths are relative to; by default the manifest's own.

    Returns:
        Usable records, and problems of rows that were left out or changed.

    Raises:
        ManifestError: If a column is missing or unknown, or a label or split is none of the known
            values; every such line is named.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    table = read_table(path)
    table.require(MANIFEST_COLUMNS)
    _refuse_unknown_columns(table)
    errors: list[str] = []
    problems = list(table.malformed)
    counts: Counter[str] = Counter()
    found: list[tuple[Row, VolumeRecord]] = []
    for row in table.rows:
        record = _record(table, row, root, errors, problems, counts)
        if record is not None:
            found.append((row, record))
    raise_all(path, errors)
    records = _one_row_each(table, found, problems)
    if "split" not in table.columns:
        detail = "no column 'split': patients were assigned by hash, 80/10/10"
        problems.append(Problem(str(path), "warned", "split-assigned", detail))
    return records, problems + text_problems(path, counts)


def text_problems(path: Path, counts: Counter[str]) -> list[Problem]:
    """What cleaning removed from reports, one row per rule, so that nothing goes in silence."""
    return [
        Problem(str(path), "noted", f"text-{rule}", f"{num} removed while cleaning reports")
        for rule, num in sorted(counts.items())
        if num
    ]


def _refuse_unknown_columns(table: Table) -> None:
    known = {
        "patient_id",
        "study_id",
        "volume_id",
        "split",
        "path",
        "report",
        "findings",
        "impression",
        *READING_COLUMNS,
        *META_COLUMNS,
        *FINDINGS,
    }
    unknown = [
        column for column in table.columns if column not in known and not column.startswith("meta_")
    ]
    if unknown:
        raise ManifestError(
            f"{table.path} line 1: unknown column {', '.join(map(repr, unknown))}; expected "
            "patient_id, study_id, path, volume_id, split, report, findings, impression, "
            f"{', '.join((*READING_COLUMNS, *META_COLUMNS))}, the finding names, or meta_…"
        )


def _record(
    table: Table,
    row: Row,
    root: Path,
    errors: list[str],
    problems: list[Problem],
    counts: Counter[str],
) -> VolumeRecord | None:
    """One row's record; None where it can't be used, with the reason among the problems."""
    scan = inside(root, row.get("path")) if row.get("path") else None
    volume_id = row.get("volume_id") or volume_stem(row.get("path")) or row.get("study_id")
    split = row.get("split") or split_of(row.get("patient_id"))
    if split not in get_args(Split):
        errors.append(f"line {row.line}: split {split!r}; expected train, valid or test")
    labels = parse_labels(table, row, errors)
    try:
        rescale, spacing_mm = _rescale(row), _spacing(row)
        _check_row(row, root, scan, volume_id)
    except _BadRow as bad:
        known = volume_id if is_safe_id(volume_id) else ""
        problems.append(table.refused(row, bad.code, bad.detail, known))
        return None
    findings, impression = (
        report.split_sections(report.clean(row.get("report"), counts))
        if row.get("report")
        else (None, None)
    )
    meta = {
        column.removeprefix("meta_"): row.cells[column]
        for column in table.columns
        if (column in META_COLUMNS or column.startswith("meta_")) and row.cells[column]
    }
    return VolumeRecord(
        volume_id=volume_id,
        study_id=row.get("study_id"),
        patient_id=row.get("patient_id"),
        split=split,  # type: ignore[arg-type]
        path=scan,
        findings=report.clean(row.get("findings"), counts) or findings,
        impression=report.clean(row.get("impression"), counts) or impression,
        labels=labels,
        meta=meta,
        rescale=rescale,
        spacing_mm=spacing_mm,
        series=row.get("series") or None,
        row=f"{table.path}:{row.line}",
    )


class _BadRow(Exception):
    """Why one row can't be used."""

    def __init__(self, code: str, detail: str) -> None:
        self.code, self.detail = code, detail


def _check_row(row: Row, root: Path, scan: Path | None, volume_id: str) -> None:
    for column in ("patient_id", "study_id"):
        if not row.get(column):
            raise _BadRow("no-id", f"{column} is empty")
    if row.get("path") and scan is None:
        raise _BadRow(
            "outside-root",
            f"path {row.get('path')!r} leads outside {root}; give --root <folder that holds all "
            "scans>",
        )
    if not is_safe_id(volume_id):
        raise _BadRow("unsafe-name", f"volume_id {volume_id!r} can't name a file")
    if scan is not None and not scan.exists():
        raise _BadRow("missing-file", f"no file at {scan}")


def _numbers(row: Row, columns: Sequence[str], example: str) -> list[float]:
    """As many numbers as the example has, or none where all cells are empty."""
    words = [word for column in columns for word in row.get(column).split()]
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if values and not (len(values) == len(example.split()) and all(map(math.isfinite, values))):
        found = f"{', '.join(columns)}: {' '.join(words)[:40]!r}"
        raise _BadRow("bad-number", f"{found}; expected numbers such as {example}")
    return values


def _rescale(row: Row) -> tuple[float, float] | None:
    values = _numbers(row, ("rescale_slope", "rescale_intercept"), "1 -1024")
    if not values:
        return None
    if values[0] == 0:
        raise _BadRow("bad-number", "rescale_slope is 0")
    return values[0], values[1]


def _spacing(row: Row) -> tuple[float, float, float] | None:
    values = _numbers(row, ("spacing_mm",), "1.5 0.7 0.7")
    if not values:
        return None
    if min(values) <= 0:
        raise _BadRow("bad-number", f"spacing_mm {row.get('spacing_mm')!r} is not positive")
    return values[0], values[1], values[2]


def split_of(patient_id: str) -> Split:
    """A patient's split where the table names none: stable, and the same for all their scans."""
    share = int(hashlib.sha256(patient_id.encode()).hexdigest()[:8], 16) / 2**32
    return next(name for name, end in SPLIT_SHARES if share < end)


def _one_row_each(
    table: Table, found: Sequence[tuple[Row, VolumeRecord]], problems: list[Problem]
) -> list[VolumeRecord]:
    """Use one of identical rows; refuse a volume whose rows contradict each other."""
    refused = {problem.volume_id for problem in problems}
    rows: dict[str, list[tuple[Row, VolumeRecord]]] = {}
    for row, record in found:
        rows.setdefault(record.volume_id, []).append((row, record))
    records = []
    for volume_id, (first, *more) in rows.items():
        if volume_id in refused:
            detail = "another row of this volume is refused"
            problems.append(table.refused(first[0], "contradiction", detail, volume_id))
            continue
        if any(_content(record) != _content(first[1]) for _, record in more):
            lines = ", ".join(str(row.line) for row, _ in (first, *more))
            detail = (
                f"lines {lines} give volume {volume_id!r} differently; keep one, or give each its "
                "own volume_id"
            )
            problems.append(table.refused(first[0], "contradiction", detail, volume_id))
            continue
        for row, _ in more:
            detail = f"the same row as line {first[0].line}; used once"
            where = f"{table.path}:{row.line}"
            problems.append(Problem(where, "corrected", "repeated-row", detail, volume_id))
        records.append(first[1])
    return records


def _content(record: VolumeRecord) -> VolumeRecord:
    """The record with nan written so that two unknown labels compare equal."""
    known = {name: value for name, value in record.labels.items() if not math.isnan(value)}
    return replace(record, labels=known)


def write_manifest(records: Iterable[VolumeRecord], path: str | Path) -> None:
    """Write records in the manifest's own format, atomically; paths relative to its folder.

    Raises:
        ManifestError: If a scan lies outside the manifest's folder.
    """
    path = Path(path)
    records = list(records)
    meta = sorted({key for record in records for key in record.meta})
    meta_columns = [key if key in META_COLUMNS else f"meta_{key}" for key in meta]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*ID_COLUMNS, "path", "findings", "impression", *FINDINGS, *meta_columns])
        for record in records:
            writer.writerow(
                [record.patient_id, record.study_id, record.volume_id, record.split]
                + [_relative(record, path.parent), record.findings or "", record.impression or ""]
                + ["" if math.isnan(value) else int(value) for value in record.label_row()]
                + [record.meta.get(key, "") for key in meta]
            )
    os.replace(temporary, path)


def _relative(record: VolumeRecord, folder: Path) -> str:
    if record.path is None:
        return ""
    absolute, base = os.path.abspath(record.path), os.path.abspath(folder)
    if not Path(absolute).is_relative_to(base):
        raise ManifestError(
            f"{record.path} lies outside {folder}; write the manifest into a folder above the scans"
        )
    return Path(absolute).relative_to(base).as_posix()
