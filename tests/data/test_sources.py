import csv
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from dicoms import write_series
from embedding_tables import random_table
from scans import chest_hu, cohort, save, write_csv

import ctclip
from ctclip import cli
from ctclip.data.cache import prepare
from ctclip.data.problems import ManifestError
from ctclip.data.sources import detect, read_source
from ctclip.data.table import OWN_RESULTS
from ctclip.data.volume import VolumeConfig
from ctclip.findings import FINDINGS

SMALL = VolumeConfig(spacing_mm=(10.0, 8.0, 8.0), size=(28, 32, 40))


def test_sources_are_recognised_by_their_content(tmp_path):
    manifest = cohort(tmp_path / "own", num=2)
    save(tmp_path / "rate/x/train_1_a_1.nii.gz")
    write_csv(tmp_path / "rate/r.csv", ["VolumeName", "Findings_EN"], [["train_1_a_1.nii.gz", "x"]])
    (tmp_path / "rad").mkdir()
    write_csv(tmp_path / "rad/l.csv", ["NoteAcc_DEID", "nodule*lung"], [["trn1", 0]])
    save(tmp_path / "files/a.nii.gz")
    write_series(tmp_path / "dicom", chest_hu((10, 12, 14)))
    assert detect(manifest) == detect(manifest.parent) == "manifest"
    assert detect(tmp_path / "files/a.nii.gz") == "files"
    names = {"rate": "ct-rate", "rad": "rad-chestct", "files": "files", "dicom": "dicom"}
    assert {name: detect(tmp_path / name) for name in names} == names


ROW = "patient_id,study_id,path,Emphysema\np1,s1,a.nii.gz,1\n"

UNKNOWN_TABLES = {
    "manifest.csv": {
        "line 3: byte 0xe9 is not UTF-8": f"{ROW}p2,s2,{chr(233)}.nii,0\n".encode("latin-1"),
        "not separated by commas, save": ROW.replace(",", ";").encode(),
        "unbalanced quote": f'{ROW}p2,s2,"b.nii,0\n'.encode(),
        "the file is empty": b"",
        "found patient, study, path": ROW.replace("_id", "").encode(),
    },
    "labels.tsv": {"not separated by commas, save": ROW.replace(",", "\t").encode()},
    "labels.xlsx": {"an Excel file; save the table as CSV": b"PK"},
    "labels.parquet": {"not a readable Parquet file": b"PAR1"},
}


@pytest.mark.parametrize(
    ("name", "reason"), [(name, reason) for name, bad in UNKNOWN_TABLES.items() for reason in bad]
)
@pytest.mark.parametrize("kind", ["files", "dicom"])
def test_a_table_that_can_not_be_used_is_never_passed_over(tmp_path, capsys, name, reason, kind):
    if kind == "files":
        save(tmp_path / "in/a.nii.gz")
    else:
        write_series(tmp_path / "in/a", chest_hu((24, 24, 32)))
    (tmp_path / "in" / name).write_bytes(UNKNOWN_TABLES[name][reason])
    with pytest.raises(SystemExit):
        cli.prepare([f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().err
    assert str(tmp_path / "in" / name) in said
    assert reason in said
    assert f"--kind {kind}" in said
    records, _ = read_source(tmp_path / "in", kind=kind)
    assert len(records) == 1


def test_what_ctclip_wrote_beside_scans_is_no_table_of_them(tmp_path):
    save(tmp_path / "a.nii.gz")
    for out in (tmp_path / "prepared", tmp_path / "again"):
        records, problems = read_source(tmp_path)
        assert [record.volume_id for record in records] == ["a"]
        prepared = prepare(records, out, SMALL, problems=problems)
    assert (prepared.path / "manifest.csv").is_file()
    random_table(4).save(tmp_path / "archive/volumes.parquet")
    (tmp_path / "results/zero_shot").mkdir(parents=True)
    (tmp_path / "results/zero_shot/auc.csv").write_text("finding,auroc\nEmphysema,0.9\n")
    assert detect(tmp_path) == "files"
    (tmp_path / "results/mine.csv").write_text("finding,auroc\nEmphysema,0.9\n")
    with pytest.raises(ManifestError, match=r"mine\.csv: header not recognised; found finding"):
        detect(tmp_path)


def test_every_table_of_results_is_known_as_our_own():
    package = Path(ctclip.__file__).parent
    written = set()
    for part in ("evaluation", "retrieval"):
        for module in (package / part).glob("*.py"):
            text = module.read_text(encoding="utf-8")
            written |= set(re.findall(r'/ "(\w+)\.csv"', text))
            written |= set(re.findall(r'tables\.setdefault\("(\w+)"', text))
    assert len(written) > 10
    assert written <= OWN_RESULTS


def test_a_manifest_may_be_parquet_in_its_folder(tmp_path):
    manifest = cohort(tmp_path, num=2)
    pandas.read_csv(manifest).to_parquet(tmp_path / "manifest.parquet")
    manifest.unlink()
    records, _ = read_source(tmp_path)
    assert [record.patient_id for record in records] == ["p0", "p1"]


def test_what_lies_beside_plain_scans_is_in_the_ledger(tmp_path):
    hu = save(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").mkdir()
    (tmp_path / "c.nii.gz").mkdir()
    save(tmp_path / "c.nii.gz/c.nii.gz", chest_hu(seed=1))
    (tmp_path / "pair.hdr").write_bytes(b"\0" * 348)
    (tmp_path / "readme.txt").write_text("x")
    for number in range(5):
        (tmp_path / f"sub/{number}.dcm").parent.mkdir(exist_ok=True)
        (tmp_path / f"sub/{number}.dcm").write_bytes(b"x")
    records, problems = read_source(tmp_path)
    assert hu in [record.path for record in records]
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)
    assert {record.volume_id for record in prepared.records} == {"a", "c"}
    with (prepared.path / "ledger.csv").open(encoding="utf-8") as file:
        rows = {(row["volume_id"], row["status"], row["code"]): row for row in csv.DictReader(file)}
    assert ("b", "refused", "directory") in rows
    assert any(volume == "pair.hdr" and status == "refused" for volume, status, _ in rows)
    dicoms = "5 .dcm file(s): sub/0.dcm, sub/1.dcm, sub/2.dcm, … (5 in all)"
    assert dicoms in rows["", "refused", "not-used"]["detail"]
    assert "1 .txt file(s): readme.txt" in rows["", "noted", "not-used"]["detail"]


def test_the_folder_of_bad_scans_is_accounted_for_in_full(test_data):
    bad = test_data / "data/bad/nifti"
    records, problems = read_source(bad)
    assert {record.path for record in records} == set(bad.iterdir())
    assert problems == []


def test_scans_beside_a_manifest_keep_its_labels(tmp_path):
    cohort(tmp_path, num=2)
    records, _ = read_source(tmp_path)
    assert records[1].labels[FINDINGS[0]] == 1
    (tmp_path / "copy.csv").write_bytes((tmp_path / "manifest.csv").read_bytes())
    with pytest.raises(ManifestError, match="expected one manifest"):
        read_source(tmp_path)


def test_plain_files_become_one_patient_each(tmp_path):
    save(tmp_path / "a.nii.gz")
    save(tmp_path / "deep/b.nii")
    records, _ = read_source(tmp_path)
    assert [r.volume_id for r in records] == ["a", "b"]
    assert [r.patient_id for r in records] == ["a", "b"]
    (single,), _ = read_source(tmp_path / "a.nii.gz")
    assert single.volume_id == "a"
    save(tmp_path / "other/a.nii.gz")
    with pytest.raises(ManifestError, match="same name"):
        read_source(tmp_path)


def test_a_dicom_archive_gives_the_best_series_of_each_study(tmp_path):
    hu = [chest_hu((24, 24, 32), seed=i) for i in range(3)]

    def study(number):
        def edit(_, dataset):
            dataset.StudyInstanceUID = f"1.9.{number}"
            dataset.PatientID = f"p{number}"

        return edit

    write_series(tmp_path / "one/long", hu[0], series="1.1", edit=study(1))
    write_series(tmp_path / "one/short", hu[1][:10], series="1.2", edit=study(1))
    write_series(tmp_path / "two", hu[2], series="1.3", edit=study(2))
    write_series(tmp_path / "three", hu[1][:4], series="1.4", edit=study(3))

    def scout(number, dataset):
        study(1)(number, dataset)
        dataset.ImageType = "ORIGINAL\\PRIMARY\\LOCALIZER"

    write_series(tmp_path / "one/scout", hu[1][:2], series="1.5", edit=scout)
    (tmp_path / "one/README").write_text("from the archive")
    records, problems = read_source(tmp_path)
    assert [(r.patient_id, r.study_id, r.volume_id) for r in records] == [
        ("p1", "1.9.1", "1.1"),
        ("p2", "1.9.2", "1.3"),
    ]
    left_out = {
        ("left-out", "other-series", "1.2"),
        ("refused", "no-axial-series", "1.4"),
        ("left-out", "localizer", ""),
        ("noted", "skipped-file", ""),
    }
    assert {(p.status, p.code, p.volume_id) for p in problems} == left_out
    assert {word for p in problems for word in ("1.5", "README") if word in p.detail} == {
        "1.5",
        "README",
    }
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)
    assert {r.volume_id for r in prepared.records} == {"1.1", "1.3"}
    chosen = [p for p in problems if p.code == "other-series"]
    with pytest.raises(ManifestError, match="1.1 is used"):
        prepare(records, tmp_path / "out", SMALL, problems=chosen, strict=True)


def test_dicom_folders_without_identifiers_are_kept_apart_and_warned_about(tmp_path):
    def anonymous(_, dataset):
        del dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.PatientID

    for number in (1, 2):
        hu = chest_hu((24, 24, 32), seed=number)
        write_series(tmp_path / f"{number}/CT", hu, series=f"1.{number}", edit=anonymous)
    records, problems = read_source(tmp_path)
    assert len({record.volume_id for record in records}) == 2
    assert len({record.patient_id for record in records}) == 2
    assert [problem.code for problem in problems] == ["no-patient-id", "no-patient-id"]
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)
    assert len(prepared.records) == 2


def test_several_series_in_one_folder_can_be_prepared(tmp_path):
    hu = chest_hu((24, 24, 32))
    write_series(tmp_path / "all", hu, series="1.1")
    write_series(tmp_path / "all", hu[:10], series="1.2", prefix="b")
    records, problems = read_source(tmp_path / "all")
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)
    assert prepared.read("1.1").shape == SMALL.size


def test_nothing_at_a_path_and_nothing_in_a_folder_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing at"):
        read_source(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    for make in (lambda: None, lambda: (tmp_path / "empty/notes.txt").write_text("x")):
        make()
        with pytest.raises(ManifestError) as error:
            read_source(tmp_path / "empty")
        for accepted in ("manifest", "CT-RATE", "RAD-ChestCT", "DICOM", ".nii.gz", ".nrrd", ".mha"):
            assert accepted in str(error.value)


def test_a_manifest_can_point_at_dicom_folders(tmp_path):
    write_series(tmp_path / "scan", chest_hu((24, 24, 32)))
    path = write_csv(
        tmp_path / "m.csv",
        ["patient_id", "study_id", "path", "split"],
        [["p", "s", "scan", "train"]],
    )
    records, problems = read_source(path)
    prepared = prepare(records, tmp_path / "out", SMALL, problems=problems)
    assert np.ptp(prepared.read("scan")) > 1000
