import math

import numpy as np
import pytest
from scans import chest_hu, write_csv

from ctclip.data import rad_chestct, volume
from ctclip.data.problems import ManifestError, VolumeError
from ctclip.findings import FINDINGS

ABNORMALITIES = sorted(
    {
        name
        for rule in rad_chestct._mapping()["located"].values()
        for names in rule.values()
        for name in names
    }
)
COLUMNS = [f"{a}*{place}" for a in ABNORMALITIES for place in ("aorta", "heart", "lung")]
COLUMNS += ["calcification*pulmonary_artery"]


def release(root, positive=()):
    hu = chest_hu()
    for name in ("trn00001", "val00001", "tst00001"):
        np.savez_compressed(root / f"{name}.npz", ct=hu[::-1])
    write_csv(
        root / "imgtrain_labels.csv",
        ["NoteAcc_DEID", *COLUMNS],
        [
            ["trn00001", *(int(column in positive) for column in COLUMNS)],
            ["val00001", *(0 for _ in COLUMNS)],
            ["tst00002", *(0 for _ in COLUMNS)],
        ],
    )
    write_csv(root / "metadata.csv", ["NoteAcc_DEID", "MRN_DEID"], [["trn00001", "patient 7"]])
    return root


def test_tables_that_are_not_recognised_are_named(tmp_path):
    release(tmp_path)
    write_csv(tmp_path / "doses.csv", ["name", "dose"], [["x", 1]])
    _, problems = rad_chestct.read_rad_chestct(tmp_path)
    (unused,) = [p for p in problems if p.code == "not-used"]
    assert unused.path.endswith("doses.csv")
    (tmp_path / "imgvalid_Labels.csv").write_text("NoteAcc_DEID;nodule*lung\nval00001;1\n")
    with pytest.raises(ManifestError, match=r"imgvalid_Labels\.csv: header not recognised"):
        rad_chestct.read_rad_chestct(tmp_path)


def test_volumes_run_from_head_to_feet_and_come_out_in_house_orientation(tmp_path):
    release(tmp_path)
    scan = volume.read(tmp_path / "trn00001.npz")
    assert np.array_equal(scan.hu, chest_hu())
    assert scan.spacing_mm == pytest.approx((0.8, 0.8, 0.8))


def test_records_carry_splits_patients_and_what_is_missing(tmp_path):
    records, problems = rad_chestct.read_rad_chestct(release(tmp_path))
    assert {r.volume_id: r.split for r in records} == {
        "trn00001": "train",
        "val00001": "valid",
        "tst00001": "test",
    }
    assert {r.patient_id for r in records} == {"patient 7", "val00001", "tst00001"}
    assert {(p.code, p.volume_id) for p in problems} == {
        ("missing-file", "tst00002"),
        ("no-labels", "tst00001"),
    }


def test_located_labels_tell_the_two_calcifications_apart(tmp_path):
    records, _ = rad_chestct.read_rad_chestct(release(tmp_path, {"calcification*heart"}))
    labels = next(r.labels for r in records if r.volume_id == "trn00001")
    assert labels["Coronary artery wall calcification"] == 1
    assert labels["Arterial wall calcification"] == 0
    assert set(labels) == set(FINDINGS)


@pytest.mark.parametrize(("variant", "num"), [("located", 18), ("16", 16), ("15", 15)])
def test_each_variant_annotates_its_number_of_findings(tmp_path, variant, num):
    records, _ = rad_chestct.read_rad_chestct(
        release(tmp_path, {"calcification*heart", "nodule*lung"}), variant
    )
    record = next(r for r in records if r.volume_id == "trn00001")
    assert sum(not math.isnan(value) for value in record.label_row()) == num
    assert record.labels["Lung nodule"] == 1
    assert record.labels["Arterial wall calcification"] == (variant != "located")


def test_every_mapping_names_findings_only():
    for rules in rad_chestct._mapping().values():
        assert set(rules) <= set(FINDINGS)


def test_a_label_that_is_not_0_or_1_is_named(tmp_path):
    release(tmp_path)
    rows = [["trn00001", *(2 for _ in COLUMNS)]]
    write_csv(tmp_path / "imgtrain_labels.csv", ["NoteAcc_DEID", *COLUMNS], rows)
    with pytest.raises(ManifestError, match=r"line 2: .* is '2'"):
        rad_chestct.read_rad_chestct(tmp_path)


def test_a_table_without_the_original_columns_is_refused(tmp_path):
    release(tmp_path)
    write_csv(tmp_path / "imgtrain_labels.csv", ["NoteAcc_DEID", "nodule*lung"], [["trn00001", 1]])
    with pytest.raises(ManifestError, match="is this the original table"):
        rad_chestct.read_rad_chestct(tmp_path)


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.zeros((4, 5), np.int16), "not-3d"),
        (np.zeros((9, 9, 9), complex), "not-scalar"),
        (np.zeros((0, 9, 9), np.int16), "bad-dimensions"),
        (np.zeros((340, 340, 340), np.int16), "inflation"),
    ],
)
def test_arrays_that_are_no_scan_are_refused_before_they_are_loaded(tmp_path, array, code):
    np.savez_compressed(tmp_path / "x.npz", ct=array)
    with pytest.raises(VolumeError) as error:
        volume.read(tmp_path / "x.npz")
    assert error.value.code == code


def test_damaged_and_foreign_archives_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", other=chest_hu())
    with pytest.raises(VolumeError, match="expected an array 'ct'"):
        volume.read(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "y.npz", ct=chest_hu())
    data = (tmp_path / "y.npz").read_bytes()
    (tmp_path / "y.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(VolumeError, match="corrupt-npz"):
        volume.read(tmp_path / "y.npz")
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    (tmp_path / "z.npz").write_bytes(flipped)
    with pytest.raises(VolumeError, match="corrupt-npz"):
        volume.read(tmp_path / "z.npz")
