"""Prepare a cohort once: every scan checked, resampled and compressed, every refusal on record.

A prepared cohort is a folder named after the fingerprint of its preprocessing::

    <out>/<fingerprint>/
        recipe.yaml      the VolumeConfig
        manifest.csv     usable volumes, with reports, labels and checksums
        ledger.csv       every input that was refused, corrected or looked odd, and why
        summary.json     counts; inputs = used + corrected + refused
        volumes/         <volume_id>.b2nd: HU as int16, blosc2 zstd-1 with bitshuffle, chunked
        done/            <volume_id>.json: what happened to each volume; makes a rerun skip it

Nothing is written in place: a file is complete or absent, so a killed run is continued by running
it again, and several runs may work on one folder.
"""

import json
import logging
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ctclip import config as configs
from ctclip.data import checked, hygiene, storage, volume
from ctclip.data.cohort import CorruptVolumeError, PreparedCohort, write_cohort_manifest
from ctclip.data.manifest import VolumeRecord
from ctclip.data.problems import Level, ManifestError, Problem, Status, VolumeError
from ctclip.data.report import report_text
from ctclip.data.volume import VolumeConfig
from ctclip.progress import Progress

__all__ = ["CorruptVolumeError", "PreparedCohort", "prepare"]

logger = logging.getLogger(__name__)

LEDGER_COLUMNS = ("path", "volume_id", "status", "code", "detail")

STATUS: dict[Level, Status] = {"note": "noted", "warn": "warned", "hold": "warned"}
"""A note's level in the ledger's words; a held volume that the user accepted is warned about."""


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
    summary = summarise(records, kept, ledger)
    storage.write_text(folder, "summary.json", json.dumps(summary, indent=2) + "\n")
    storage.sweep(folder)

    worrying = [problem for problem in ledger if problem.status != "noted"]
    if strict and worrying:
        first = worrying[0]
        raise ManifestError(
            f"{folder / 'ledger.csv'}: {len(worrying)} problem(s), and --strict allows none; "
            f"first: {first.path}: {first.detail} [{first.code}]"
        )
    if not kept:
        counts = ", ".join(f"{code} x {number}" for code, number in summary["ledger"].items())
        raise ManifestError(
            f"no usable volume among {summary['inputs']} inputs ({counts}); "
            f"{folder / 'ledger.csv'} tells why for each"
        )
    for line in _in_words(folder, summary):
        logger.info("%s", line)
    return PreparedCohort.open(folder)


def _outcomes(
    records: Sequence[VolumeRecord],
    folder: Path,
    config: VolumeConfig,
    workers: int,
    accept: frozenset[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What happened to each volume: now, or in an earlier run if its file has not changed."""
    waiting = []
    for record in records:
        outcome = _earlier(record, folder, accept)
        if outcome is None:
            waiting.append(record)
        else:
            yield record.volume_id, outcome
    done = len(records) - len(waiting)
    earlier = f"; {done} were done in an earlier run" if done else ""
    logger.info("preparing %d volumes in %s%s", len(waiting), folder, earlier)
    with Progress(len(records), "prepare", "volume", done=done) as progress:
        if workers <= 1 or len(waiting) <= 1:
            for record in waiting:
                yield record.volume_id, prepare_one(record, folder, config, accept)
                progress.update()
            return
        # A fresh server forks workers that have imported only what preparing needs, and that hold
        # no lock of a thread of ours.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ctclip.data.cache"])
        with ProcessPoolExecutor(
            min(workers, len(waiting)), mp_context=context, initializer=_end_with_parent
        ) as pool:
            futures = {
                pool.submit(prepare_one, record, folder, config, accept): record.volume_id
                for record in waiting
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
                progress.update()


def _end_with_parent() -> None:
    """Let a worker end where its parent was killed; it would wait for its next scan for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        found = checked.look(
            record.path,
            accept=accept,
            rescale=record.rescale,
            spacing_mm=record.spacing_mm,
            series=record.series,
        )
        scan = found.volume
        for note in found.notes:
            if note.level == "info":
                continue
            is_held = note in found.held
            problems.append(
                Problem(
                    str(record.path),
                    "refused" if is_held else STATUS[note.level],
                    note.code,
                    f"{note.text}; {note.advice}" if is_held else note.text,
                    record.volume_id,
                )
            )
        if not found.held:
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


def summarise(
    records: Sequence[VolumeRecord], kept: Sequence[VolumeRecord], ledger: Sequence[Problem]
) -> dict[str, Any]:
    """Count what became of every input.

    An input is a volume, or a row or file that the ledger refuses before it names one. Each is
    counted once: ``used`` as it is, used and ``corrected`` (or warned about), or ``refused``.
    """
    volumes = {record.volume_id for record in kept}
    marked = {p.volume_id for p in ledger if p.status in ("corrected", "warned")} & volumes
    refused = {record.volume_id for record in records} - volumes
    for problem in ledger:
        if problem.status == "refused" and problem.volume_id not in volumes:
            refused.add(problem.volume_id or problem.path)
    words = sorted(
        len(text.split())
        for text in {r.study_id: report_text(r.findings, r.impression) for r in kept}.values()
        if text
    )
    return {
        "inputs": len(volumes) + len(refused),
        "volumes": len(volumes),
        "used": len(volumes - marked),
        "corrected": len(marked),
        "refused": len(refused),
        "studies": len({record.study_id for record in kept}),
        "patients": len({record.patient_id for record in kept}),
        "splits": dict(sorted(Counter(record.split for record in kept).items())),
        "reports": len(words),
        "words_per_report": {
            "median": words[len(words) // 2] if words else 0,
            "longest": words[-1] if words else 0,
        },
        "ledger": dict(sorted(Counter(f"{p.status}: {p.code}" for p in ledger).items())),
    }


def _in_words(folder: Path, summary: Mapping[str, Any]) -> list[str]:
    """What a user reads last."""
    used = summary["volumes"]
    splits = ", ".join(f"{number} {name}" for name, number in summary["splits"].items())
    words = summary["words_per_report"]
    reports = (
        f"{summary['reports']} reports of {words['median']} words in the median, "
        f"{words['longest']} at most"
    )
    lines = [
        f"{used} of {summary['inputs']} inputs are used ({summary['corrected']} of them with a "
        f"correction or warning), {summary['refused']} refused",
        f"{summary['patients']} patients, {summary['studies']} studies, {used} volumes ({splits}); "
        + (reports if summary["reports"] else "no reports, which training needs"),
    ]
    if summary["ledger"]:
        listed = ", ".join(f"{code} x {number}" for code, number in summary["ledger"].items())
        lines.append(f"{folder / 'ledger.csv'} has {listed}")
    return [*lines, f"prepared cohort: {folder}"]
