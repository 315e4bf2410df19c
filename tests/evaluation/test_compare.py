from dataclasses import replace

import numpy as np
import pytest

from ctclip.evaluation import compare
from ctclip.evaluation.scores import ScoreTable


def models(n=400, gain=0.5, seed=0) -> tuple[ScoreTable, ScoreTable]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 2)) < 0.3).astype(float)
    common = rng.normal(size=(n, 2))
    first = ScoreTable(
        volume_id=np.array([f"v{i}" for i in range(n)]),
        study_id=np.array([f"s{i}" for i in range(n)]),
        patient_id=np.array([f"p{i // 2}" for i in range(n)]),
        split=np.full(n, "test"),
        findings=("Emphysema", "Lung nodule"),
        labels=labels,
        scores=common + labels,
        header={"model": "a"},
    )
    better = common + 0.2 * rng.normal(size=(n, 2)) + labels * np.array([1 + gain, 1.0])
    return first, replace(first, scores=better, header={"model": "b"})


def test_a_paired_interval_is_much_narrower_than_the_models_own():
    found = compare.compare(*models(), replicates=1000)
    emphysema, nodule = found.findings
    assert emphysema.low > 0
    assert emphysema.p_holm < 0.05
    assert nodule.low < 0 < nodule.high
    assert nodule.high - nodule.low < 0.03
    assert found.macro.low > 0
    assert found.macro.difference == pytest.approx(
        np.mean([emphysema.difference, nodule.difference])
    )


def test_order_and_extra_cases_of_the_other_table_do_not_matter():
    a, b = models()
    shuffled = b.rows(np.random.default_rng(0).permutation(len(b))).of_findings(b.findings[::-1])
    first = compare.compare(a, b, replicates=250)
    second = compare.compare(a, shuffled, replicates=250)
    assert first.frame().equals(second.frame())
    assert compare.compare(a, b.rows(np.arange(100)), replicates=250).cases == 100


def test_only_cases_that_both_models_scored_count():
    a, b = models()
    a.scores[:50, 0] = np.nan
    without = compare.compare(a.rows(np.arange(50, 400)), b, replicates=0)
    with_gaps = compare.compare(a, b, replicates=0)
    assert with_gaps.findings[0].auroc_b == without.findings[0].auroc_b


def test_what_can_not_be_compared_is_refused():
    a, b = models(50)
    with pytest.raises(compare.ComparisonError, match="different protocols"):
        compare.compare(a, replace(b, header={"model": "b", "protocol": "x@1"}))
    changed = b.labels.copy()
    changed[3, 0] = 1 - changed[3, 0]
    with pytest.raises(compare.ComparisonError, match="different labels for 1 cells, first 'v3'"):
        compare.compare(a, replace(b, labels=changed))
    with pytest.raises(compare.ComparisonError, match="no case in common; a starts with 'v0', b"):
        compare.compare(a, replace(b, volume_id=np.char.add("w", b.volume_id)))
    with pytest.raises(compare.ComparisonError, match="b lacks 'Lung nodule'; apply one protocol"):
        compare.compare(a, b.of_findings(["Emphysema"]))


def test_holm_corrects_as_in_the_textbook_example():
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(compare.holm(p), [0.03, np.nan, 0.06, 0.06, 0.02])


def test_the_detectable_difference_is_found_in_four_of_five_samples():
    rng = np.random.default_rng(0)
    error = 0.01
    observed = compare.detectable(error) + error * rng.normal(size=20000)
    assert (np.abs(observed) > 1.96 * error).mean() == pytest.approx(0.8, abs=0.01)
