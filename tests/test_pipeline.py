"""The whole path, by the commands a user types: phantoms in, scores and similar cases out."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ctclip
from ctclip import cli
from ctclip.evaluation.scores import ScoreTable
from ctclip.findings import FINDINGS

TINY_MODEL = [
    "model.embed_dim=32",
    "model.vision={size: tiny, width: 32, depth: 1, heads: 2, patch: [8, 16, 16]}",
    "model.text={name_or_path: null, width: 32, layers: 1, heads: 2, pooling: mean}",
    "text_warmup.steps=4",
    "text_warmup.batch_size=8",
    "optim.warmup_steps=1",
    "workers=0",
    "monitor.log_every=1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Phantoms to report in one folder, made by the commands of the README."""
    folder = tmp_path_factory.mktemp("run")
    cli.phantom(
        [
            f"--out={folder / 'phantoms'}",
            "num_patients=12",
            "shape=[24,32,32]",
            "min_prevalence=0.4",
            "split=[0.5,0.1,0.4]",
            "workers=1",
        ]
    )
    cli.prepare(
        [
            f"--source={folder / 'phantoms' / 'manifest.csv'}",
            f"--out={folder / 'cohort'}",
            "spacing_mm=[12,12,12]",
            "size=[24,32,32]",
        ]
    )
    cli.pretrain(
        [
            f"cohort={folder / 'cohort'}",
            f"out={folder / 'train'}",
            "steps=3",
            "batch_size=4",
            *TINY_MODEL,
        ]
    )
    ckpt = f"--ckpt={folder / 'train' / 'model.safetensors'}"
    cohort = f"--cohort={folder / 'cohort'}"
    cli.zero_shot([ckpt, cohort, f"--out={folder / 'zero_shot'}", "replicates=50"])
    cli.embed([ckpt, cohort, "--split=test", f"--out={folder / 'archive'}"])
    study = pd.read_parquet(folder / "archive" / "volumes.parquet")["study_id"].iloc[0]
    cli.similar(
        [
            f"--table={folder / 'archive' / 'volumes.parquet'}",
            f"--study={study}",
            "--k=3",
            cohort,
            f"--out={folder / 'similar'}",
        ]
    )
    cli.summary([f"--run={folder}"])
    return folder


def test_every_held_out_volume_has_a_score_per_finding(run):
    scores = pd.read_parquet(run / "zero_shot" / "scores.parquet")
    manifest = pd.read_csv(run / "phantoms" / "manifest.csv")

    held_out = set(manifest.loc[manifest["split"] == "test", "volume_id"])
    assert set(scores["volume_id"]) == held_out
    assert len(scores) == len(held_out) * len(FINDINGS)
    assert scores["score"].between(0, 1).all()


def test_scores_carry_the_labels_of_the_manifest(run):
    scores = pd.read_parquet(run / "zero_shot" / "scores.parquet")
    manifest = pd.read_csv(run / "phantoms" / "manifest.csv").set_index("volume_id")

    for row in scores.itertuples():
        assert row.label == manifest.loc[row.volume_id, row.finding]


def test_similar_cases_never_include_the_query_patient(run):
    hits = pd.read_csv(run / "similar" / "similar.csv")
    query = pd.read_parquet(run / "archive" / "volumes.parquet")["study_id"].iloc[0]

    assert len(hits) == 3
    assert query.rsplit("_", 1)[0] not in {study.rsplit("_", 1)[0] for study in hits["study_id"]}


def test_a_manifest_is_prepared_and_exported_in_one_go(run, tmp_path, capsys):
    ckpt = f"--ckpt={run / 'train' / 'model.safetensors'}"
    manifest = f"--manifest={run / 'phantoms' / 'manifest.csv'}"

    cli.embed([ckpt, manifest, "--split=test", f"--out={tmp_path}"])

    expected = pd.read_parquet(run / "archive" / "volumes.parquet")
    found = pd.read_parquet(tmp_path / "volumes.parquet")
    assert found["volume_id"].tolist() == expected["volume_id"].tolist()
    assert np.allclose(np.stack(found["vector"]), np.stack(expected["vector"]), atol=1e-6)
    with pytest.raises(SystemExit):
        cli.embed([ckpt, manifest, f"--cohort={run / 'cohort'}", f"--out={tmp_path}"])
    assert "takes the place of --cohort" in capsys.readouterr().err


def test_the_report_is_one_file_with_its_pictures_inside(run):
    page = (run / "report.html").read_text(encoding="utf-8")

    assert page.count("data:image/png;base64,") >= 4  # bars, ROC grid, loss, similar cases
    assert "http://" not in page
    assert "https://" not in page


def test_ten_lines_take_a_scan_to_scores_and_an_embedding(run):
    scanner = ctclip.load(run / "train" / "model.safetensors")
    scan = next((run / "phantoms" / "volumes").glob("*.nii.gz"))

    scores = scanner.score(scan)
    vector = scanner.embed(scan)

    assert list(scores) == list(FINDINGS)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)


def test_one_scan_scores_as_it_does_in_its_cohort(run, tmp_path):
    table = pd.read_parquet(run / "zero_shot" / "scores.parquet")
    name = table["volume_id"].iloc[0]
    cli.zero_shot(
        [
            f"--ckpt={run / 'train' / 'model.safetensors'}",
            f"--volume={run / 'phantoms' / 'volumes' / name}.nii.gz",
            f"--out={tmp_path}",
        ]
    )

    alone = json.loads((tmp_path / "scores.json").read_text())["scores"]
    together = table[table["volume_id"] == name].set_index("finding")["score"]
    for finding in FINDINGS:
        assert alone[finding] == pytest.approx(together[finding], abs=1e-4)


def test_a_cohort_of_other_preprocessing_is_refused(run, tmp_path, capsys):
    cli.prepare(
        [
            f"--source={run / 'phantoms' / 'manifest.csv'}",
            f"--out={tmp_path / 'other'}",
            "spacing_mm=[14,14,14]",
            "size=[24,32,32]",
        ]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.zero_shot(
            [
                f"--ckpt={run / 'train' / 'model.safetensors'}",
                f"--cohort={tmp_path / 'other'}",
                f"--out={tmp_path / 'scores'}",
            ]
        )

    assert stopped.value.code == 2
    assert "ctclip-prepare --like" in capsys.readouterr().err


def test_prepare_like_a_checkpoint_makes_a_cohort_that_it_accepts(run, tmp_path):
    ckpt = run / "train" / "model.safetensors"
    cli.prepare(
        [
            f"--source={run / 'phantoms' / 'manifest.csv'}",
            f"--like={ckpt}",
            f"--out={tmp_path / 'again'}",
        ]
    )

    again = next((tmp_path / "again").iterdir())
    assert again.name == next((run / "cohort").iterdir()).name


def test_a_missing_checkpoint_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.zero_shot([f"--ckpt={tmp_path / 'none.safetensors'}", "--volume=scan.nii.gz"])

    assert stopped.value.code == 2
    assert "none.safetensors" in capsys.readouterr().err


def test_scores_can_come_from_parts_and_from_other_spaces(run, tmp_path):
    ckpt, cohort = f"--ckpt={run / 'train' / 'model.safetensors'}", f"--cohort={run / 'cohort'}"
    plain = ScoreTable.load(run / "zero_shot" / "scores.parquet")
    found = {}
    for option in ("window=[24,32,32]", "window=[24,16,16]", "patches=3", "space=whitened"):
        out = tmp_path / option.split("[")[0]
        cli.zero_shot([ckpt, cohort, f"--out={out}", "replicates=0", option])
        found[option] = ScoreTable.load(out / "scores.parquet")
        assert found[option].header[option.split("=")[0]] is not plain.header[option.split("=")[0]]
    np.testing.assert_allclose(found["window=[24,32,32]"].scores, plain.scores, atol=1e-5)
    for option in ("window=[24,16,16]", "patches=3", "space=whitened"):
        assert np.abs(found[option].scores - plain.scores).max() > 1e-4


def test_what_the_model_and_its_labels_are_worth_is_one_command_each(run, tmp_path):
    ckpt, cohort = f"--ckpt={run / 'train' / 'model.safetensors'}", f"--cohort={run / 'cohort'}"
    cli.train_fit([ckpt, cohort, f"--out={tmp_path / 'fit'}", "zero_shot.replicates=20"])
    verdicts = pd.read_csv(tmp_path / "fit" / "verdicts.csv")
    assert set(verdicts["verdict"]) == {"too few cases to say"}  # of six training patients
    assert len(pd.read_csv(tmp_path / "fit" / "prompts.csv")) > 0

    cli.label_audit([ckpt, cohort, f"--out={tmp_path / 'audit'}", "num_folds=2", "replicates=20"])
    rates = pd.read_csv(tmp_path / "audit" / "noise.csv")
    assert rates["finding"].tolist() == list(FINDINGS)
    assert (rates["contradicted_by_report"] == 0).all()

    truth = f"--truth={run / 'phantoms' / 'truth.csv'}"
    cli.styles([ckpt, cohort, truth, f"--out={tmp_path / 'styles'}"])
    assert len(pd.read_csv(tmp_path / "styles" / "styles.csv")) == 3

    scores = str(run / "zero_shot" / "scores.parquet")
    reports = f"--reports={run / 'phantoms' / 'manifest.csv'}"
    cli.evaluate([scores, reports, f"--out={tmp_path / 'report'}", "--replicates=20"])
    assert "Uncertain findings" in (tmp_path / "report" / "report.html").read_text()
