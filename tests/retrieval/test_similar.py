"""The command from question to files, on phantoms and on real scans."""

import csv
import json
from dataclasses import replace

import dicoms
import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from embedding_tables import random_table
from scipy import ndimage

from ctclip import checkpoint as checkpoints
from ctclip.data import volume
from ctclip.embeddings import EmbeddingTable, embed_voxels, space_of
from ctclip.evaluation.scanner import Scanner
from ctclip.findings import FINDINGS
from ctclip.retrieval import similar
from ctclip.retrieval.filters import Filter
from ctclip.retrieval.question import Background, compose
from ctclip.retrieval.search import MemoryArchive, Query


def test_a_study_gives_a_table_and_a_picture(archive, tmp_path):
    _, page = archive
    table = EmbeddingTable.load(page.table)
    hits = similar.run(
        similar.SimilarConfig(
            table=page.table, study=table.study_id[0], k=3, cohort=page.cohort, out=tmp_path
        )
    )

    with (tmp_path / "similar.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["study_id"] for row in rows] == [hit.study_id for hit in hits]
    assert table.patient_id[0] not in [hit.patient_id for hit in hits]
    picture = matplotlib.image.imread(tmp_path / "similar.png")
    assert picture.shape[0] > 300
    assert picture[..., :3].std() > 0.1


def test_scan_text_and_filter_are_asked_together(archive, tmp_path):
    folder, page = archive
    scan = next((folder / "phantom").rglob("phantom_00001*.nii.gz"))
    config = similar.SimilarConfig(
        table=page.table,
        reports=page.reports,
        scan=scan,
        k=2,
        out=tmp_path,
    )
    scorer = Scanner(checkpoints.load(folder / "model.safetensors"))

    assert similar.run(config, scorer)[0].volume_id.startswith("phantom_00001")
    with (tmp_path / "similar.csv").open(encoding="utf-8") as file:
        itself = next(csv.DictReader(file))
    assert itself["only_hit"] == itself["only_query"] == ""
    assert itself["excerpt"]
    with_text = replace(config, text="pleural effusion", where=Filter(sex="F"), k=10)
    assert all(hit.fields["sex"] == "F" for hit in similar.run(with_text, scorer))


def test_a_table_and_the_index_of_it_give_one_answer(archive, tmp_path):
    pytest.importorskip("pymilvus", reason="ctclip[retrieval] is not installed")
    from ctclip import cli

    folder, page = archive
    uri, model = tmp_path / "archive.db", folder / "model.safetensors"
    table = EmbeddingTable.load(page.table)
    question = ["--k=4", f"more=[{table.study_id[2]}]", f"less=[{table.study_id[5]}]"]
    question += ["--text=effusion", f"--ckpt={model}", f"--study={table.study_id[0]}"]
    cli.index(
        [
            "--action=build",
            f"--ckpt={model}",
            f"uri={uri}",
            f"table={page.table}",
            f"reports={page.reports}",
        ]
    )
    source = [f"--table={page.table}", f"--reports={page.reports}"]
    cli.similar([f"--index={uri}", f"--out={tmp_path / 'index'}", *question])
    cli.similar([*source, f"--out={tmp_path / 'table'}", *question])

    answers = [(tmp_path / kind / "similar.csv").read_text() for kind in ("index", "table")]
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 5


def test_a_withdrawal_takes_the_saved_results_that_show_the_patient(archive, tmp_path):
    pytest.importorskip("pymilvus", reason="ctclip[retrieval] is not installed")
    from ctclip import cli

    _, page = archive
    uri, state = tmp_path / "archive.db", tmp_path / "results"
    cli.index(["--action=build", f"uri={uri}", f"table={page.table}"])
    table = EmbeddingTable.load(page.table)
    patient, study, others = table.patient_id[3], table.study_id[3], table.study_id[5:8]
    state.mkdir()
    asked = {"study": None, "more": [], "less": []}
    for name, question, shown in [
        ("returned", asked, [others[0], study]),
        ("asked", asked | {"study": study}, []),
        ("less", asked | {"less": [study]}, [others[1]]),
        ("kept", asked | {"study": others[2]}, others[:2]),
    ]:
        result = {"question": question, "hits": [{"study": name} for name in shown]}
        (state / f"{name}.json").write_text(json.dumps(result))

    cli.index(["--action=withdraw", f"uri={uri}", f"patients=[{patient}]", f"state={state}"])

    assert [path.name for path in state.iterdir()] == ["kept.json"]


def test_what_can_not_be_asked_is_refused(archive):
    folder, page = archive
    with pytest.raises(ValueError, match="nothing to search for"):
        similar.SimilarConfig(table=page.table)
    with pytest.raises(ValueError, match="give the checkpoint"):
        similar.run(similar.SimilarConfig(table=page.table, text="effusion"))
    with pytest.raises(ValueError, match="either the table"):
        similar.SimilarConfig(study="x")
    with pytest.raises(FileNotFoundError, match="ctclip-embed"):
        similar.run(similar.SimilarConfig(table=folder / "no.parquet", study="x"))


def test_a_hit_no_better_than_a_random_pair_is_marked():
    table = random_table(400, width=64, volumes_per_patient=1)
    table.vectors[1] = table.vectors[0] + 0.1 * table.vectors[2]
    table.vectors[1] /= np.linalg.norm(table.vectors[1])
    background = Background.of(table)
    query = compose([Query(vector=table.vectors[0])], [], None, background)

    hits = MemoryArchive(table).search(query, k=400)

    marks = [hit.is_ordinary for hit in hits]
    assert hits[1].volume_id == table.volume_id[1]
    assert not marks[0]
    assert not marks[1]
    assert np.mean(marks) == pytest.approx(0.95, abs=0.04)


def test_a_mixed_query_marks_about_as_many_as_its_parts():
    table = random_table(2000, width=64, volumes_per_patient=1)
    reports = replace(random_table(2000, width=64, volumes_per_patient=1, seed=1), kind="report")
    background = Background.of(table, reports)
    like = Query(vector=table.vectors[0])
    text = Query(
        vector=reports.vectors[5],
        ordinary=background.text_ordinary,
        expected=background.text_mean,
        spread=background.text_spread,
    )
    query = compose([like], [], text, background, text_weight=0.5)

    marks = [hit.is_ordinary for hit in MemoryArchive(table).search(query, k=2000)]

    assert np.mean(marks) == pytest.approx(0.95, abs=0.03)


def turned(source, target):
    """The same anatomy with axes permuted and flipped."""
    image = nib.load(source)
    flip = nib.orientations.axcodes2ornt(("P", "S", "R"))
    here = nib.orientations.io_orientation(image.affine)
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(here, flip)), target)


def resampled(source, target):
    """The same anatomy on another grid."""
    image = nib.load(source)
    factors = (0.8, 0.8, 0.9)
    data = ndimage.zoom(np.asanyarray(image.dataobj).astype(np.float32), factors, order=1)
    scale = np.array(image.shape) / data.shape
    affine = image.affine @ np.diag([*scale, 1])
    affine[:3, 3] = image.affine[:3, :3] @ (scale / 2 - 0.5) + image.affine[:3, 3]
    nib.save(nib.Nifti1Image(data.round().astype(np.int16), affine), target)


def as_dicom(source, target):
    """The same anatomy as a DICOM series."""
    scan = volume.read(source)
    step, row_mm, column_mm = scan.spacing_mm

    def edit(_, dataset):
        dataset.PixelSpacing = [row_mm, column_mm]
        dataset.SliceThickness = step

    target.mkdir()
    hu = np.asarray(scan.hu).round().astype(np.int16)
    dicoms.write_series(target, hu, height=lambda slice_: step * slice_, edit=edit)


@pytest.mark.slow
@pytest.mark.parametrize("change", [turned, resampled, as_dicom])
def test_a_real_scan_finds_itself_first_after_it_was_changed(archive, test_data, tmp_path, change):
    folder, _ = archive
    checkpoint = checkpoints.load(folder / "model.safetensors")
    names = ["lung1_001", "lung1_002", "lidc_0002_part", "lidc_0003_part", "4dlung_113_native"]
    paths = {name: test_data / f"data/real/volumes/{name}.nii.gz" for name in names}

    def embed(path):
        hu = volume.preprocess(volume.read(path), checkpoint.volume_config)
        return embed_voxels(checkpoint, hu)[1]

    table = EmbeddingTable(
        volume_id=names,
        study_id=names,
        patient_id=names,
        split=["test"] * len(names),
        vectors=np.stack([embed(path) for path in paths.values()]),
        labels=np.full((len(names), len(FINDINGS)), np.nan, dtype=np.float32),
        provenance=space_of(checkpoint),
    )
    changed = tmp_path / ("series" if change is as_dicom else "changed.nii.gz")
    change(paths["lung1_002"], changed)

    hits = MemoryArchive(table).search(Query(vector=embed(changed)))

    assert hits[0].study_id == "lung1_002"
    assert hits[0].similarity > 0.99
