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


GOOD = ["p", "s", "a.nii.gz"]


@pytest.mark.parametrize(
    ("row", "code", "message"),
    [
        (["", "s", "b.nii.gz"], "no-id", "patient_id is empty"),
        (["p", "", "b.nii.gz"], "no-id", "study_id is empty"),
        (["p", "s", "../x.nii.gz"], "outside-root", "leads outside"),
        (["p", "s", "/etc/hostname"], "outside-root", "leads outside"),
        (["p", "s", "gone.nii.gz"], "missing-file", "no file at"),
        (["p", "s"], "malformed-row", "2 cells, the header has 3"),
        (["p", "s", "a.nii.gz", "x"], "malformed-row", "4 cells, the header has 3"),
    ],
)
def test_a_bad_row_goes_to_the_ledger_with_its_line_and_the_rest_goes_on(
    tmp_path, row, code, message
):
    records, problems = read_manifest(manifest(tmp_path, [GOOD, row]))
    assert [record.volume_id for record in records] == ["a"]
    (problem,) = [problem for problem in problems if problem.status == "refused"]
    assert problem.code == code
    assert problem.path == f"{tmp_path / 'm.csv'}:3"
    assert message in problem.detail


def test_every_bad_value_is_named_at_once(tmp_path):
    header = [*HEADER, "split", "Emphysema"]
    rows = [[*GOOD, "dev", 1], [*GOOD, "train", -1]]
    with pytest.raises(
        ManifestError, match=r"2 bad value\(s\)\n  line 2: split.*\n  line 3: label"
    ):
        read_manifest(manifest(tmp_path, rows, header))


def test_a_table_can_say_how_a_scan_is_read(tmp_path):
    header = [*HEADER, "series", "rescale_slope", "rescale_intercept", "spacing_mm"]
    row = [*GOOD, "1.2.840", 1, -1024, "1.5 0.7 0.7"]
    (record,), _ = read_manifest(manifest(tmp_path, [row], header))
    assert record.series == "1.2.840"
    assert record.rescale == (1.0, -1024.0)
    assert record.spacing_mm == (1.5, 0.7, 0.7)


@pytest.mark.parametrize(
    ("slope", "intercept", "spacing"),
    [(1, "", ""), (0, -1024, ""), ("x", 0, ""), ("", "", "1.5 0.7"), ("", "", "1 0 1")],
)
def test_an_impossible_number_refuses_its_row(tmp_path, slope, intercept, spacing):
    header = [*HEADER, "rescale_slope", "rescale_intercept", "spacing_mm"]
    path = manifest(tmp_path, [[*GOOD, slope, intercept, spacing]], header)
    records, problems = read_manifest(path)
    assert not records
    assert "bad-number" in {problem.code for problem in problems}


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


def test_the_same_row_twice_counts_once_and_a_contradiction_is_refused(tmp_path):
    header = [*HEADER, "Emphysema"]
    row = ["p", "s", "a.nii.gz", 1]
    records, problems = read_manifest(manifest(tmp_path, [row, row], header))
    assert len(records) == 1
    assert "repeated-row" in [problem.code for problem in problems]
    records, problems = read_manifest(manifest(tmp_path, [row, [*row[:3], 0]], header))
    assert not records
    (problem,) = [problem for problem in problems if problem.status == "refused"]
    assert (problem.code, problem.volume_id) == ("contradiction", "a")
    assert "lines 2, 3" in problem.detail


def test_a_volume_id_that_escapes_the_cache_is_refused(tmp_path):
    path = manifest(tmp_path, [["p", "s", "a.nii.gz", "../b"]], [*HEADER, "volume_id"])
    records, problems = read_manifest(path)
    assert not records
    assert ("unsafe-name", "") in {(problem.code, problem.volume_id) for problem in problems}


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
