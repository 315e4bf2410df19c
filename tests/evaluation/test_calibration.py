import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from ctclip.evaluation import calibration


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20000) * 1.5 - 1
    labels = (rng.random(20000) < expit(truth)).astype(float)
    return labels, truth


def test_true_probabilities_are_calibrated(data):
    labels, truth = data
    found = calibration.reliability(labels, expit(truth))
    assert found.ece < 0.02
    assert found.brier == pytest.approx(brier_score_loss(labels, expit(truth)))
    assert found.brier < found.brier_of_prevalence
    assert found.cases.sum() == len(labels)


@pytest.mark.parametrize(
    ("kind", "slope", "intercept"), [("temperature", 3.0, 0.0), ("platt", 3.0, 2.0)]
)
def test_a_distorted_probability_is_mended(data, kind, slope, intercept):
    labels, truth = data
    distorted = expit(slope * truth + intercept)
    scaling = calibration.fit(labels, distorted, kind)
    assert scaling.slope == pytest.approx(1 / slope, rel=0.05)
    assert calibration.reliability(labels, distorted).ece > 0.05
    assert calibration.reliability(labels, scaling(distorted)).ece < 0.02


def test_platt_scaling_is_logistic_regression_on_the_logit(data):
    labels, truth = data[0][:3000], data[1][:3000]
    scores = expit(2 * truth - 1)
    reference = LogisticRegression(C=1e9).fit(logit(scores)[:, None], labels)
    scaling = calibration.fit(labels, scores)
    assert scaling.slope == pytest.approx(reference.coef_[0, 0], rel=1e-2)
    assert scaling.intercept == pytest.approx(reference.intercept_[0], abs=2e-2)


def test_separated_classes_give_a_finite_scaling():
    scaling = calibration.fit(np.r_[np.ones(20), np.zeros(20)], np.r_[[0.9] * 20, [0.1] * 20])
    assert np.isfinite([scaling.slope, scaling.intercept]).all()


def test_scores_that_are_no_probabilities_are_refused():
    with pytest.raises(ValueError, match="no probabilities"):
        calibration.reliability(np.array([0.0, 1.0]), np.array([-3.0, 2.0]))
