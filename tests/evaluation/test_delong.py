import numpy as np
import pytest

from ctclip.evaluation import bootstrap, metrics
from ctclip.evaluation.delong import delong, logit_interval

# DeLong, DeLong and Clarke-Pearson 1988: 43 patients with ovarian cancer and bowel obstruction.
# Albumin, total protein, Krebs-Goplerud score (low = good), survival after surgery.
OVARIAN = np.fromstring(
    """3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0
    1.6 5.6 5 1 3.8 5.7 5 1 3.7 6.7 6 1 3.2 5.4 4 1 3.8 6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1
    4.3 7.0 4 1 3.6 6.7 4 0 2.3 4.4 6 1 4.2 7.6 4 0 4.0 6.6 6 0 3.5 5.8 6 1 3.8 6.8 7 1
    3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1 3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1 4.3 6.5 4 1
    3.2 5.1 5 1 2.6 4.7 6 1 3.3 6.8 6 0 1.7 4.0 7 0 3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1
    3.5 6.2 5 1 2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1 3.3 5.7 6 1 3.7 6.9 5 1
    3.6 6.6 5 1""",
    sep=" ",
).reshape(-1, 4)


def test_three_tests_of_one_cohort_give_the_published_areas_errors_and_contrast():
    """The figures that SAS prints for this example."""
    albumin, protein, score, outcome = OVARIAN.T
    found = delong(outcome, np.stack([albumin, 10 - score, protein]))
    assert found.auroc.round(4).tolist() == [0.7366, 0.7258, 0.6478]
    errors = np.sqrt(np.diag(found.covariance))
    assert errors.round(4).tolist() == [0.0927, 0.1028, 0.1000]
    contrast = np.array([[1, -1, 0], [0, -1, 1]])
    delta = contrast @ found.auroc
    chi2 = delta @ np.linalg.inv(contrast @ found.covariance @ contrast.T) @ delta
    assert chi2 == pytest.approx(2.5340, abs=5e-5)
    assert found.difference(0, 1)[:2] == pytest.approx((0.0108, 0.0953), abs=5e-5)


def test_one_reader_gives_the_published_interval():
    """Hanley and McNeil 1982, 109 CT images in five categories; interval as Stata prints it."""
    rating = np.repeat([1, 2, 3, 4, 5] * 2, [33, 6, 6, 11, 2, 3, 2, 2, 11, 33])
    truth = np.repeat([0, 1], [58, 51])
    found = delong(truth, rating[None])
    assert found.auroc[0] == pytest.approx(0.8932, abs=5e-5)
    assert np.sqrt(found.covariance[0, 0]) == pytest.approx(0.0307, abs=5e-5)
    assert found.interval() == pytest.approx((0.83295, 0.95339), abs=5e-6)


def test_patients_of_one_case_each_change_nothing():
    outcome, scores = OVARIAN[:, 3], OVARIAN[:, :2].T
    grouped = delong(outcome, scores, np.arange(len(outcome)))
    np.testing.assert_allclose(grouped.covariance, delong(outcome, scores).covariance, atol=1e-12)


def test_copies_of_every_case_add_no_information():
    rng = np.random.default_rng(0)
    label = rng.random(100) < 0.4
    score = rng.normal(size=100) + label
    once = delong(label, score[None], np.arange(100))
    twice = delong(np.tile(label, 2), np.tile(score, 2)[None], np.tile(np.arange(100), 2))
    assert twice.auroc[0] == pytest.approx(once.auroc[0])
    assert twice.covariance[0, 0] == pytest.approx(once.covariance[0, 0])
    naive = delong(np.tile(label, 2), np.tile(score, 2)[None])
    assert naive.covariance[0, 0] < 0.6 * once.covariance[0, 0]


def test_the_error_is_that_of_repeated_samples():
    rng = np.random.default_rng(1)
    areas, variances = [], []
    for _ in range(400):
        patient = np.repeat(np.arange(60), 2)
        label = np.repeat(rng.random(60) < 0.4, 2)
        shared = np.repeat(rng.normal(size=60), 2)
        found = delong(label, (shared + 0.3 * rng.normal(size=120) + label)[None], patient)
        areas.append(found.auroc[0])
        variances.append(found.covariance[0, 0])
    assert np.mean(variances) == pytest.approx(np.var(areas), rel=0.2)


def test_a_model_does_not_differ_from_itself():
    found = delong(OVARIAN[:, 3], np.stack([OVARIAN[:, 0]] * 2))
    assert found.difference() == (0.0, 0.0, 1.0)


def test_one_case_of_a_class_is_too_few():
    with pytest.raises(ValueError, match="two cases of each class, got 1 and 3"):
        delong(np.array([1, 0, 0, 0]), np.arange(4.0))


def test_ten_positive_patients_still_give_an_honest_interval():
    """Two volumes per patient, AUROC 0.95; the normal interval holds it in 82 % of samples."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        patient = np.repeat(np.arange(100), 2)
        label = np.repeat(np.arange(100) < 10, 2)
        noise = (np.repeat(rng.normal(size=100), 2) + rng.normal(size=200)) / np.sqrt(2)
        low, high = logit_interval(label, noise + 2.326 * label, patient)
        held += low <= 0.95 <= high
    assert 0.93 <= held / 300 <= 0.98


def test_perfect_ranks_of_few_do_not_prove_perfection():
    label = np.arange(30) < 5
    low, high = logit_interval(label, label.astype(float), np.arange(30))
    assert 0.5 < low < 0.97
    assert high <= 1.0
    assert np.isnan(logit_interval(np.arange(9) < 1, np.arange(9.0), np.arange(9))).all()


def test_many_patients_are_resampled_and_few_are_not():
    rng = np.random.default_rng(0)
    for patients, few in ((200, False), (40, True)):
        label = (np.arange(patients) % 3 == 0).astype(float)
        score, patient = rng.normal(size=patients) + label, np.arange(patients)
        draws = bootstrap.draw(patient, 500)
        replicates = bootstrap.replicate(draws, label[:, None], score[:, None])[:, 0]
        found = metrics.auroc_interval(label, score, patient, replicates)
        assert (found == bootstrap.interval(replicates)) is not few
        assert (found == logit_interval(label, score, patient)) is few
