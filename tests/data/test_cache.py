import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from scans import chest_hu, cohort, save

from ctclip.data import volume
from ctclip.data.cache import CorruptVolumeError, PreparedCohort, prepare
from ctclip.data.manifest import read_manifest
from ctclip.data.problems import ManifestError
from ctclip.data.volume import VolumeConfig

SMALL = VolumeConfig(spacing_mm=(10.0, 8.0, 8.0), size=(28, 32, 40))


def ledger(prepared):
    with (prepared.path / "ledger.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["status"] != "noted"]


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_prepared_volumes_are_what_preprocessing_gives(tmp_path):
    records, problems = read_manifest(cohort(tmp_path))
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)

    assert prepared.fingerprint == SMALL.fingerprint()
    assert prepared.volume_config == SMALL
    assert [record.volume_id for record in prepared.records] == [r.volume_id for r in records]
    assert prepared.records[3].labels == records[3].labels
    assert prepared.records[3].findings == "nodule number 3."
    assert prepared.records[3].meta == {"sex": "F"}
    expected = volume.preprocess(volume.read(records[2].path), SMALL)
    assert np.array_equal(prepared.read("v2"), expected)
    crop = prepared.read_crop("v2", (3, 4, 5), (10, 12, 14))
    assert np.array_equal(crop, expected[3:13, 4:16, 5:19])
    assert ledger(prepared) == []


def test_two_processes_write_the_same_bytes_as_one(tmp_path):
    records, problems = read_manifest(cohort(tmp_path))
    one = prepare(records, tmp_path / "one", SMALL, problems=problems)
    two = prepare(records, tmp_path / "two", SMALL, problems=problems, workers=2)
    assert files_of(one.path) == files_of(two.path)


def test_a_second_run_does_nothing_and_a_changed_scan_is_done_again(tmp_path):
    records, _ = read_manifest(cohort(tmp_path))
    first = prepare(records, tmp_path / "out", SMALL)
    stamps = {f: f.stat().st_mtime_ns for f in (first.path / "volumes").iterdir()}
    prepare(records, tmp_path / "out", SMALL)
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    save(records[0].path, chest_hu(seed=99))
    again = prepare(records, tmp_path / "out", SMALL)
    changed = [f.name for f in stamps if f.stat().st_mtime_ns != stamps[f]]
    assert changed == ["v0.b2nd"]
    expected = volume.preprocess(volume.read(records[0].path), SMALL)
    assert np.array_equal(again.read("v0"), expected)


def test_a_refused_scan_is_in_the_ledger_and_in_no_split(tmp_path):
    manifest = cohort(tmp_path)
    (tmp_path / "scans/v1.nii.gz").write_bytes(b"not a scan")
    save(tmp_path / "scans/v4.nii.gz", chest_hu() + np.int16(1024))
    records, problems = read_manifest(manifest)
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)
    rows = [(row["volume_id"], row["status"], row["code"]) for row in ledger(prepared)]
    assert rows == [("v1", "refused", "not-nifti"), ("v4", "refused", "hu-offset")]
    assert {r.volume_id for r in prepared.records} == {"v0", "v2", "v3", "v5"}
    with pytest.raises(FileNotFoundError, match=r"ledger\.csv"):
        prepared.read("v1")
    summary = json.loads((prepared.path / "summary.json").read_text())
    assert summary["inputs"] == 6
    assert summary["volumes"] == summary["used"] == 4
    assert summary["refused"] == 2
    assert summary["ledger"]["refused: hu-offset"] == 1


def test_every_input_is_counted_once_as_used_corrected_or_refused(tmp_path, caplog):
    caplog.set_level("INFO", "ctclip")
    manifest = cohort(tmp_path, num=6)
    (tmp_path / "scans/v1.nii.gz").write_bytes(b"not a scan")
    plain = save(tmp_path / "scans/v2.nii", chest_hu(seed=2)).read_bytes()
    (tmp_path / "scans/v2.nii.gz").write_bytes(plain)  # read, with a warning
    save(tmp_path / "scans/v3.nii.gz", chest_hu(seed=0))  # the same voxels as v0
    (tmp_path / "scans/v4.nii.gz").unlink()
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines, lines[1], "p9,s9,broken", ""]))
    records, problems = read_manifest(manifest)
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)

    summary = json.loads((prepared.path / "summary.json").read_text())
    assert {r.volume_id for r in prepared.records} == {"v0", "v2", "v5"}
    # v5 as it is; v0 whose row stands twice and v2 with a warning; v1, v3, v4 and the broken row.
    assert [summary[key] for key in ("inputs", "used", "corrected", "refused")] == [7, 1, 2, 4]
    assert summary["inputs"] == summary["used"] + summary["corrected"] + summary["refused"]
    with (prepared.path / "ledger.csv").open() as file:
        assert sum(summary["ledger"].values()) == len(list(csv.DictReader(file)))
    assert "3 of 7 inputs are used (2 of them with a correction or warning), 4 refused" in (
        caplog.text
    )


def test_how_a_scan_was_stored_is_noted_and_no_worry(tmp_path):
    manifest = cohort(tmp_path, num=2)
    save(tmp_path / "scans/v0.nii.gz", chest_hu(seed=0), axes="LAS")
    save(tmp_path / "scans/v1.nii.gz", chest_hu(seed=1), axes="RAS")
    records, problems = read_manifest(manifest)
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems, strict=True)
    rows = (prepared.path / "ledger.csv").read_text()
    assert "v0,noted,left-handed," in rows
    assert "v1," not in rows


def test_the_user_can_say_how_to_read_a_held_scan(tmp_path):
    manifest = cohort(tmp_path, num=4)
    save(tmp_path / "scans/v1.nii.gz", chest_hu(seed=1) + np.int16(1024))
    records, _ = read_manifest(manifest)
    told = [replace(record, rescale=(1.0, -1024.0)) for record in records]
    prepared = prepare(told, tmp_path / "out", SMALL)
    assert len(prepared.records) == 4
    assert prepared.read("v1").min() < -900
    assert (np.abs(prepared.read("v0").astype(int)) <= 1024).all()


def test_strict_makes_any_ledger_row_an_error(tmp_path):
    manifest = cohort(tmp_path)
    (tmp_path / "scans/v1.nii.gz").write_bytes(b"not a scan")
    records, problems = read_manifest(manifest)
    with pytest.raises(ManifestError, match="--strict allows none"):
        prepare(records, tmp_path / "out", SMALL, problems=problems, strict=True)


def test_nothing_usable_is_an_error(tmp_path):
    manifest = cohort(tmp_path, num=2)
    for file in (tmp_path / "scans").iterdir():
        file.write_bytes(b"")
    records, _ = read_manifest(manifest)
    with pytest.raises(ManifestError, match="no usable volume"):
        prepare(records, tmp_path / "out", SMALL)


def test_a_damaged_cache_file_is_noticed_on_reading(tmp_path):
    records, _ = read_manifest(cohort(tmp_path))
    prepared = prepare(records, tmp_path / "out", SMALL)
    file = prepared.path / "volumes/v0.b2nd"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptVolumeError, match="damaged"):
        prepared.read("v0")


def test_a_crop_of_a_damaged_file_is_noticed_where_it_touches_the_damage(tmp_path):
    records, _ = read_manifest(cohort(tmp_path, num=2))
    large = VolumeConfig(spacing_mm=(2.5, 2.0, 2.0), size=(96, 96, 96))
    prepared = prepare(records, tmp_path / "out", large)
    whole = prepared.read("v0")
    file = prepared.path / "volumes/v0.b2nd"
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 1  # in the first of two chunks
    file.write_bytes(data)
    with pytest.raises(CorruptVolumeError, match="damaged-cache"):
        prepared.read_crop("v0", (0, 0, 0), (8, 8, 8))
    assert np.array_equal(prepared.read_crop("v0", (60, 5, 5), (8, 8, 8)), whole[60:68, 5:13, 5:13])
    file.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(CorruptVolumeError, match="damaged-cache"):
        prepared.read_crop("v0", (60, 5, 5), (8, 8, 8))
    file.unlink()
    for read in (prepared.read, lambda name: prepared.read_crop(name, (0, 0, 0), (8, 8, 8))):
        with pytest.raises(CorruptVolumeError, match="missing-cache"):
            read("v0")


def test_a_patient_in_two_splits_is_an_error(tmp_path):
    records, _ = read_manifest(cohort(tmp_path))
    leaking = [replace(r, row="") for r in (*records[:3], replace(records[3], patient_id="p0"))]
    with pytest.raises(ManifestError, match=r"'p0' in test \(volume v3\), train \(volume v0\)"):
        prepare(leaking, tmp_path / "out", SMALL)


def test_a_patient_in_two_splits_and_a_study_of_two_patients_are_named_with_their_lines(tmp_path):
    manifest = cohort(tmp_path, num=5)  # of the splits train, train, valid, test, train
    lines = manifest.read_text().splitlines()

    def refused(*changes):
        changed = "\n".join(lines)
        for old, new in changes:
            changed = changed.replace(old, new)
        manifest.write_text(changed + "\n")
        records, problems = read_manifest(manifest)
        with pytest.raises(ManifestError) as error:
            prepare(records, tmp_path / "out", SMALL, problems=problems)
        return str(error.value)

    leak = refused(("p2,", "p0,"), ("p3,", "p0,"), ("p4,", "p0,"))
    m = str(manifest)
    assert "1 patient(s) are in more than one split, for example 'p0' in " in leak
    assert f"test ({m}:5), train ({m}:2, {m}:6), valid ({m}:4)" in leak
    assert f"'s0' belongs to patients p0 ({m}:2), p1 ({m}:3)" in refused((",s1,", ",s0,"))


def test_one_scan_under_two_names_is_used_once_however_it_is_stored(tmp_path):
    manifest = cohort(tmp_path)
    save(tmp_path / "scans/v3.nii.gz", chest_hu(seed=0), axes="RAS")
    records, _ = read_manifest(manifest)
    prepared = prepare(records, tmp_path / "out", SMALL)
    assert [(row["volume_id"], row["code"]) for row in ledger(prepared)] == [
        ("v3", "duplicate-volume")
    ]
    assert "v3" not in {record.volume_id for record in prepared.records}


def test_a_long_report_on_two_patients_is_listed(tmp_path):
    records, _ = read_manifest(cohort(tmp_path))
    long = " ".join(f"Sentence {i} of a long report." for i in range(12))
    shared = [replace(r, findings=long, impression=None) for r in records[:2]] + records[2:]
    prepared = prepare(shared, tmp_path / "out", SMALL)
    assert [row["code"] for row in ledger(prepared)] == ["shared-report"]


def test_opening_finds_the_only_cohort_and_asks_when_there_are_two(tmp_path):
    records, _ = read_manifest(cohort(tmp_path))
    with pytest.raises(FileNotFoundError, match="run ctclip-prepare"):
        PreparedCohort.open(tmp_path / "out")
    first = prepare(records, tmp_path / "out", SMALL)
    assert PreparedCohort.open(tmp_path / "out") == first
    prepare(records, tmp_path / "out", replace(SMALL, size=(28, 32, 48)))
    with pytest.raises(ValueError, match="several prepared cohorts"):
        PreparedCohort.open(tmp_path / "out")


def test_a_cohort_of_another_preprocessing_is_not_opened(tmp_path):
    records, _ = read_manifest(cohort(tmp_path, num=2))
    prepared = prepare(records, tmp_path / "out", SMALL)
    recipe = prepared.path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("antialias: true", "antialias: false"))
    with pytest.raises(ValueError, match="another version of the preprocessing"):
        PreparedCohort.open(prepared.path)


def test_an_empty_split_is_named(tmp_path):
    records, _ = read_manifest(cohort(tmp_path, num=2))
    prepared = prepare(records, tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="no volume in split 'test'; it has train"):
        prepared.split("test")
