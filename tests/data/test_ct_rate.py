import math

import numpy as np
import pytest
from scans import chest_hu, save, write_csv

from ctclip.data.cache import prepare
from ctclip.data.ct_rate import read_ct_rate
from ctclip.data.problems import ManifestError
from ctclip.data.volume import VolumeConfig
from ctclip.findings import FINDINGS

SMALL = VolumeConfig(spacing_mm=(10.0, 8.0, 8.0), size=(28, 32, 40))
NAMES = ("train_1_a_1", "train_1_a_2", "train_2_a_1", "valid_1_a_1")
REPORT = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]
METADATA = ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]


def release(root, *, fixed=True, offset=0):
    """CT-RATE's layout; the first release stores HU + offset."""
    for i, name in enumerate(NAMES):
        split = name.split("_")[0] + ("_fixed" if fixed else "")
        patient, study = "_".join(name.split("_")[:2]), "_".join(name.split("_")[:3])
        hu = chest_hu(seed=i) + np.int16(offset)
        save(root / f"dataset/{split}/{patient}/{study}/{name}.nii.gz", hu)
    tables = root / "dataset"
    write_csv(
        tables / "reports.csv",
        REPORT,
        [[f"{n}.nii.gz", "Cough.", "Not given.", f"Nodule {n}.", "nan"] for n in NAMES],
    )
    write_csv(
        tables / "labels.csv",
        ["VolumeName", *reversed(FINDINGS)],
        [[f"{n}.nii.gz", *([0] * 17), i % 2] for i, n in enumerate(NAMES)],
    )
    write_csv(
        tables / "metadata.csv",
        [*METADATA, "PatientSex", "PatientAge"],
        [[f"{n}.nii.gz", 1, -8192, "[5.0, 6.0]", 8.0, "M", "036Y"] for n in NAMES],
    )
    return root


def test_names_give_patients_studies_and_splits(tmp_path):
    records, problems = read_ct_rate(release(tmp_path))
    assert [r.volume_id for r in records] == sorted(NAMES)
    assert records[1].study_id == records[0].study_id == "train_1_a"
    assert records[0].patient_id == "train_1"
    assert [r.split for r in records] == ["train", "train", "train", "valid"]
    assert [p.code for p in problems if p.status != "noted"] == []


def test_sections_are_kept_apart_and_absences_are_not_text(tmp_path):
    records, _ = read_ct_rate(release(tmp_path))
    assert records[0].findings == "Nodule train_1_a_1."
    assert records[0].impression is None
    assert records[0].meta == {"clinical_information": "Cough.", "sex": "M", "age": "36"}


def test_labels_go_by_name_not_by_position(tmp_path):
    records, _ = read_ct_rate(release(tmp_path))
    assert [r.labels["Medical material"] for r in records] == [0, 1, 0, 1]
    assert all(r.labels["Interlobular septal thickening"] == 0 for r in records)


@pytest.mark.parametrize(("fixed", "offset"), [(True, 0), (False, 8192)])
def test_both_releases_give_the_same_hu_with_the_same_table(tmp_path, fixed, offset):
    records, problems = read_ct_rate(release(tmp_path, fixed=fixed, offset=offset))
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)
    reference, _ = read_ct_rate(release(tmp_path / "plain"))
    expected = prepare(reference, tmp_path / "expected", SMALL)
    for name in NAMES:
        assert np.array_equal(prepared.read(name), expected.read(name))


def test_hu_are_preferred_where_both_releases_are_present(tmp_path):
    release(tmp_path, fixed=False, offset=8192)
    records, problems = read_ct_rate(release(tmp_path, fixed=True))
    assert all("_fixed" in str(r.path) for r in records)
    assert [p.code for p in problems].count("second-copy") == 4


def test_labels_alone_are_enough_for_scores_and_training_is_warned_about(tmp_path, caplog):
    caplog.set_level("INFO", "ctclip")
    release(tmp_path)
    (tmp_path / "dataset/reports.csv").unlink()
    records, problems = read_ct_rate(tmp_path)
    assert [r.labels["Medical material"] for r in records] == [0, 1, 0, 1]
    (missing,) = [p for p in problems if p.code == "no-report"]
    assert (missing.status, missing.path) == ("warned", str(tmp_path))
    assert "training needs" in missing.detail
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)
    assert len(prepared.records) == 4
    assert "no reports, which training needs" in caplog.text
    (tmp_path / "dataset/labels.csv").unlink()
    with pytest.raises(ManifestError, match="4 CT-RATE volumes, 0 reports and labels of 0 volumes"):
        read_ct_rate(tmp_path)


@pytest.mark.parametrize(
    ("name", "header", "reason"),
    [
        ("train_predicted_labels.csv", ";".join(["VolumeName", *FINDINGS]), "separated by commas"),
        ("x.csv", ";".join(["VolumeName", *FINDINGS]), "separated by commas"),
        ("x.csv", "Volume,Findings_EN,Impressions_EN", "found Volume, Findings_EN"),
        ("valid_reports.csv", "VolumeName,Text", "found VolumeName, Text"),
        ("train_metadata.csv", "name,ZSpacing", "found name, ZSpacing"),
    ],
)
def test_a_table_that_was_meant_and_is_not_recognised_is_an_error(tmp_path, name, header, reason):
    release(tmp_path)
    cells = 1 + header.count(",")
    (tmp_path / name).write_text(f"{header}\n{','.join(['x'] * cells)}\n")
    with pytest.raises(ManifestError, match="header not recognised") as error:
        read_ct_rate(tmp_path)
    for part in (str(tmp_path / name), reason, "expected a CSV with VolumeName"):
        assert part in str(error.value)


def test_a_table_of_something_else_is_noted_as_not_used(tmp_path):
    release(tmp_path)
    write_csv(tmp_path / "doses.csv", ["VolumeName", "Dose"], [["train_1_a_1.nii.gz", 3]])
    write_csv(tmp_path / "people.csv", ["name", "smoker"], [["x", 1]])
    (tmp_path / "Attributes.xlsx").write_bytes(b"PK")
    records, problems = read_ct_rate(tmp_path)
    unused = [p for p in problems if p.code == "not-used"]
    assert {p.path.rsplit("/", 1)[1] for p in unused} == {"doses.csv", "people.csv"}
    prepare(records, tmp_path / "out", SMALL, problems=problems, strict=True)


def test_missing_partners_are_listed(tmp_path):
    release(tmp_path)
    next(tmp_path.rglob("train_2_a_1.nii.gz")).unlink()
    write_csv(
        tmp_path / "dataset/reports.csv",
        REPORT,
        [[f"{n}.nii.gz", "", "", "x", ""] for n in NAMES[1:]],
    )
    records, problems = read_ct_rate(tmp_path)
    listed = {(p.code, p.volume_id) for p in problems}
    assert ("missing-file", "train_2_a_1") in listed
    assert ("no-report", "train_1_a_1") in listed
    assert len(records) == 3


def test_volumes_listed_as_no_chest_are_refused(tmp_path):
    release(tmp_path)
    (tmp_path / "no_chest_valid.txt").write_text("valid_1_a_1.nii.gz\n")
    records, problems = read_ct_rate(tmp_path)
    assert "valid_1_a_1" not in {r.volume_id for r in records}
    assert [p.volume_id for p in problems if p.code == "listed-no-chest"] == ["valid_1_a_1"]


def test_the_tables_spacing_is_checked_against_the_file(tmp_path):
    release(tmp_path)
    write_csv(
        tmp_path / "dataset/metadata.csv",
        METADATA,
        [[f"{n}.nii.gz", 1, 0, "[5.0, 6.0]", 10.0] for n in NAMES],
    )
    records, _ = read_ct_rate(tmp_path)
    prepared = prepare(records, tmp_path / "out", SMALL)
    assert (prepared.path / "ledger.csv").read_text().count("spacing-conflict") == 4


@pytest.mark.parametrize(
    ("columns", "cells", "conflict"),
    [
        (["XYSpacing"], ["[5.0, 6.0]"], None),
        (["XYSpacing"], ["[5.0, 7.0]"], "8 x 6 x 5 mm (D x H x W), the table ? x 7 x 5 mm"),
        (["XYSpacing", "ZSpacing"], ["[5.0, 7.0]", ""], "the table ? x 7 x 5 mm"),
        (["ZSpacing"], [8.0], None),
        (["ZSpacing"], [10.0], "the table 10 x ? x ? mm"),
    ],
)
def test_half_a_spacing_is_compared_as_far_as_it_goes(tmp_path, columns, cells, conflict):
    release(tmp_path)
    write_csv(
        tmp_path / "dataset/metadata.csv",
        ["VolumeName", *columns],
        [[f"{n}.nii.gz", *cells] for n in NAMES],
    )
    records, problems = read_ct_rate(tmp_path)
    assert not [p for p in problems if p.code == "no-metadata"]
    prepared = prepare(records, tmp_path / "out", SMALL)
    ledger = (prepared.path / "ledger.csv").read_text()
    assert ledger.count("spacing-conflict") == (4 if conflict else 0)
    assert (conflict or "") in ledger
    done = sorted((prepared.path / "done").iterdir())
    stamps = [file.stat().st_mtime_ns for file in done]
    prepare(records, tmp_path / "out", SMALL)
    assert [file.stat().st_mtime_ns for file in done] == stamps


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([1, -1024, "[0.7, 0.7", 1.5], "XYSpacing"),
        ([1, -1024, "__import__('os')", 1.5], "XYSpacing"),
        ([1, -1024, "[0.7, 0.7]", 0], "spacing of 0"),
        ([0, -1024, "[0.7, 0.7]", 1.5], "RescaleSlope is 0"),
        (["x", -1024, "[0.7, 0.7]", 1.5], "not a number"),
        ([1, "inf", "[0.7, 0.7]", 1.5], "not a number"),
    ],
)
def test_a_bad_metadata_row_is_named_and_never_evaluated(tmp_path, cells, message):
    release(tmp_path)
    write_csv(tmp_path / "dataset/metadata.csv", METADATA, [["train_1_a_1.nii.gz", *cells]])
    records, problems = read_ct_rate(tmp_path)
    assert [r.volume_id for r in records] == sorted(NAMES[1:])
    (problem,) = [p for p in problems if p.status == "refused"]
    assert (problem.code, problem.volume_id) == ("bad-number", "train_1_a_1")
    assert problem.path.endswith("metadata.csv:2")
    assert message in problem.detail


def test_missing_metadata_cells_mean_not_known(tmp_path):
    release(tmp_path)
    write_csv(
        tmp_path / "dataset/metadata.csv",
        METADATA,
        [["train_1_a_1.nii.gz", 1, 0, "[5.0, 6.0]", "nan"], ["train_1_a_2.nii.gz", "", "", "", ""]],
    )
    records, problems = read_ct_rate(tmp_path)
    assert records[0].spacing_mm == (None, 6.0, 5.0)
    assert records[1].spacing_mm is None
    assert [p.volume_id for p in problems if p.code == "no-metadata"] == ["train_1_a_2"]


def test_a_folder_that_is_not_ct_rate_says_what_was_expected(tmp_path):
    with pytest.raises(ManifestError, match="expected names like train_1_a_1"):
        read_ct_rate(tmp_path)


def test_rows_and_tables_that_contradict_each_other_take_their_volume_out(tmp_path):
    release(tmp_path)
    for number, value in enumerate((0, 1)):
        write_csv(
            tmp_path / f"dataset/labels_{number}.csv",
            ["VolumeName", *FINDINGS],
            [["train_1_a_1.nii.gz", *([value] * 18)]],
        )
    write_csv(
        tmp_path / "dataset/reports.csv",
        REPORT,
        [["train_2_a_1.nii.gz", "", "", text, ""] for text in ("Nodule.", "No nodule.")],
    )
    records, problems = read_ct_rate(tmp_path)
    refused = {p.volume_id for p in problems if p.code == "contradiction"}
    assert refused == {"train_1_a_1", "train_2_a_1"}
    assert {r.volume_id for r in records} == set(NAMES) - refused


def test_a_path_in_place_of_a_name_is_refused(tmp_path):
    release(tmp_path)
    write_csv(tmp_path / "dataset/more.csv", REPORT, [["../../etc/x.nii.gz", "", "", "a", "b"]])
    _, problems = read_ct_rate(tmp_path)
    assert [p.path.rsplit("/", 1)[1] for p in problems if p.code == "unsafe-name"] == ["more.csv:2"]


def test_a_blank_label_is_not_known(tmp_path):
    release(tmp_path)
    write_csv(
        tmp_path / "dataset/labels.csv",
        ["VolumeName", *FINDINGS],
        [["train_1_a_1.nii.gz", *([""] * 18)]],
    )
    records, _ = read_ct_rate(tmp_path)
    assert all(math.isnan(value) for value in records[0].label_row())


def test_real_validation_reports_are_read(test_data):
    from ctclip.data.ct_rate import read_reports

    reports = read_reports(test_data / "data/real/reports/ctrate_valid_reports.csv", [])
    assert len(reports) > 33
    assert all(r.findings for r in reports.values())
    assert not any((r.impression or "").lower().startswith("not given") for r in reports.values())
