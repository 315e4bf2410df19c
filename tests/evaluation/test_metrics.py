import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from ctclip.evaluation import bootstrap, metrics
from ctclip.evaluation.scores import ScoreTable


def random_table(n=200, k=3, seed=0, patients=120, ties=False) -> ScoreTable:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, k)) < 0.3).astype(float)
    scores = rng.normal(size=(n, k)) + labels
    if ties:
        scores = np.round(scores)
    owner = np.sort(rng.integers(patients, size=n))
    return ScoreTable(
        volume_id=np.array([f"v{i}" for i in range(n)]),
        study_id=np.array([f"s{i}" for i in range(n)]),
        patient_id=np.array([f"p{i}" for i in owner]),
        split=np.full(n, "test"),
        findings=tuple(f"f{i}" for i in range(k)),
        labels=labels,
        scores=scores,
        header={"model": "toy"},
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_ranking_metrics_agree_with_scikit_learn(seed, ties):
    table = random_table(seed=seed, ties=ties)
    for k in range(3):
        labels, scores = table.labels[:, k], table.scores[:, k]
        assert metrics.auroc(labels, scores) == pytest.approx(
            roc_auc_score(labels, scores), abs=1e-12
        )
        assert metrics.average_precision(labels, scores) == pytest.approx(
            average_precision_score(labels, scores), abs=1e-12
        )
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        assert metrics.sensitivity_at_specificity(labels, scores, 0.9) == pytest.approx(
            tpr[fpr <= 0.1 + 1e-12].max()
        )


def test_a_constant_score_has_auroc_one_half():
    assert metrics.auroc(np.array([0.0, 1, 1, 0]), np.zeros(4)) == 0.5


def test_unknown_labels_and_missing_scores_are_left_out():
    labels = np.array([1.0, 0.0, np.nan, 1.0, 0.0])
    scores = np.array([0.9, 0.1, -9.0, np.nan, 0.2])
    assert metrics.auroc(labels, scores) == 1.0


def test_a_finding_without_positives_says_so_and_does_not_enter_the_macro():
    table = random_table()
    table.labels[:, 1] = 0.0
    result = metrics.evaluate(table, replicates=250)
    assert np.isnan(result.findings[1].auroc)
    assert result.findings[1].note == "no positives: not measured"
    assert result.macro["num_findings"] == 2
    others = [result.findings[0].auroc, result.findings[2].auroc]
    assert result.macro["auroc"] == pytest.approx(np.mean(others))
    assert result.to_json()["findings"][1]["auroc"] is None


@pytest.mark.parametrize("ties", [False, True])
def test_each_replicate_is_the_auroc_of_the_resampled_patients(ties):
    table = random_table(ties=ties)
    draws = bootstrap.draw(table.patient_id, 20, seed=3)
    fast = bootstrap.replicate(draws, table.labels, table.scores)
    precision = bootstrap.replicate(
        draws, table.labels, table.scores, statistic=metrics.weighted_average_precision
    )
    for r in range(20):
        times = draws.counts[0][draws.patient, r].astype(int)
        rows = np.repeat(np.arange(len(table)), times)
        for k in range(3):
            label, score = table.labels[rows, k], table.scores[rows, k]
            assert fast[r, k] == pytest.approx(roc_auc_score(label, score), abs=1e-5)
            assert precision[r, k] == pytest.approx(average_precision_score(label, score), abs=1e-5)


def test_volumes_of_one_patient_are_drawn_together():
    patient = np.array(["a", "b", "a", "c"])
    draws = bootstrap.draw(patient, 300, seed=0)
    weights = draws.weights(0, np.arange(4))
    assert (weights[0] == weights[2]).all()
    assert (draws.counts.sum(axis=1) == 3).all()


def test_an_interval_contains_the_estimate_and_widens_with_fewer_patients():
    wide = metrics.evaluate(random_table(n=80, patients=60), replicates=500).findings[0]
    narrow = metrics.evaluate(random_table(n=800, patients=600), replicates=500).findings[0]
    assert wide.auroc_low < wide.auroc < wide.auroc_high
    assert narrow.auroc_high - narrow.auroc_low < 0.5 * (wide.auroc_high - wide.auroc_low)


def test_intervals_are_reproducible():
    first = metrics.evaluate(random_table(), replicates=300, seed=5).to_json()
    assert first == metrics.evaluate(random_table(), replicates=300, seed=5).to_json()


def test_one_patient_has_no_interval():
    found = metrics.evaluate(random_table(patients=1), replicates=300)
    assert all(np.isnan(result.auroc_low) for result in found.findings)
    assert all(np.isnan(result.average_precision_low) for result in found.findings)
    assert np.isnan(found.macro["auroc_low"])
    assert found.findings[0].note == "rough: a single patient, no interval"


def test_a_constant_score_is_called_one():
    table = random_table()
    table.scores[:, 1] = 0.3
    assert metrics.evaluate(table, replicates=0).findings[1].note == metrics.CONSTANT


def test_a_case_without_a_score_is_not_one_without_a_label():
    table = random_table()
    table.scores[:60, 0] = np.nan
    table.labels[50:90, 0] = np.nan
    table.scores[:, 1] = np.nan
    found = metrics.evaluate(table, replicates=0).findings
    assert (found[0].unknown, found[0].unscored) == (40, 50)
    assert (found[1].unknown, found[1].unscored) == (0, 200)
    assert found[1].note == "no scores: not measured"


def test_intervals_of_average_precision_hold_the_truth():
    """Macro over 18 findings of 100 patients: its percentiles hold the truth in a third of sets."""
    rng = np.random.default_rng(0)
    shift = 1.19  # AUROC 0.8
    big = rng.random(400_000) < 0.2
    truth = average_precision_score(big, rng.normal(size=len(big)) + shift * big)
    held, single = 0, []
    for seed in range(60):
        labels = (rng.random((100, 18)) < 0.2).astype(float)
        names = np.array([f"v{i}" for i in range(100)])
        table = ScoreTable(
            volume_id=names, study_id=names, patient_id=names, split=np.full(100, "test"),
            findings=tuple(f"f{k}" for k in range(18)), labels=labels,
            scores=rng.normal(size=labels.shape) + shift * labels,
        )  # fmt: skip
        found = metrics.evaluate(table, replicates=200, seed=seed)
        low, high = (found.macro[f"average_precision_{end}"] for end in ("low", "high"))
        held += low <= truth <= high
        single += [
            f.average_precision_low <= truth <= f.average_precision_high for f in found.findings
        ]
    assert held >= 51  # 95 % of 60 is 57
    assert np.mean(single) > 0.93


def test_an_interval_of_average_precision_stays_within_its_bounds():
    assert np.isnan(metrics.average_precision_interval(0.5, np.empty(0), 30)).all()
    low, high = metrics.average_precision_interval(1.0, np.ones(200), 10)
    assert low == pytest.approx(0.692, abs=1e-3)  # Clopper-Pearson, 10 of 10
    assert high == 1.0
    low, high = metrics.average_precision_interval(
        0.97, np.random.default_rng(0).beta(9, 1, 500), 5
    )
    assert 0 < low < 0.97 <= high <= 1
