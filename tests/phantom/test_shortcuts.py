"""Gross statistics must not answer for a model that has not looked."""

import numpy as np
import pytest

from ctclip.phantom.cohort import PhantomConfig, build
from ctclip.phantom.shortcuts import LOCAL_FINDINGS, gross_statistics, shortcut_aucs


def test_the_ten_statistics_are_mean_variance_and_a_histogram():
    hu = np.array([[[-1000, -900], [40, 1000]]], np.int16)
    mean, variance, *share = gross_statistics(hu)
    assert mean == pytest.approx(-215.0)
    assert variance == pytest.approx(hu.astype(float).var())
    assert share == [0.25, 0.25, 0, 0, 0, 0.25, 0, 0.25]


@pytest.mark.slow
def test_gross_statistics_do_not_give_local_findings_away(tmp_path):
    # Small enough for CI; the card holds the measurement on a full cohort.
    config = PhantomConfig(num_patients=160, shape=(24, 32, 32), min_prevalence=0.25, seed=3)
    aucs = shortcut_aucs(build(config, tmp_path).parent)
    # The standard error of an AUC with 40 positives of 160 is 0.05: margins of two of them.
    assert np.mean([aucs[name]["gross"] for name in LOCAL_FINDINGS]) < 0.7
    assert all(aucs[name]["acquisition"] < 0.75 for name in LOCAL_FINDINGS)
