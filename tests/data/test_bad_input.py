"""Every defect gets its reaction: refused, used with a warning, or used; never a traceback."""

import csv

import numpy as np
import pytest
from bad_scans import CASES, HU, write
from scans import cohort, save, write_csv

from ctclip.data import ct_rate, volume
from ctclip.data.cache import prepare
from ctclip.data.manifest import VolumeRecord, read_manifest
from ctclip.data.problems import ManifestError, Problem, VolumeError
from ctclip.data.volume import VolumeConfig

SMALL = VolumeConfig(spacing_mm=(10.0, 8.0, 8.0), size=(28, 32, 40))

HELD = {"8-bit", "normalised", "hu-offset", "not-hu"}
"""Kept out of a cohort until the user decides: a warning about the file, not a broken file."""


def reaction(rows):
    """What the ledger says about one input, in the words of the expectation table."""
    if any(row["status"] == "refused" and row["code"] not in HELD for row in rows):
        return "error"
    return "warn" if rows else "tolerate"


def ledger(prepared):
    with (prepared.path / "ledger.csv").open(encoding="utf-8") as file:
        return [
            row
            for row in csv.DictReader(file)
            if row["status"] != "noted" and row["code"] != "duplicate-volume"
        ]


@pytest.mark.parametrize("name", CASES)
def test_each_made_defect_gets_its_reaction_and_reason(tmp_path, name):
    _, _, expected, code = CASES[name]
    path = write(tmp_path, name)
    if expected == "error":
        with pytest.raises(VolumeError) as error:
            volume.read(path)
        assert error.value.code == code
        assert str(path) in str(error.value)
        if code in ("truncated", "corrupt-gzip", "empty-file"):
            assert "again" in error.value.detail
        return
    scan = volume.read(path)
    assert [note.code for note in scan.warnings()] == ([code] if code else [])
    assert scan.hu.ndim == 3
    assert np.isfinite(volume.preprocess(scan, SMALL)).all()


@pytest.mark.parametrize(
    "name",
    [
        "good",
        "int32",
        "float64",
        "big-endian",
        "NIfTI-2",
        "header scaling",
        "one time point",
        "slope 0 with intercept",
        "two gzip members",
        "wrong-name",
        "metres",
        "no forms",
    ],
)
def test_unusual_but_intact_files_give_the_very_same_voxels(tmp_path, name):
    name = "plain file named .gz" if name == "wrong-name" else name
    assert np.array_equal(volume.read(write(tmp_path, name)).hu, HU)


def test_a_cohort_full_of_defects_is_prepared_without_a_traceback(tmp_path):
    records = [
        VolumeRecord(
            volume_id=f"case {i}",
            study_id=f"s{i}",
            patient_id=f"p{i}",
            split="train",
            path=write(tmp_path / str(i), name),
        )
        for i, name in enumerate(CASES)
    ]
    prepared = prepare(records, tmp_path / "out", SMALL, workers=2)
    rows = ledger(prepared)
    for i, (name, (_, _, expected, _)) in enumerate(CASES.items()):
        own = [row for row in rows if row["volume_id"] == f"case {i}"]
        assert reaction(own) == expected, name
    refused = {row["volume_id"] for row in rows if row["status"] == "refused"}
    assert not refused & {record.volume_id for record in prepared.records}


def test_the_folder_of_bad_scans_gets_the_expected_reactions(test_data, tmp_path):
    bad = test_data / "data/bad"
    with (bad / "EXPECT.csv").open(encoding="utf-8") as file:
        cases = [row for row in csv.DictReader(file) if not row["file"].startswith("csv/")]
    records = [
        VolumeRecord(
            volume_id=f"{i:03d}",
            study_id=f"s{i}",
            patient_id=f"p{i}",
            split="train",
            path=bad / case["file"],
        )
        for i, case in enumerate(cases)
    ]
    prepared = prepare(records, tmp_path / "out", SMALL, workers=2)
    rows = ledger(prepared)
    found = {
        case["file"]: reaction([row for row in rows if row["volume_id"] == f"{i:03d}"])
        for i, case in enumerate(cases)
    }
    assert found == {case["file"]: case["expect"] for case in cases}


def test_the_folder_of_bad_tables_gets_the_expected_reactions(test_data, tmp_path):
    bad = test_data / "data/bad"
    save(tmp_path / "valid_1_a_1.nii.gz")
    found, expected = {}, {}
    with (bad / "EXPECT.csv").open(encoding="utf-8") as file:
        cases = [row for row in csv.DictReader(file) if row["file"].startswith("csv/")]
    for case in cases:
        name = case["file"]
        expected[name] = case["expect"]
        reader = ct_rate.read_reports
        if "labels" in name or "header_only" in name:
            reader = ct_rate.read_labels
        elif "metadata" in name:
            reader = ct_rate.read_metadata
        problems: list[Problem] = []
        try:
            content = reader(bad / name, problems)
        except ManifestError:
            found[name] = "error"
            continue
        if "not_on_disk" in name:
            # Only beside volumes can a table miss one.
            root = tmp_path / "root"
            save(root / "valid_1_a_1.nii.gz")
            (root / "reports.csv").write_bytes((bad / name).read_bytes())
            problems += ct_rate.read_ct_rate(root)[1]
        assert content is not None
        refused = {problem.code for problem in problems if problem.status == "refused"}
        worrying = [problem for problem in problems if problem.status != "noted"]
        found[name] = "warn" if worrying else "tolerate"
        if refused - {"missing-file"}:  # a report without a scan: the scan is what is missing
            found[name] = "error"
    assert found == expected


def test_the_word_nan_never_becomes_a_report(tmp_path):
    path = write_csv(
        tmp_path / "r.csv",
        ["VolumeName", "Findings_EN", "Impressions_EN"],
        [["a.nii.gz", "nan", "NaN"], ["b.nii.gz", "Not given.", ""]],
    )
    reports = ct_rate.read_reports(path, problems := [])
    assert all(r.findings is None and r.impression is None for r in reports.values())
    assert [problem.code for problem in problems if problem.status == "warned"] == [
        "empty-report",
        "empty-report",
    ]


def test_strict_turns_a_mere_warning_into_an_error(tmp_path):
    manifest = cohort(tmp_path, num=2)
    (tmp_path / "scans/v0.nii.gz").write_bytes(CASES["no forms"][1]())
    records, problems = read_manifest(manifest)
    assert len(prepare(records, tmp_path / "out", SMALL, problems=problems).records) == 2
    with pytest.raises(ManifestError, match="--strict"):
        prepare(records, tmp_path / "out", SMALL, problems=problems, strict=True)
