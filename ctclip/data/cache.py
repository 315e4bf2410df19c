"""Prepare a cohort once: every scan checked, resampled and compressed, every refusal on record.

A prepared cohort is a folder named after the fingerprint of its preprocessing::

    <out>/<fingerprint>/
        recipe.yaml      the VolumeConfig
        manifest.csv     usable volumes, with reports, labels and checksums
        ledger.csv       every input that was refused, corrected or looked odd, and why
        summary.json     counts
        volumes/         <volume_id>.b2nd: int16 HU, blosc2 zstd-1 with bitshuffle, chunked
        done/            <volume_id>.json: what happened to each volume; makes a rerun skip it

Nothing is written in place: a file is complete or absent, so a killed run is continued by running
it again, and several runs may work on one folder.
"""

import json
import logging
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ctclip import config as configs
from ctclip.data import chest, hygiene, storage, volume
from ctclip.data.cohort import CorruptVolumeError, PreparedCohort, write_cohort_manifest
from ctclip.data.manifest import VolumeRecord
from ctclip.data.problems import ManifestError, Problem, VolumeError
from ctclip.data.volume import VolumeConfig

__all__ = ["CorruptVolumeError", "PreparedCohort", "prepare"]

logger = logging.getLogger(__name__)

LEDGER_COLUMNS = ("path", "volume_id", "status", "code", "detail")


def prepare(
    records: Sequence[VolumeRecord],
    out: str | Path,
    config: VolumeConfig,
    *,
    workers: int = 1,
    strict: bool = False,
    problems: Sequence[Problem] = (),
    accept: Iterable[str] = (),
) -> PreparedCohort:
    """Turn scans into a cohort for training and scoring; done work is skipped.

    Args:
        records: From a manifest reader.
        out: Folder for prepared cohorts; this one becomes ``out/<fingerprint>``.
        config: The preprocessing.
        workers: Processes.
        strict: Make anything that would enter the ledger an error.
        problems: What the manifest reader found, for the ledger.
        accept: Codes of notes that hold a volume back ("hu-offset", "8-bit", …) and that the user
            accepts.

    Returns:
        The opened cohort.

    Raises:
        ManifestError: If a patient is in two splits, if no volume is usable, or, with ``strict``,
            if the ledger is not empty.
    """
    hygiene.check_patients(records)
    folder = Path(out) / config.fingerprint()
    for name in ("volumes", "done", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    storage.write_text(
        folder, "recipe.yaml", yaml.safe_dump(configs.to_dict(config), sort_keys=False)
    )

    outcomes = dict(_outcomes(records, folder, config, workers, frozenset(accept)))
    ledger = list(problems)
    usable = []
    for record in records:
        outcome = outcomes[record.volume_id]
        ledger += [Problem(**problem) for problem in outcome["problems"]]
        if outcome["usable"]:
            usable.append(record)
    kept, found = hygiene.find_duplicates(usable, outcomes)
    ledger += found
    _write_ledger(folder, ledger)
    write_cohort_manifest(folder, kept, outcomes)
    _write_summary(folder, len(records), kept, ledger)
    storage.sweep(folder)

    worrying = [problem for problem in ledger if problem.status != "noted"]
    if strict and worrying:
        first = worrying[0]
        raise ManifestError(
            f"{folder / 'ledger.csv'}: {len(worrying)} problem(s), and --strict allows none; "
            f"first: {first.path}: {first.detail} [{first.code}]"
        )
    if not kept:
        raise ManifestError(f"no usable volume; {folder / 'ledger.csv'} tells why for each")
    refused = sum(problem.status == "refused" for problem in worrying)
    logger.info(
        "%d of %d volumes prepared in %s; %d refused, %d other notes in ledger.csv",
        len(kept),
        len(records),
        folder,
        refused,
        len(worrying) - refused,
    )
    return PreparedCohort.open(folder)


def _outcomes(
    records: Sequence[VolumeRecord],
    folder: Path,
    config: VolumeConfig,
    workers: int,
    accept: frozenset[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What happened to each volume: now, or in an earlier run if its file has not changed."""
    from tqdm import tqdm

    waiting = []
    for record in records:
        outcome = _earlier(record, folder, accept)
        if outcome is None:
            waiting.append(record)
        else:
            yield record.volume_id, outcome
    bar = tqdm(
        total=len(records),
        initial=len(records) - len(waiting),
        desc="prepare",
        unit="volume",
        disable=not sys.stderr.isatty(),
    )
    with bar:
        if workers <= 1 or len(waiting) <= 1:
            for record in waiting:
                yield record.volume_id, prepare_one(record, folder, config, accept)
                bar.update()
            return
        # A fresh server forks workers that have imported only what preparing needs, and that hold
        # no lock of a thread of ours.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ctclip.data.cache"])
        with ProcessPoolExecutor(min(workers, len(waiting)), mp_context=context) as pool:
            futures = {
                pool.submit(prepare_one, record, folder, config, accept): record.volume_id
                for record in waiting
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.update()


def prepare_one(
    record: VolumeRecord, folder: Path, config: VolumeConfig, accept: frozenset[str]
) -> dict[str, Any]:
    """Prepare one volume and put its outcome on disk; never raises for a bad scan."""
    problems: list[Problem] = []
    outcome: dict[str, Any] = {
        "source": _stamp(record, accept),
        "usable": False,
    }
    try:
        if record.path is None:
            raise VolumeError(record.study_id, "no-volume", "the row names no scan")
        scan = volume.read(
            record.path,
            rescale=record.rescale,
            spacing_mm=record.spacing_mm,
            series=record.series,
        )
        notes = scan.warnings()
        held = [note for note in notes if note.level == "hold" and note.code not in accept]
        if not held:
            notes += chest.check(scan).notes
        for note in notes:
            problems.append(
                Problem(
                    str(record.path),
                    "refused" if note in held else "warned",
                    note.code,
                    note.text,
                    record.volume_id,
                )
            )
        if not held:
            frame = storage.compress(volume.preprocess(scan, config))
            storage.write_bytes(folder, f"volumes/{record.volume_id}.b2nd", frame)
            outcome |= {
                "usable": True,
                "crc32": storage.checksum(frame),
                "content": hygiene.content_hash(scan.hu),
                "shape": list(scan.hu.shape),
                "spacing_mm": [round(step, 6) for step in scan.spacing_mm],
                "affine": np.round(volume.preprocessed_affine(scan, config), 6).tolist(),
            }
    except VolumeError as error:
        problems.append(
            Problem(str(error.path), "refused", error.code, error.detail, record.volume_id)
        )
    except FileNotFoundError as error:
        detail = str(error)
        problems.append(
            Problem(str(record.path), "refused", "missing-file", detail, record.volume_id)
        )
    outcome["problems"] = [asdict(problem) for problem in problems]
    storage.write_text(folder, f"done/{record.volume_id}.json", json.dumps(outcome, sort_keys=True))
    return outcome


def _stamp(record: VolumeRecord, accept: frozenset[str]) -> list[Any]:
    """What an outcome depends on besides the config: another scan or another table redoes it."""
    if record.path is None or not record.path.exists():
        size, changed_ns = 0, 0
    elif record.path.is_dir():
        files = [file.stat() for file in sorted(record.path.rglob("*")) if file.is_file()]
        size = sum(stat.st_size for stat in files)
        changed_ns = max((stat.st_mtime_ns for stat in files), default=0)
    else:
        stat = record.path.stat()
        size, changed_ns = stat.st_size, stat.st_mtime_ns
    return [
        size,
        changed_ns,
        list(record.rescale or ()),
        list(record.spacing_mm or ()),
        sorted(accept),
    ]


def _earlier(record: VolumeRecord, folder: Path, accept: frozenset[str]) -> dict[str, Any] | None:
    try:
        outcome = json.loads((folder / "done" / f"{record.volume_id}.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    if outcome["source"] != _stamp(record, accept):
        return None
    if outcome["usable"] and not (folder / "volumes" / f"{record.volume_id}.b2nd").exists():
        return None
    return outcome


def _write_ledger(folder: Path, ledger: Sequence[Problem]) -> None:
    storage.write_csv(folder, "ledger.csv", LEDGER_COLUMNS, [asdict(problem) for problem in ledger])


def _write_summary(
    folder: Path, num_inputs: int, kept: Sequence[VolumeRecord], ledger: Sequence[Problem]
) -> None:
    summary = {
        "inputs": num_inputs,
        "volumes": len(kept),
        "studies": len({record.study_id for record in kept}),
        "patients": len({record.patient_id for record in kept}),
        "splits": dict(sorted(Counter(record.split for record in kept).items())),
        "ledger": dict(sorted(Counter(f"{p.status}: {p.code}" for p in ledger).items())),
    }
    storage.write_text(folder, "summary.json", json.dumps(summary, indent=2) + "\n")
