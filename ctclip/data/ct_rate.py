"""CT-RATE as it is distributed: nested folders of volumes, and tables recognised by their columns.

Volume names carry everything: ``train_12_a_2.nii.gz`` is reconstruction 2 of scan ``a`` of patient
12. The first release holds raw numbers (slope and intercept are in the metadata table), the second
(folders ending in ``_fixed``) holds HU beside the same table; which of the two a file is, its
values tell when it is read.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ctclip.data import report
from ctclip.data.manifest import (
    VolumeRecord,
    is_safe_id,
    parse_labels,
    text_problems,
    volume_stem,
)
from ctclip.data.problems import ManifestError, Problem
from ctclip.data.table import (
    ClaimedSpacing,
    Row,
    Table,
    not_used,
    raise_all,
    read_table,
    tables_in,
)
from ctclip.findings import FINDINGS

NAME = re.compile(r"(?P<study>(?P<patient>(?P<split>train|valid|test)_\d+)_[a-z]+)_\d+")

META = {
    "PatientSex": "sex",
    "PatientAge": "age",
    "Manufacturer": "manufacturer",
    "ManufacturerModelName": "scanner",
    "ConvolutionKernel": "kernel",
    "SliceThickness": "slice_thickness_mm",
}
"""Metadata columns that are kept, under the manifest's names."""

METADATA = {"RescaleIntercept", "RescaleSlope", "ZSpacing", "XYSpacing"}
"""Any of them makes a table the metadata table."""

MEANT = "label|report|metadata"
PROMISING = ("VolumeName", "Findings_EN", "Impressions_EN", *sorted(METADATA), *FINDINGS)
"""A table of such a name, or with two such columns, was meant to be used."""

EXPECTED = (
    "a CSV with VolumeName and Findings_EN, Impressions_EN (reports), the 18 findings (labels), or "
    "RescaleSlope, RescaleIntercept, XYSpacing, ZSpacing (metadata)"
)

_TWO_NUMBERS = re.compile(r"\[\s*([0-9.eE+-]+)\s*,\s*([0-9.eE+-]+)\s*\]")
_ONE_NUMBER = re.compile(r"[0-9.eE+-]+")


@dataclass
class Report:
    """The four sections of one row, kept apart; None where a section is absent."""

    findings: str | None
    impression: str | None
    clinical: str | None = None
    technique: str | None = None


@dataclass
class Metadata:
    """One row of the metadata table."""

    rescale: tuple[float, float] | None = None
    spacing_mm: ClaimedSpacing | None = None
    """(D, H, W), None where the table doesn't say."""

    meta: dict[str, str] = field(default_factory=dict)


def read_ct_rate(root: str | Path) -> tuple[list[VolumeRecord], list[Problem]]:
    """Read a folder that holds CT-RATE's volumes and tables, at any depth.

    Args:
        root: Searched for ``*.nii.gz`` and for CSVs with a column ``VolumeName``.

    Returns:
        One record per volume on disk of which no table row is refused, and problems: reports
        without a volume, volumes without a report, rows that can't be used.

    Raises:
        ManifestError: If there are no volumes, or neither reports nor labels, or a table can't be
            used.
    """
    root = Path(root)
    problems: list[Problem] = []
    volumes = _volumes(root, problems)
    reports: dict[str, Report] = {}
    labels: dict[str, dict[str, float]] = {}
    metadata: dict[str, Metadata] = {}
    for path in tables_in(root, (".csv", ".csv.gz")):
        table = read_table(path)
        columns = set(table.columns) if "VolumeName" in table.columns else set()
        if "Findings_EN" in columns:
            _join(reports, read_reports(path, problems, table), path, problems)
        elif set(FINDINGS) & columns:
            _join(labels, read_labels(path, problems, table), path, problems)
        elif METADATA & columns:
            _join(metadata, read_metadata(path, problems, table), path, problems)
        else:
            problems.append(not_used(table, MEANT, PROMISING, EXPECTED))
    if not volumes or not (reports or labels):
        raise ManifestError(
            f"{root}: found {len(volumes)} CT-RATE volumes, {len(reports)} reports and labels of "
            f"{len(labels)} volumes; expected names like train_1_a_1.nii.gz, and {EXPECTED}"
        )
    if not reports:
        detail = "no report table: enough for scores and embeddings, training needs reports"
        problems.append(Problem(str(root), "warned", "no-report", detail))
    refused = {problem.volume_id for problem in problems if problem.status == "refused"}
    for name in sorted(reports.keys() - volumes.keys() - refused):
        detail = "in the report table, but there is no such volume"
        problems.append(Problem(str(root), "refused", "missing-file", detail, name))
    not_chest = _listed_as_no_chest(root)
    records = []
    for name, path in sorted(volumes.items()):
        if name in refused:
            continue
        if name in not_chest:
            detail = "on CT-RATE's own list of volumes that show no chest"
            problems.append(Problem(str(path), "refused", "listed-no-chest", detail, name))
            continue
        if reports and name not in reports:
            detail = "no row in the report table"
            problems.append(Problem(str(path), "warned", "no-report", detail, name))
        records.append(_record(name, path, reports.get(name), labels.get(name), metadata.get(name)))
    return records, problems


def _volumes(root: Path, problems: list[Problem]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*.nii.gz")):
        name = volume_stem(path.name)
        if not NAME.fullmatch(name):
            detail = "not named like a CT-RATE volume (train_1_a_1)"
            problems.append(Problem(str(path), "refused", "unknown-name", detail, name))
            continue
        if name in found:
            # Both releases side by side: HU as released beats HU that must be computed.
            keep, drop = found[name], path
            if _is_fixed(path) and not _is_fixed(keep):
                keep, drop = path, keep
            found[name] = keep
            detail = f"the same volume as {keep}; that one is used"
            problems.append(Problem(str(drop), "refused", "second-copy", detail))
        else:
            found[name] = path
    return found


def _is_fixed(path: Path) -> bool:
    return any(part.endswith("_fixed") for part in path.parts)


def _listed_as_no_chest(root: Path) -> set[str]:
    names: set[str] = set()
    for path in root.rglob("no_chest*.txt"):
        words = path.read_text(encoding="utf-8", errors="replace").split()
        names |= {volume_stem(word) for word in words}
    return names


def _record(
    name: str,
    path: Path,
    text: Report | None,
    labels: dict[str, float] | None,
    metadata: Metadata | None,
) -> VolumeRecord:
    match = NAME.fullmatch(name)
    assert match is not None
    text = text or Report(None, None)
    metadata = metadata or Metadata()
    extra = {"clinical_information": text.clinical, "technique": text.technique}
    return VolumeRecord(
        volume_id=name,
        study_id=match["study"],
        patient_id=match["patient"],
        split=match["split"],  # type: ignore[arg-type]
        path=path,
        findings=text.findings,
        impression=text.impression,
        labels=labels or {},
        meta=metadata.meta | {key: value for key, value in extra.items() if value},
        rescale=metadata.rescale,
        spacing_mm=metadata.spacing_mm,
    )


def read_reports(
    path: Path, problems: list[Problem], table: Table | None = None
) -> dict[str, Report]:
    """Reports by volume name; empty ones are kept as absent and listed.

    Raises:
        ManifestError: If the table can't be used.
    """
    table = table or read_table(path)
    table.require(("VolumeName", "Findings_EN", "Impressions_EN"))
    counts: Counter[str] = Counter()
    reports: dict[str, Report] = {}
    for name, row in _named_rows(table, problems):
        found = Report(
            findings=report.clean(row.get("Findings_EN"), counts),
            impression=report.clean(row.get("Impressions_EN"), counts),
            clinical=report.clean(row.get("ClinicalInformation_EN")),
            technique=report.clean(row.get("Technique_EN")),
        )
        if found.findings is None and found.impression is None:
            detail = "findings and impression are both absent"
            problems.append(Problem(f"{path}:{row.line}", "warned", "empty-report", detail, name))
        _keep(reports, name, found, row, table, problems)
    problems += text_problems(path, counts)
    return reports


def read_labels(
    path: Path, problems: list[Problem], table: Table | None = None
) -> dict[str, dict[str, float]]:
    """Labels by volume name and finding, whatever the order of columns.

    Raises:
        ManifestError: If a finding's column is missing or a value is not 0, 1 or empty.
    """
    table = table or read_table(path)
    table.require(("VolumeName", *FINDINGS))
    errors: list[str] = []
    labels: dict[str, dict[str, float]] = {}
    for name, row in _named_rows(table, problems):
        found = parse_labels(table, row, errors)
        _keep(labels, name, found, row, table, problems)
    raise_all(path, errors)
    return labels


def read_metadata(
    path: Path, problems: list[Problem], table: Table | None = None
) -> dict[str, Metadata]:
    """Rescale, spacing and acquisition by volume name; a cell is parsed as numbers, never run.

    A row with a malformed or impossible number is refused, and its volume with it.

    Raises:
        ManifestError: If the table can't be used.
    """
    table = table or read_table(path)
    table.require(("VolumeName",))
    found: dict[str, Metadata] = {}
    for name, row in _named_rows(table, problems):
        try:
            rescale, spacing = _rescale(row), _spacing(row)
        except ValueError as error:
            problems.append(table.refused(row, "bad-number", str(error), name))
            continue
        if rescale is None and spacing is None:
            detail = "neither rescale nor spacing"
            problems.append(Problem(f"{path}:{row.line}", "warned", "no-metadata", detail, name))
        meta = {key: row.get(column) for column, key in META.items() if row.get(column)}
        if "age" in meta:
            meta["age"] = meta["age"].strip("Yy").lstrip("0") or "0"
        _keep(found, name, Metadata(rescale, spacing, meta), row, table, problems)
    return found


def _named_rows(table: Table, problems: list[Problem]) -> Iterable[tuple[str, Row]]:
    problems += table.malformed
    for row in table.rows:
        name = row.get("VolumeName")
        if is_safe_id(name):
            yield volume_stem(name), row
        else:
            detail = f"VolumeName {name!r} is not a file name; paths are not allowed"
            problems.append(table.refused(row, "unsafe-name", detail))


def _keep(
    found: dict,
    name: str,
    value: object,
    row: Row,
    table: Table,
    problems: list[Problem],
) -> None:
    """File a row under its volume; a repetition is dropped, a contradiction refused."""
    if name not in found:
        found[name] = value
    elif _same(found[name], value):
        detail = "the same row twice; used once"
        where = f"{table.path}:{row.line}"
        problems.append(Problem(where, "corrected", "repeated-row", detail, name))
    else:
        detail = "an earlier row of this volume says otherwise"
        problems.append(table.refused(row, "contradiction", detail, name))


def _join(total: dict, found: dict, path: Path, problems: list[Problem]) -> None:
    """Put a table's rows to those of the tables before it; they must not contradict each other."""
    for name, value in found.items():
        if not _same(total.setdefault(name, value), value):
            detail = "another table says otherwise about this volume"
            problems.append(Problem(str(path), "refused", "contradiction", detail, name))


def _same(first: object, second: object) -> bool:
    """Equality in which two unknown labels are equal."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            first[key] == second[key] or (math.isnan(first[key]) and math.isnan(second[key]))
            for key in first
        )
    return first == second


def _number(cell: str) -> float | None:
    """A finite number, None where the cell is empty or "nan", else ValueError."""
    if cell.lower() in ("", "nan"):
        return None
    value = float(cell)
    if not math.isfinite(value):
        raise ValueError(cell)
    return value


def _rescale(row: Row) -> tuple[float, float] | None:
    try:
        slope, intercept = _number(row.get("RescaleSlope")), _number(row.get("RescaleIntercept"))
    except ValueError:
        raise ValueError("RescaleSlope or RescaleIntercept is not a number") from None
    if slope == 0:
        raise ValueError("RescaleSlope is 0")
    if slope is None or intercept is None:
        return None
    return slope, intercept


def _in_plane(cell: str) -> tuple[float, float] | tuple[None, None]:
    """Two numbers in brackets, or one; a cell is never evaluated, whatever it says."""
    if cell.lower() in ("", "nan"):
        return None, None
    if _ONE_NUMBER.fullmatch(cell):
        return float(cell), float(cell)
    match = _TWO_NUMBERS.fullmatch(cell)
    if match is None:
        raise ValueError(cell)
    return float(match[1]), float(match[2])


def _spacing(row: Row) -> ClaimedSpacing | None:
    in_plane = row.get("XYSpacing")
    try:
        depth = _number(row.get("ZSpacing"))
        first, second = _in_plane(in_plane)
    except ValueError:
        raise ValueError(
            f"XYSpacing {in_plane[:40]!r}, ZSpacing {row.get('ZSpacing')[:40]!r}; expected [x, y] "
            "and z in mm"
        ) from None
    if any(value is not None and value <= 0 for value in (depth, first, second)):
        raise ValueError("a spacing of 0 or less")
    if depth is None and first is None:
        return None
    return depth, second, first
