"""Cohort hygiene: no patient in two splits, no scan under two names, no report on two patients."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctclip.data.manifest import VolumeRecord
from ctclip.data.problems import ManifestError, Problem
from ctclip.data.report import report_text

TEMPLATE_WORDS = 40
"""Shorter reports are often the same normal template; longer ones were copied or mixed up."""


def check_patients(records: Sequence[VolumeRecord]) -> None:
    """Refuse a cohort that leaks.

    Raises:
        ManifestError: If a patient is in two splits or a study belongs to two patients.
    """
    splits: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    patients: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        where = record.row or f"volume {record.volume_id}"
        splits[record.patient_id][record.split].append(where)
        patients[record.study_id][record.patient_id].append(where)
    leaks = sorted(patient for patient, names in splits.items() if len(names) > 1)
    if leaks:
        raise ManifestError(
            f"{len(leaks)} patient(s) are in more than one split, for example {leaks[0]!r} in "
            f"{_places(splits[leaks[0]])}; put all scans of a patient into one split"
        )
    shared = sorted(study for study, names in patients.items() if len(names) > 1)
    if shared:
        raise ManifestError(
            f"study {shared[0]!r} belongs to patients {_places(patients[shared[0]])}; "
            f"study ids must be unique ({len(shared)} such)"
        )


def _places(rows_of: Mapping[str, Sequence[str]]) -> str:
    """``test (m.csv:7), train (m.csv:2, m.csv:3, …)``: where a reader finds each."""
    shown = []
    for name, rows in sorted(rows_of.items()):
        more = ", …" if len(rows) > 3 else ""
        shown.append(f"{name} ({', '.join(rows[:3])}{more})")
    return ", ".join(shown)


def content_hash(hu: np.ndarray) -> str:
    """Hash of a scan's voxels in house orientation: the same however the file was written.

    Every second voxel per axis is hashed, which is what two different scans never share.
    """
    thinned = np.ascontiguousarray(hu[::2, ::2, ::2]).astype(np.float32)
    return hashlib.sha256(thinned.tobytes() + str(hu.shape).encode()).hexdigest()[:32]


def find_duplicates(
    records: Sequence[VolumeRecord], outcomes: Mapping[str, Mapping[str, Any]]
) -> tuple[list[VolumeRecord], list[Problem]]:
    """Drop scans that are another one's copy; list reports that several patients share.

    Args:
        records: Usable records.
        outcomes: Per volume id, its ``content`` hash.

    Returns:
        The records that stay (the first of each group of copies), and rows for the ledger.
    """
    kept, problems = [], []
    first: dict[str, VolumeRecord] = {}
    for record in records:
        original = first.setdefault(outcomes[record.volume_id]["content"], record)
        if original is record:
            kept.append(record)
            continue
        detail = (
            f"the same voxels as {original.volume_id} (patient {original.patient_id}, split "
            f"{original.split}); only that one is used"
        )
        problems.append(
            Problem(str(record.path), "refused", "duplicate-volume", detail, record.volume_id)
        )
    return kept, problems + _shared_reports(kept)


def _shared_reports(records: Sequence[VolumeRecord]) -> list[Problem]:
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        text = report_text(record.findings, record.impression).lower()
        if text:
            owners[text][record.patient_id] = record.study_id
    problems = []
    for text, patients in owners.items():
        if len(patients) > 1:
            words = len(text.split())
            studies = ", ".join(sorted(patients.values())[:5])
            problems.append(
                Problem(
                    studies,
                    "noted" if words < TEMPLATE_WORDS else "warned",
                    "shared-report",
                    f"{len(patients)} patients have the same report of {words} words",
                )
            )
    return problems
