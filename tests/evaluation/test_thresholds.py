from dataclasses import replace

import numpy as np
import pytest
from score_tables import cohort
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, precision_score

from ctclip.evaluation import thresholds


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.3).astype(float)
    return labels, rng.normal(size=300) + labels


def test_numbers_at_a_threshold_agree_with_scikit_learn(data):
    labels, scores = data
    point = thresholds.at(labels, scores, 0.4)
    called = scores > 0.4
    assert point.accuracy == pytest.approx(accuracy_score(labels, called))
    assert point.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, called))
    assert point.f1 == pytest.approx(f1_score(labels, called))
    assert point.f1_weighted == pytest.approx(f1_score(labels, called, average="weighted"))
    assert point.precision == pytest.approx(precision_score(labels, called))


@pytest.mark.parametrize(
    ("rule", "goodness"),
    [
        ("youden", lambda p: p.sensitivity + p.specificity),
        ("corner", lambda p: -np.hypot(1 - p.sensitivity, 1 - p.specificity)),
        ("f1", lambda p: p.f1),
        ("specificity-90", lambda p: p.sensitivity if p.specificity >= 0.9 else -1),
    ],
)
def test_no_other_threshold_is_better_by_its_own_rule(data, rule, goodness):
    labels, scores = data
    best = goodness(thresholds.at(labels, scores, thresholds.choose(labels, scores, rule)))
    others = [thresholds.at(labels, scores, cut) for cut in [-99.0, *scores]]
    assert best >= max(goodness(point) for point in others) - 1e-12


def test_a_threshold_without_positives_is_undefined_and_so_is_everything_at_it():
    labels, scores = np.zeros(5), np.arange(5.0)
    chosen = thresholds.choose(labels, scores)
    assert np.isnan(chosen)
    assert np.isnan(thresholds.at(labels, scores, chosen).accuracy)


def test_weighted_f1_flatters_a_model_that_never_finds_a_rare_disease():
    labels = np.r_[np.ones(5), np.zeros(95)]
    point = thresholds.at(labels, np.zeros(100), 0.5)
    assert point.f1_weighted > 0.9
    assert point.f1 == 0.0


def test_optimistic_thresholds_of_scores_that_are_no_probabilities_lie_between_them():
    """CT-CLIP's grid from 0 to 1 has no point between logits around -50."""
    table = cohort(200, separation=3.0)
    logits = replace(table, scores=table.scores - 50)
    for k, threshold in enumerate(thresholds.optimistic(logits).values()):
        point = thresholds.at(logits.labels[:, k], logits.scores[:, k], threshold)
        assert point.sensitivity > 0.85
        assert point.specificity > 0.85
