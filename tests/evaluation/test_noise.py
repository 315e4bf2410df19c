import numpy as np
import pytest

from ctclip.evaluation import noise, planted


def scores_and_labels(separation=4.0, prevalence=0.2, n=2000, seed=0):
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < prevalence).astype(float)
    return rng.normal(size=n) + separation * truth, truth


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.3])
def test_flipped_labels_are_counted(rate):
    scores, labels = scores_and_labels()
    bad = planted.corrupt(labels, rate, "flip")
    labels[bad] = 1 - labels[bad]
    found = noise.estimate(scores, labels, np.arange(2000), replicates=30)
    assert found.wrong == pytest.approx(rate, abs=0.02)
    assert found.wrong_low < rate < found.wrong_high
    assert found.auroc_lost > 0.03
    worst = np.argsort(-found.posterior)[: len(bad)]
    assert np.isin(worst, bad).mean() > 0.85


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_dropped_positives_are_told_from_false_ones(rate):
    scores, labels = scores_and_labels()
    labels[planted.corrupt(labels, rate, "drop")] = 0
    found = noise.estimate(scores, labels, np.arange(2000), replicates=30)
    assert found.missed == pytest.approx(rate, abs=0.05)
    assert found.false < 0.01


def test_none_seen_among_hundreds_is_not_none_for_certain():
    """400 right positives can't exclude that 0.8 % of such cases are labelled absent."""
    for separation in (8.0, 2.5):
        found = noise.estimate(*scores_and_labels(separation), np.arange(2000), replicates=30)
        assert found.missed_low <= found.missed <= found.missed_high
        assert found.wrong_low <= found.wrong <= found.wrong_high
        assert found.false_low <= found.false <= found.false_high
        assert 0.008 < found.missed_high < 0.3


@pytest.mark.parametrize("separation", [1.0, 2.0, 4.0])
def test_overlapping_classes_are_not_noise(separation):
    found = noise.estimate(*scores_and_labels(separation), np.arange(2000), replicates=10)
    assert found.wrong < 0.02
    assert found.auroc_lost < 0.01


def test_scores_that_see_nothing_give_no_verdict():
    found = noise.estimate(*scores_and_labels(0.0), np.arange(2000), replicates=10)
    assert not found.is_identified


def test_unknown_labels_have_no_posterior_and_do_not_count():
    scores, labels = scores_and_labels()
    bad = planted.corrupt(labels, 0.1, "flip")
    labels[bad] = 1 - labels[bad]
    labels[::5] = np.nan
    found = noise.estimate(scores, labels, np.arange(2000), replicates=10)
    assert np.isnan(found.posterior[::5]).all()
    assert found.wrong == pytest.approx(0.1, abs=0.025)


def test_the_fit_follows_its_gradient():
    """The likelihood is climbed, not guessed: no neighbour of the optimum is better."""
    scores, labels = scores_and_labels(n=500)
    labels[:25] = 1 - labels[:25]
    best = noise.fit(scores, noise.kinds(labels))

    def likelihood(slope, offset, false, missed):
        p = 1 / (1 + np.exp(-(slope * scores + offset)))
        p = np.clip(false + (1 - false - missed) * p, 1e-9, 1 - 1e-9)
        value = np.log(np.where(labels == 1, p, 1 - p)).sum()
        return value + noise.PRIOR * np.log(1 - false - missed)

    here = likelihood(best.slope, best.offset, best.false, best.missed)
    for factor in (0.9, 1.1):
        assert likelihood(best.slope * factor, best.offset, best.false, best.missed) < here
        assert likelihood(best.slope, best.offset * factor, best.false, best.missed) < here
        assert likelihood(best.slope, best.offset, best.false * factor, best.missed) < here
        assert likelihood(best.slope, best.offset, best.false, best.missed * factor) < here


@pytest.mark.parametrize(("kind", "rate"), [("drop", 0.1), ("flip", 0.3)])
def test_a_report_tells_what_overlapping_scores_can_not(kind, rate):
    """Reports mention half of the absent findings and are right; the scores overlap."""
    rng = np.random.default_rng(1)
    scores, truth = scores_and_labels(separation=2.5)
    denied = np.where(rng.random(2000) < 0.5, noise.DENIED, noise.SILENT)
    readings = np.where(truth == 1, noise.AFFIRMED, denied)
    labels = truth.copy()
    bad = planted.corrupt(truth, rate, kind)
    labels[bad] = 1 - labels[bad]
    share = {}
    for name, read in (("image", None), ("both", readings)):
        found = noise.estimate(scores, labels, np.arange(2000), readings=read, replicates=20)
        worst = np.argsort(-found.posterior, kind="stable")[: len(bad)]
        share[name] = np.isin(worst, bad).mean()
    assert share["both"] > 0.9 > share["image"]
    assert found.missed == pytest.approx(rate, abs=0.03)
    assert found.wrong == pytest.approx(len(bad) / 2000, abs=0.02)


def test_a_report_that_repeats_a_wrong_label_does_not_make_it_right():
    """Where label and report were read from one mistake, the image still speaks against both."""
    scores, truth = scores_and_labels()
    labels = truth.copy()
    bad = planted.corrupt(truth, 0.2, "flip")
    labels[bad] = 1 - labels[bad]
    readings = np.where(labels == 1, noise.AFFIRMED, noise.DENIED)
    found = noise.estimate(scores, labels, np.arange(2000), readings=readings, replicates=10)
    assert found.wrong == pytest.approx(0.2, abs=0.03)
    worst = np.argsort(-found.posterior, kind="stable")[: len(bad)]
    assert np.isin(worst, bad).mean() > 0.85


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="only one class"):
        noise.estimate(np.arange(5.0), np.ones(5), np.arange(5))
