"""Build a phantom cohort on disk: volumes, a manifest with reports and labels, and the truth.

Every patient comes from (seed, index) alone, so neither the number of workers nor an interruption
changes a voxel or a word. A patient's record is written last; what has one is skipped.

Files of a cohort::

    cohort.yaml         the config that built it
    manifest.csv        volumes, reports, labels taken from the reports, scanner and patient facts
    truth.csv           one row per drawn lesion: side, lobe, size, severity, bounding box
    truth_labels.csv    what was drawn, per volume
    truth_reports.csv   what each report says about each finding, and which errors it makes
    volumes/*.nii.gz
    records/*.json      one per finished patient
"""

import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import io
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from ctclip import config as configs
from ctclip.findings import FINDINGS
from ctclip.phantom import acquisition, anatomy, findings, prevalence, reports
from ctclip.phantom.grid import Grid
from ctclip.phantom.lesions import Lesion
from ctclip.phantom.reports import ReportConfig
from ctclip.progress import Progress

logger = logging.getLogger(__name__)

DRAWING_VERSION = 7
"""Part of the fingerprint: raised when the same seed draws other voxels or words."""


class CohortError(ValueError):
    """A folder that can't take the cohort asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """A cohort of phantoms. The defaults are the quickstart's."""

    num_patients: int = 900
    seed: int = 0

    shape: tuple[int, int, int] | None = (64, 96, 96)
    """Voxels (D, H, W) over each patient's field of view; None leaves it to the spacing."""

    spacing_mm: tuple[float, float, float] | None = None
    """Voxel size (D, H, W). With ``shape`` null as well: the scanner's, 512 x 512 in plane."""

    min_prevalence: float = 0.0
    """Findings rarer than this in CT-RATE are raised to it; 0 keeps CT-RATE's prevalence."""

    second_reconstruction: float = 0.0
    """Share of studies reconstructed with both kernels (0.9 in CT-RATE)."""

    second_study: float = 0.0
    """Share of patients who come back for another scan (0.11 in CT-RATE)."""

    split: tuple[float, float, float] = (0.75, 0.1, 0.15)
    """Shares of patients in train, valid and test."""

    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)

    workers: int = 0
    """Processes; 0 takes one per CPU core."""

    def __post_init__(self) -> None:
        if self.num_patients < 1:
            raise ValueError(f"num_patients must be at least 1, got {self.num_patients}")
        if self.shape is not None and min(self.shape) < 8:
            raise ValueError(f"shape must be at least 8 voxels along each axis, got {self.shape}")
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        if not 0 <= self.min_prevalence <= 0.9:
            raise ValueError(f"min_prevalence must be from 0 to 0.9, got {self.min_prevalence}")
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split must be three shares that sum to 1, got {self.split}")

    @property
    def fingerprint(self) -> str:
        """Hash of what decides a patient's files: all but the number of patients and workers."""
        data = configs.to_dict(self)
        del data["num_patients"], data["workers"]
        data["version"] = DRAWING_VERSION
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def build(config: PhantomConfig, out: Path) -> Path:
    """Build the cohort, or what is missing of it.

    Args:
        config: What to build.
        out: Folder of the cohort; made when missing.

    Returns:
        Path of ``manifest.csv``.

    Raises:
        CohortError: If the folder holds a cohort of another config.
    """
    out = Path(out)
    for folder in (out / "volumes", out / "records"):
        folder.mkdir(parents=True, exist_ok=True)
    _claim(config, out)
    indices = range(config.num_patients)
    missing = [i for i in indices if not _record_path(out, i).exists()]
    start = time.perf_counter()
    done = config.num_patients - len(missing)
    with Progress(config.num_patients, "draw", "patient", done=done) as progress:
        for _ in _work(config, out, missing):
            progress.update()
    elapsed_s = time.perf_counter() - start
    if missing:
        rate = len(missing) / elapsed_s
        logger.info("drew %d patients in %.0f s, %.2f a second", len(missing), elapsed_s, rate)
    else:
        logger.info("%s is complete: %d patients", out, config.num_patients)
    _write_tables(out, indices)
    return out / "manifest.csv"


def _claim(config: PhantomConfig, out: Path) -> None:
    """Mark the folder as this config's, or refuse it."""
    marker = out / "cohort.yaml"
    if marker.exists():
        text = marker.read_text(encoding="utf-8")
        if text.splitlines()[:1] != [f"# fingerprint {config.fingerprint}"]:
            raise CohortError(
                f"{marker} was written for another cohort ({_difference(config, text)}); choose "
                f"another folder or delete {out}"
            )
    elif any((out / "records").iterdir()):
        raise CohortError(f"{out} holds patients but no cohort.yaml; delete it and build again")
    buffer = io.StringIO()
    buffer.write(f"# fingerprint {config.fingerprint}\n")
    for line in _yaml(config):
        buffer.write(line)
    _write_atomic(marker, buffer.getvalue().encode())


def _difference(config: PhantomConfig, text: str) -> str:
    """What sets a cohort's ``cohort.yaml`` apart from this config, in words."""
    import yaml

    try:
        there = dict(yaml.safe_load(text))
    except (yaml.YAMLError, TypeError, ValueError):
        return "the file can't be read"
    here = yaml.safe_load("".join(_yaml(config)))
    changed = [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(set(there) | set(here))
        if there.get(key) != here.get(key) and key not in ("num_patients", "workers")
    ]
    return "; ".join(changed) or "its pictures were drawn by another version of ctclip"


def _yaml(config: PhantomConfig) -> Iterable[str]:
    import yaml

    return yaml.safe_dump(configs.to_dict(config), sort_keys=False).splitlines(keepends=True)


def _work(config: PhantomConfig, out: Path, indices: list[int]) -> Iterator[int]:
    workers = min(config.workers or os.cpu_count() or 1, len(indices))
    job = functools.partial(build_patient, config, out)
    if workers <= 1:
        yield from map(job, indices)
        return
    # spawn: a forked child of a process that has used torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(job, indices, chunksize=4)


def _record_path(out: Path, index: int) -> Path:
    return out / "records" / f"{patient_id(index)}.json"


def patient_id(index: int) -> str:
    """Name of the patient with this index."""
    return f"phantom_{index:05d}"


def build_patient(config: PhantomConfig, out: Path, index: int) -> int:
    """Draw one patient's volumes, write their files and record. Returns ``index``."""
    streams = {
        name: np.random.default_rng([config.seed, index, k])
        for k, name in enumerate(("findings", "body", "lesions", "scan", "words", "split"))
    }
    present, frailty = prevalence.sample_findings(streams["findings"], config.min_prevalence)
    who = streams["body"]
    age = int(np.clip(48 + 17 * (0.6 * frailty + 0.8 * who.normal()), 18, 92))
    body = anatomy.sample_patient(who, age, "M" if who.random() < 0.58 else "F")
    split = ("train", "valid", "test")[
        int(np.searchsorted(np.cumsum(config.split)[:2], streams["split"].random(), "right"))
    ]
    style = reports.STYLES[
        int(who.choice(3, p=np.array(config.report.styles) / sum(config.report.styles)))
    ]
    record: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("manifest", "truth", "truth_labels", "truth_reports")
    }
    comes_back = streams["scan"].random() < config.second_study
    for letter in "ab"[: 1 + comes_back]:
        study = f"{patient_id(index)}_{letter}"
        if letter == "b":
            body = anatomy.reposition(body, who)
        patient, lesions = findings.sample_lesions(present, body, streams["lesions"])
        facts = {
            "patient_id": patient_id(index),
            "split": split,
            "sex": patient.sex,
            "age": patient.age,
            "hospital": f"hospital-{reports.STYLES.index(style) + 1}",
        }
        _build_study(config, out, study, patient, lesions, facts, style, streams, record)
    _write_atomic(_record_path(out, index), json.dumps(record).encode())
    return index


def _build_study(
    config: PhantomConfig,
    out: Path,
    study: str,
    patient: anatomy.Patient,
    lesions: list[Lesion],
    facts: Mapping[str, Any],
    style: str,
    streams: Mapping[str, np.random.Generator],
    record: dict[str, list[dict[str, Any]]],
) -> None:
    rng = streams["scan"]
    low, high = acquisition.field_of_view(patient, rng)
    twice = rng.random() < config.second_reconstruction
    report: reports.Report | None = None
    for k, scanner in enumerate(acquisition.sample_scanners(rng, 1 + twice)):
        volume = f"{study}_{k + 1}"
        grid = acquisition.make_grid(low, high, scanner, config.shape, config.spacing_mm)
        ideal, boxes = acquisition.render(patient, lesions, grid)
        hu = acquisition.scan(ideal, grid, scanner, rng)
        name = f"volumes/{volume}.nii.gz"
        _write_atomic(out / name, nifti_bytes(hu, grid))
        record["truth"] += [
            _truth_row(volume, n, lesion, box, grid)
            for n, (lesion, box) in enumerate(zip(lesions, boxes, strict=True))
        ]
        if report is None:
            numbers = [
                grid.shape[0] - int((box[0][0] + box[1][0]) // 2) if box else grid.shape[0] // 2
                for box in boxes
            ]
            report = reports.write_report(lesions, numbers, config.report, streams["words"], style)
            record["truth_reports"] += [
                {"study_id": study, "style": report.style, **dataclasses.asdict(statement)}
                for statement in report.statements
            ]
        ids = {"patient_id": facts["patient_id"], "study_id": study, "volume_id": volume}
        drawn = {lesion.finding for lesion in lesions}
        record["truth_labels"].append(ids | {name: int(name in drawn) for name in FINDINGS})
        record["manifest"].append(
            ids
            | {"split": facts["split"], "path": name}
            | {"findings": report.findings, "impression": report.impression}
            | {statement.finding: statement.label for statement in report.statements}
            | {key: facts[key] for key in ("sex", "age", "hospital")}
            | {
                "manufacturer": scanner.manufacturer,
                "kernel": scanner.kernel,
                "slice_thickness_mm": round(grid.spacing_mm[0], 3),
                "meta_model": scanner.model,
            }
        )


def _truth_row(
    volume: str,
    number: int,
    lesion: Lesion,
    box: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    grid: Grid,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "volume_id": volume,
        "lesion": number,
        "finding": lesion.finding,
        "kind": lesion.kind,
        "side": lesion.side,
        "lobe": lesion.lobe,
        "size_mm": round(lesion.size_mm, 1),
        "severity": round(lesion.severity, 3),
    }
    for axis, letter in enumerate("dhw"):
        row[f"{letter}_first"] = int(box[0][axis]) if box else ""
        row[f"{letter}_last"] = int(box[1][axis]) if box else ""
    for axis, letter in enumerate("dhw"):
        extent = (box[1][axis] - box[0][axis] + 1) * grid.spacing_mm[axis] if box else None
        row[f"{letter}_mm"] = "" if extent is None else round(float(extent), 1)
    return row


def nifti_bytes(hu: NDArray[np.int16], grid: Grid) -> bytes:
    """A gzipped NIfTI of an SPL volume, stored x first in LPS as CT-RATE's files are."""
    to_xyz = np.eye(4)[[2, 1, 0, 3]]
    image = nib.Nifti1Image(np.ascontiguousarray(hu.transpose(2, 1, 0)), grid.affine @ to_xyz)
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    # Without a time stamp, the same patient is the same file to the byte.
    return igzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _write_atomic(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _write_tables(out: Path, indices: Iterable[int]) -> None:
    tables: dict[str, list[dict[str, Any]]] = {}
    for index in indices:
        record = json.loads(_record_path(out, index).read_text(encoding="utf-8"))
        for name, rows in record.items():
            tables.setdefault(name, []).extend(rows)
    for name, rows in tables.items():
        buffer = io.StringIO()
        if rows:
            writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        _write_atomic(out / f"{name}.csv", buffer.getvalue().encode())
