"""Whatever a user points at becomes records: a manifest, a data set, DICOM, plain files."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ctclip.data import ct_rate, dicom, rad_chestct
from ctclip.data.manifest import VolumeRecord, is_safe_id, read_manifest, split_of, volume_stem
from ctclip.data.problems import (
    Level,
    ManifestError,
    Note,
    Problem,
    Status,
    VolumeError,
    some_of,
)
from ctclip.data.table import (
    MANIFEST_COLUMNS,
    MAX_SHOWN,
    SUFFIXES,
    in_prepared_cohort,
    read_table,
    tables_in,
)

logger = logging.getLogger(__name__)

Kind = Literal["auto", "manifest", "ct-rate", "rad-chestct", "dicom", "files"]

SCAN_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".npz", ".hdr")

OTHER_IMAGES = (".dcm", ".ima", ".dicom", ".mhd", ".nhdr", ".img", ".mgz", ".mgh", ".mnc", ".zip")
"""Beside scans, these are probably scans too, and need a reader or a source of their own."""

ACCEPTED = (
    "a manifest (.csv, .csv.gz or .parquet with patient_id, study_id and path), a folder of "
    "CT-RATE or RAD-ChestCT with its tables, DICOM files in folders of any nesting, or scans "
    f"({', '.join(SCAN_SUFFIXES)})"
)
"""What a source may be, for messages."""

NAMES: dict[Kind, str] = {
    "manifest": "a manifest",
    "ct-rate": "CT-RATE",
    "rad-chestct": "RAD-ChestCT",
    "dicom": "DICOM, as it holds no table and no other scan",
    "files": "scans without a table, one patient each",
}

EXPECTED = (
    f"the columns {', '.join(MANIFEST_COLUMNS)} of a manifest, VolumeName of CT-RATE or "
    "NoteAcc_DEID of RAD-ChestCT"
)


SERIES_STATUS: dict[Level, Status] = {"info": "noted", "note": "left-out", "warn": "warned"}
"""What a note on the files of a DICOM archive is in the ledger."""


def read_source(
    path: str | Path,
    kind: Kind = "auto",
    *,
    root: str | Path | None = None,
    variant: rad_chestct.Variant = "located",
) -> tuple[list[VolumeRecord], list[Problem]]:
    """Turn a source into records.

    Args:
        path: A manifest (CSV or Parquet) or the folder that holds it, one scan, or a folder.
        kind: What it is; ``auto`` finds out.
        root: For a manifest, the folder that its paths are relative to.
        variant: For RAD-ChestCT, the mapping of labels.

    Returns:
        Records, and problems for the ledger.

    Raises:
        ManifestError: If a table is malformed or nothing usable is found.
        FileNotFoundError: If there is nothing at ``path``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}")
    kind = detect(path) if kind == "auto" else kind
    logger.info("reading %s as %s", path, NAMES[kind])
    match kind:
        case "manifest":
            return read_manifest(_manifest_in(path), root)
        case "ct-rate":
            return ct_rate.read_ct_rate(path)
        case "rad-chestct":
            return rad_chestct.read_rad_chestct(path, variant)
        case "files":
            return _plain_files(path)
        case _:
            return _dicom_studies(path)


def detect(path: Path) -> Kind:
    """What a path is, by its content: tables first, then file types.

    Raises:
        ManifestError: If there are tables and none of them says what the source is: read without
            them, scans would lose their labels, patients and splits in silence.
    """
    if path.is_file():
        return "manifest" if path.name.lower().endswith(SUFFIXES) else "files"
    unknown = []
    for file in tables_in(path):
        try:
            table = read_table(file)
        except ManifestError as error:
            unknown.append(str(error))
            continue
        if set(MANIFEST_COLUMNS) <= set(table.columns):
            return "manifest"
        if "VolumeName" in table.columns:
            return "ct-rate"
        if "NoteAcc_DEID" in table.columns:
            return "rad-chestct"
        unknown.append(f"{file}: header not recognised; found {table.header()}")
    kind: Kind = "files" if next(_scans(path), None) is not None else "dicom"
    if unknown:
        shown = "\n  ".join(unknown[:MAX_SHOWN])
        more = f"\n  and {len(unknown) - MAX_SHOWN} more" if len(unknown) > MAX_SHOWN else ""
        raise ManifestError(
            f"{path}: {len(unknown)} table(s), none of which can be used\n  {shown}{more}\n"
            f"expected {EXPECTED}; correct the table, or read the scans without it: --kind {kind}"
        )
    return kind


def _manifest_in(path: Path) -> Path:
    """The one manifest in a folder: scans beside a manifest must not lose their labels."""
    if path.is_file():
        return path
    found, others = [], []
    for file in tables_in(path):
        try:
            columns = read_table(file).columns
        except ManifestError as error:
            others.append(str(error))
            continue
        if "patient_id" in columns:
            found.append(file)
    if len(found) != 1:
        names = ", ".join(str(table) for table in found) or "none"
        why = "".join(f"\n  {text}" for text in others[:MAX_SHOWN])
        raise ManifestError(f"{path}: expected one manifest, found {names}; give its path{why}")
    return found[0]


def _scans(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if _is_scan(file))


def _is_scan(path: Path) -> bool:
    """By its name; a folder of such a name too, unless it only wraps the scan (``a.nii/a.nii``)."""
    if not path.name.lower().endswith(SCAN_SUFFIXES):
        return False
    return path.is_file() or not any(_is_scan(inner) for inner in path.rglob("*"))


def _not_scans(folder: Path, scans: Sequence[Path]) -> list[Problem]:
    """The ledger's entries for other files beside scans, one for each kind."""
    of_kind: dict[str, list[Path]] = defaultdict(list)
    used = {*scans, *(scan.with_suffix(".img") for scan in scans if scan.suffix == ".hdr")}
    for file in sorted(set(folder.rglob("*")) - used):
        inside_scan = not used.isdisjoint(file.parents)
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not (inside_scan or is_hidden or in_prepared_cohort(file, folder)):
            of_kind[file.suffix.lower()].append(file)
    problems = []
    for suffix, files in sorted(of_kind.items()):
        named = f"{len(files)} {suffix or 'nameless'} file(s): {some_of(files, folder)}"
        if suffix in OTHER_IMAGES:
            detail = f"{named}; not read beside other scans, make them a source of their own"
            problems.append(Problem(str(folder), "refused", "not-used", detail))
        else:
            detail = f"{named}; by their name not scans"
            problems.append(Problem(str(folder), "noted", "not-used", detail))
    return problems


def _plain_files(path: Path) -> tuple[list[VolumeRecord], list[Problem]]:
    """Scans without a table, each taken for a patient of its own: enough to score or embed them."""
    files = [path] if path.is_file() else sorted(_scans(path))
    if not files:
        raise ManifestError(f"{path}: no scan in it ({', '.join(SCAN_SUFFIXES)})")
    records = []
    seen: dict[str, Path] = {}
    for file in files:
        name = volume_stem(file.name)
        if name in seen:
            raise ManifestError(
                f"{file} and {seen[name]} have the same name; write a manifest with volume_id"
            )
        seen[name] = file
        records.append(_without_report(name, name, name, file))
    return records, [] if path.is_file() else _not_scans(path, files)


def _without_report(volume: str, study: str, patient: str, path: Path) -> VolumeRecord:
    return VolumeRecord(
        volume_id=volume,
        study_id=study,
        patient_id=patient,
        split="test",
        path=path,
    )


def _dicom_studies(folder: Path) -> tuple[list[VolumeRecord], list[Problem]]:
    """One volume per study, by :func:`ctclip.data.dicom.best_series`; the rest is ledgered."""
    notes: list[Note] = []
    try:
        found = dicom.find_series(folder, notes, show_progress=True)
    except VolumeError as error:
        if error.code == "no-dicom":
            raise ManifestError(f"{folder}: nothing to prepare; expected {ACCEPTED}") from None
        raise ManifestError(str(error)) from None
    problems = [
        Problem(str(folder), SERIES_STATUS[note.level], note.code, note.text) for note in notes
    ]
    studies: dict[str, list[dicom.Series]] = defaultdict(list)
    for one in found:
        studies[one.slices[0].study_uid or one.uid].append(one)
    records = []
    for study, members in sorted(studies.items()):
        best = dicom.best_series(members)
        for one in members:
            if one is best:
                continue
            where = str(one.slices[0].file.parent)
            problems.append(
                Problem(where, "refused", "no-axial-series", "no axial series of 8 slices", one.uid)
                if best is None
                else Problem(where, "left-out", "other-series", f"{best.uid} is used", one.uid)
            )
        if best is None:
            continue
        record = _dicom_record(folder, study, best)
        records.append(record)
        if not best.slices[0].patient_id:
            detail = "no PatientID; this study is taken for a patient of its own"
            where = str(record.path)
            problems.append(Problem(where, "warned", "no-patient-id", detail, record.volume_id))
    return records, problems


def _dicom_record(folder: Path, study: str, series: dicom.Series) -> VolumeRecord:
    first = series.slices[0]
    patient = first.patient_id or study
    parents = {one.file.parent for one in series.slices}
    volume = series.uid if is_safe_id(series.uid) else study
    return VolumeRecord(
        volume_id=volume,
        study_id=study,
        patient_id=patient,
        split=split_of(patient),
        path=parents.pop() if len(parents) == 1 else folder,
        meta=dict(first.meta),
        series=series.uid,
    )
