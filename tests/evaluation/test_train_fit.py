"""Planted truth: every verdict where it belongs, on embeddings of known visibility."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ctclip.evaluation import label_audit, metrics, noise, planted, train_fit
from ctclip.evaluation.label_audit import AuditConfig
from ctclip.evaluation.scores import ScoreTable
from ctclip.evaluation.scoring import ZeroShotConfig
from ctclip.evaluation.train_fit import TrainFitConfig
from ctclip.evaluation.verdicts import (
    Criteria,
    Evidence,
    SplitFit,
    Verdict,
    judge,
    larger_where_seen,
)
from ctclip.findings import FINDINGS

CORRUPTED, INVISIBLE, UNPROMPTED, RARE, OVERFITTED = range(5)


def scored(table, seed: int, memorised: np.ndarray | None = None) -> ScoreTable:
    """Zero-shot scores: along each finding's own direction, but for two planted failures."""
    scores = table.vectors @ planted.directions(table.width).T
    scores[:, UNPROMPTED] = np.random.default_rng(seed).normal(size=len(table))
    if memorised is not None:
        scores[:, OVERFITTED] += memorised
    return ScoreTable(
        volume_id=np.asarray(table.volume_id),
        study_id=np.asarray(table.study_id),
        patient_id=np.asarray(table.patient_id),
        split=np.asarray(table.split),
        findings=FINDINGS,
        labels=table.labels.astype(np.float64),
        scores=scores,
        header={"model": "toy"},
    )


@pytest.fixture(scope="module")
def judged():
    separation = np.full(18, 4.5)
    separation[INVISIBLE], separation[OVERFITTED] = 0.0, 2.2
    train = planted.table(1200, separation=separation, seed=1)
    test = planted.table(800, separation=separation, seed=2, split="test")
    labels = train.labels.copy()
    bad = planted.corrupt(labels[:, CORRUPTED], 0.2, "flip")
    labels[bad, CORRUPTED] = 1 - labels[bad, CORRUPTED]
    labels[:, RARE] = 0
    labels[:6, RARE] = 1
    train = replace(train, labels=labels)
    memorised = 0.3 * (labels[:, OVERFITTED] - 0.5)
    config = TrainFitConfig(zero_shot=ZeroShotConfig(replicates=250))
    audited = label_audit.audit(train, None, AuditConfig(replicates=20))
    tables = [scored(train, 0, memorised), scored(test, 1)]
    assert metrics.auroc(tables[0].labels[:, 10], tables[0].scores[:, 10]) > 0.9
    return train_fit.assess(tables, audited, config)


@pytest.mark.parametrize(
    ("finding", "verdict"),
    [
        (CORRUPTED, Verdict.LABELS),
        (INVISIBLE, Verdict.SMALL),
        (UNPROMPTED, Verdict.PROMPTS),
        (RARE, Verdict.FEW),
        (OVERFITTED, Verdict.OVERFITS),
    ],
)
def test_each_planted_failure_gets_its_verdict(judged, finding, verdict):
    assert judged[finding].verdict is verdict


def test_the_other_diseases_are_learnt(judged):
    assert [j.verdict for j in judged[5:]] == [Verdict.LEARNT] * 13


def test_a_page_a_figure_and_tables_are_written(judged, tmp_path, capsys):
    train_fit.write(judged, tmp_path, {"checkpoint": "abc"})
    assert "labels suspect" in capsys.readouterr().out
    frame = pd.read_csv(tmp_path / "verdicts.csv")
    assert len(frame) == 18
    text = (tmp_path / "train_fit.html").read_text()
    assert "labels suspect" in text
    assert "run the label audit" in text
    assert (tmp_path / "train_fit.svg").is_file()


def fit(auroc: float, patients: int = 100) -> SplitFit:
    return SplitFit(
        auroc=auroc, low=auroc - 0.03, high=auroc + 0.03, positive_patients=patients,
        negative_patients=patients,
    )  # fmt: skip


def test_few_patients_are_never_judged():
    found = judge(Evidence(finding="x", train=fit(0.5), test=fit(0.5, patients=9)))
    assert found.verdict is Verdict.FEW


def test_a_gap_that_could_be_chance_is_not_overfitting():
    evidence = Evidence(finding="x", train=fit(0.95), test=fit(0.85), gap_low=-0.01)
    assert judge(evidence).verdict is Verdict.LEARNT
    assert judge(replace(evidence, gap_low=0.02)).verdict is Verdict.OVERFITS
    assert judge(replace(evidence, gap_low=0.02), Criteria(gap=0.2)).verdict is Verdict.LEARNT


def test_missed_cases_make_labels_suspect_though_auroc_hardly_feels_them():
    rng = np.random.default_rng(0)
    truth = (rng.random(2000) < 0.12).astype(float)
    scores = rng.normal(size=2000) + 4 * truth
    for rate, verdict in ((0.0, Verdict.LEARNT), (0.3, Verdict.LABELS)):
        labels = truth.copy()
        labels[planted.corrupt(truth, rate, "drop")] = 0.0
        found = noise.estimate(scores, labels, np.arange(2000), replicates=40)
        assert found.auroc_lost_low < 0.03
        evidence = Evidence(finding="x", train=fit(0.95), test=fit(0.95), noise=found)
        assert judge(evidence).verdict is verdict


def test_lesions_that_are_only_seen_when_large_are_recognised():
    rng = np.random.default_rng(0)
    size = rng.uniform(3, 20, 80)
    assert larger_where_seen(size, size + rng.normal(size=80)) < 0.01
    assert larger_where_seen(size, rng.normal(size=80)) > 0.01
    assert np.isnan(larger_where_seen(np.full(80, np.nan), size))


def test_sizes_and_agreement_are_told_in_the_paragraph():
    evidence = Evidence(
        finding="Lung nodule", train=fit(0.6), test=fit(0.6), size_mm=6.0, token_mm=12.0,
        seen_larger_p=0.001, agreement=0.2, curve=(0.5, 0.52, 0.6),
    )  # fmt: skip
    text = judge(evidence).paragraph
    assert "median lesion measures 6 mm, a token 12 mm" in text
    assert "score high are larger" in text
    assert "mostly noise" in text
    assert "still rising" in text


def test_what_is_larger_than_a_token_is_subtle_and_a_rising_curve_means_train_on():
    poor = Evidence(finding="x", train=fit(0.6), test=fit(0.6), token_mm=48.0)
    assert judge(poor).verdict is Verdict.SMALL
    assert "Without earlier checkpoints" in judge(poor).paragraph
    assert judge(replace(poor, size_mm=50.0)).verdict is Verdict.SUBTLE
    assert judge(replace(poor, size_mm=40.0)).verdict is Verdict.SMALL
    flat = judge(replace(poor, size_mm=50.0, curve=(0.6, 0.6)))
    assert flat.verdict is Verdict.SUBTLE
    assert "Without earlier checkpoints" not in flat.paragraph
    rising = judge(replace(poor, size_mm=50.0, curve=(0.5, 0.6)))
    assert rising.verdict is Verdict.RISING
    assert "train longer" in rising.paragraph


def test_a_sample_holds_rare_findings_and_whole_patients():
    rng = np.random.default_rng(0)
    records = [
        SimpleNamespace(
            patient_id=f"p{patient}",
            labels={"Emphysema": float(patient % 50 == 0), "Lung nodule": float(patient % 2)},
        )
        for patient in range(1000)
        for _ in range(rng.integers(1, 3))
    ]
    kept = train_fit._sample(records, TrainFitConfig(sample=200))
    names = [record.patient_id for record in kept]
    assert 200 <= len(kept) < 203
    assert all(names.count(n) == [r.patient_id for r in records].count(n) for n in set(names))
    assert len({r.patient_id for r in kept if r.labels["Emphysema"]}) == 20  # every one there is


def test_sizes_of_other_volumes_and_sizes_that_are_no_numbers_are_named(tmp_path):
    path = tmp_path / "lesions.csv"
    records = [SimpleNamespace(volume_id="v1")]
    path.write_text("volume_id,finding,size_mm\nzzz,Lung nodule,4\n")
    with pytest.raises(ValueError, match="none of its 1 lesions is of a volume and finding"):
        train_fit._known_sizes(path, records)
    path.write_text("volume_id,finding,size_mm\nv1,Lung nodule,4\nv1,Lung nodule,abc\n")
    with pytest.raises(ValueError, match=r"lesions.csv line 3: size_mm is 'abc', expected"):
        train_fit._known_sizes(path, records)


def test_reconstructions_agree_only_beyond_the_label():
    rng = np.random.default_rng(0)
    study = np.repeat(np.arange(200), 2)
    label = np.repeat(rng.random(200) < 0.5, 2).astype(float)
    shared = np.repeat(rng.normal(size=200), 2)

    def table(scores):
        names = np.array([f"v{i}" for i in range(400)])
        return ScoreTable(
            volume_id=names, study_id=study.astype(str), patient_id=study.astype(str),
            split=np.full(400, "train"), findings=("x",), labels=label[:, None],
            scores=scores[:, None],
        )  # fmt: skip

    noise = rng.normal(size=400)
    assert abs(train_fit.reconstruction_agreement(table(3 * label + noise), 0)) < 0.2
    agreeing = train_fit.reconstruction_agreement(table(3 * label + shared + 0.3 * noise), 0)
    assert agreeing > 0.8


def test_sizes_are_read_as_the_largest_of_a_volume(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text("volume_id,finding,size_mm\nv1,Lung nodule,4\nv1,Lung nodule,9\n")
    assert train_fit.read_sizes(path) == {("v1", "Lung nodule"): 9.0}
    path.write_text("volume_id,finding\n")
    with pytest.raises(ValueError, match="no column 'size_mm'"):
        train_fit.read_sizes(path)


def test_too_few_replicates_to_decide_by_are_refused():
    with pytest.raises(ValueError, match=r"audit\.replicates is 20, .* at least 100"):
        TrainFitConfig(audit=AuditConfig(replicates=20))
