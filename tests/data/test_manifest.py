import math

import pytest
from scans import cohort, save, write_csv

from ctclip.data.manifest import read_manifest, split_of, volume_stem, write_manifest
from ctclip.data.problems import ManifestError

HEADER = ["patient_id", "study_id", "path"]


def manifest(tmp_path, rows, header=None):
    save(tmp_path / "a.nii.gz")
    return write_csv(tmp_path / "m.csv", header or HEADER, rows)


def test_a_minimal_table_is_enough(tmp_path):
    records, problems = read_manifest(manifest(tmp_path, [["p", "s", "a.nii.gz"]]))
    (record,) = records
    assert (record.volume_id, record.path) == ("a", tmp_path / "a.nii.gz")
    assert record.split == split_of("p")
    assert [problem.code for problem in problems] == ["split-assigned"]
    assert all(math.isnan(value) for value in record.label_row())


def test_labels_are_joined_by_name_and_have_three_states(tmp_path):
    header = [*HEADER, "Emphysema", "Cardiomegaly", "Atelectasis"]
    path = manifest(tmp_path, [["p", "s", "a.nii.gz", 1, 0, ""]], header)
    (record,), _ = read_manifest(path)
    assert record.labels["Emphysema"] == 1
    assert record.labels["Cardiomegaly"] == 0
    assert math.isnan(record.labels["Atelectasis"])


@pytest.mark.parametrize("value", ["2", "-1", "yes", "0.5", "nan"])
def test_a_label_that_is_neither_is_an_error_with_its_line(tmp_path, value):
    path = manifest(tmp_path, [["p", "s", "a.nii.gz", value]], [*HEADER, "Emphysema"])
    with pytest.raises(ManifestError, match=f"line 2: label 'Emphysema' is '{value}'"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["", "s", "a.nii.gz"], "line 2: patient_id is empty"),
        (["p", "", "a.nii.gz"], "line 2: study_id is empty"),
        (["p", "s", "../x.nii.gz"], "leads outside"),
        (["p", "s", "/etc/hostname"], "leads outside"),
    ],
)
def test_a_bad_row_stops_with_its_line(tmp_path, row, message):
    with pytest.raises(ManifestError, match=message):
        read_manifest(manifest(tmp_path, [row]))


def test_every_bad_row_is_named_at_once(tmp_path):
    with pytest.raises(ManifestError, match=r"2 bad row\(s\)\n  line 2.*\n  line 3"):
        read_manifest(manifest(tmp_path, [["", "s", "a.nii.gz"], ["p", "", "a.nii.gz"]]))


def test_an_unknown_column_is_refused_and_a_meta_column_kept(tmp_path):
    with pytest.raises(ManifestError, match="unknown column 'colour'"):
        read_manifest(manifest(tmp_path, [["p", "s", "a.nii.gz", "x"]], [*HEADER, "colour"]))
    path = manifest(
        tmp_path, [["p", "s", "a.nii.gz", "x", "B30"]], [*HEADER, "meta_colour", "kernel"]
    )
    (record,), _ = read_manifest(path)
    assert record.meta == {"colour": "x", "kernel": "B30"}


def test_a_missing_file_is_left_out_and_reported(tmp_path):
    path = manifest(tmp_path, [["p", "s", "a.nii.gz"], ["q", "t", "gone.nii.gz"]])
    records, problems = read_manifest(path)
    assert [record.volume_id for record in records] == ["a"]
    assert [(p.code, p.volume_id) for p in problems if p.status == "refused"] == [
        ("missing-file", "gone")
    ]


def test_the_same_row_twice_counts_once_and_a_contradiction_is_an_error(tmp_path):
    header = [*HEADER, "Emphysema"]
    row = ["p", "s", "a.nii.gz", 1]
    records, problems = read_manifest(manifest(tmp_path, [row, row], header))
    assert len(records) == 1
    assert "repeated-row" in [problem.code for problem in problems]
    with pytest.raises(ManifestError, match="two rows that differ"):
        read_manifest(manifest(tmp_path, [row, ["p", "s", "a.nii.gz", 0]], header))


def test_a_volume_id_that_escapes_the_cache_is_refused(tmp_path):
    path = manifest(tmp_path, [["p", "s", "a.nii.gz", "../b"]], [*HEADER, "volume_id"])
    with pytest.raises(ManifestError, match="can't name a file"):
        read_manifest(path)


def test_a_written_manifest_reads_back_the_same(tmp_path):
    records, _ = read_manifest(cohort(tmp_path))
    write_manifest(records, tmp_path / "again.csv")
    again, problems = read_manifest(tmp_path / "again.csv")
    assert again == records
    assert not problems


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a/b/train_1_a_1.nii.gz", "train_1_a_1"),
        ("c.nii", "c"),
        ("x.y.mha", "x.y"),
        ("folder", "folder"),
    ],
)
def test_a_volumes_id_is_its_name_without_suffix(name, stem):
    assert volume_stem(name) == stem


def test_splits_by_hash_are_about_80_10_10():
    names = [split_of(f"patient {i}") for i in range(2000)]
    assert 0.77 < names.count("train") / 2000 < 0.83
    assert 0.08 < names.count("test") / 2000 < 0.12
