import numpy as np
import pytest

from ctclip.evaluation import metrics, planted, probes
from ctclip.findings import FINDINGS


@pytest.fixture(scope="module")
def train():
    separation = np.zeros(18)
    separation[:3] = 4.0, 2.0, 0.0
    return planted.table(600, separation=separation)


def test_a_patient_never_scores_itself_and_folds_share_the_positives(train):
    labels = train.labels[:, 0]
    patient = np.asarray(train.patient_id)
    fold = probes.folds(patient, labels == 1, 5, seed=0)
    for name in np.unique(patient):
        assert len(set(fold[patient == name])) == 1
    counts = [(labels[fold == f] == 1).sum() for f in range(5)]
    assert max(counts) - min(counts) <= 4


def test_out_of_fold_scores_see_what_is_there_and_nothing_else(train):
    patient = np.asarray(train.patient_id)
    areas = []
    for k in range(3):
        logits = probes.out_of_fold(train.vectors, train.labels[:, k], patient)
        areas.append(metrics.auroc(train.labels[:, k], logits))
    assert areas[0] > 0.97
    assert 0.75 < areas[1] < areas[0]
    assert abs(areas[2] - 0.5) < 0.1


def test_unknown_labels_are_scored_and_never_trained_on(train):
    labels = train.labels[:, 0].astype(float)
    labels[::7] = np.nan
    logits = probes.out_of_fold(train.vectors, labels, np.asarray(train.patient_id))
    assert np.isfinite(logits).all()
    assert metrics.auroc(train.labels[::7, 0], logits[::7]) > 0.95


def test_too_few_patients_give_no_scores(train):
    labels = np.zeros(600)
    labels[:6] = 1
    assert np.isnan(probes.out_of_fold(train.vectors, labels, np.asarray(train.patient_id))).all()


@pytest.mark.parametrize("kind", ["linear", "classfine"])
def test_more_cases_make_better_probes(train, kind):
    test = planted.table(400, separation=np.r_[4.0, 2.0, np.zeros(16)], seed=5)
    found = probes.few_shot(
        train.vectors, train.labels[:, :1], test.vectors, test.labels[:, :1], FINDINGS[:1],
        shots=(1, 16, None), repeats=8, kind=kind,
    )  # fmt: skip
    assert found["shots"].tolist() == [1, 16, "all"]
    areas = found["auroc"].tolist()
    assert areas == sorted(areas)
    assert areas[-1] > 0.9
    assert found["low"][0] < found["auroc"][0] < found["high"][0]


def test_few_shot_intervals_hold_the_sampling_of_the_test_patients(train):
    """All cases make one probe, whose AUROC is still known from these test patients only."""
    areas, found = [], None
    for seed in range(12):
        test = planted.table(60, separation=np.r_[2.0, np.zeros(17)], seed=100 + seed)
        found = probes.few_shot(
            train.vectors, train.labels[:, 1:2], test.vectors, test.labels[:, :1], FINDINGS[:1],
            test_patient_id=np.asarray(test.patient_id), shots=(4, None), repeats=4,
        )  # fmt: skip
        areas.append(found["auroc"][1])
    assert found["low"][1] < found["auroc"][1] < found["high"][1]
    assert found["high"][1] - found["low"][1] > 2 * np.std(areas)
    assert found["low"][0] < found["draws_low"][0]
    assert found["draws_high"].isna().tolist() == [False, True]
