"""The copula gives back CT-RATE's tables."""

import numpy as np
import pytest

from ctclip.findings import FINDINGS
from ctclip.phantom.prevalence import ct_rate_tables, latent_correlation, sample_findings


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return np.array([list(sample_findings(rng)[0].values()) for _ in range(6000)])


def test_prevalence_matches_ct_rate(drawn):
    prevalence, _ = ct_rate_tables()
    error = np.abs(drawn.mean(axis=0) - prevalence)
    assert error.max() < 4 * np.sqrt(0.25 / len(drawn))


def test_every_pair_occurs_together_as_often_as_in_ct_rate(drawn):
    prevalence, phi = ct_rate_tables()
    spread = np.sqrt(prevalence * (1 - prevalence))
    joint = np.outer(prevalence, prevalence) + phi * np.outer(spread, spread)
    seen = drawn.T.astype(float) @ drawn / len(drawn)
    off = ~np.eye(len(FINDINGS), dtype=bool)
    assert np.abs(seen - joint)[off].max() < 0.02
    drawn_phi = np.corrcoef(drawn.T.astype(float))
    assert np.abs(drawn_phi - phi)[off].mean() < 0.02


def test_the_number_of_findings_of_a_patient_is_plausible(drawn):
    # CT-RATE: 3.4 positives a scan, 11 % of scans without any.
    count = drawn.sum(axis=1)
    assert count.mean() == pytest.approx(3.4, abs=0.15)
    assert (count == 0).mean() == pytest.approx(0.113, abs=0.05)


def test_latent_correlation_is_a_correlation():
    latent = latent_correlation()
    assert np.allclose(np.diag(latent), 1.0)
    assert np.linalg.eigvalsh(latent).min() > 0


def test_a_minimum_prevalence_lifts_rare_findings_only():
    rng = np.random.default_rng(1)
    share = np.array([list(sample_findings(rng, 0.3)[0].values()) for _ in range(3000)]).mean(0)
    prevalence, _ = ct_rate_tables()
    assert np.abs(share - np.maximum(prevalence, 0.3)).max() < 0.04
