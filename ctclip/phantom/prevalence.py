"""Which findings a patient has: CT-RATE's prevalence and co-occurrence through a Gaussian copula.

The committed table holds two facts about the 24,128 training scans of CT-RATE: how often each
finding is positive, and the phi coefficient of each pair. Thresholding correlated normal numbers
gives back both, and plausible patterns of many findings without storing any patient's row.
"""

import csv
import functools
import importlib.resources

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import multivariate_normal

from ctclip.findings import FINDINGS

Matrix = NDArray[np.float64]


@functools.cache
def ct_rate_tables() -> tuple[Matrix, Matrix]:
    """Prevalence ``(18,)`` and phi ``(18, 18)`` of CT-RATE's training scans, in FINDINGS order."""
    text = importlib.resources.files("ctclip.phantom").joinpath("data/ct_rate_cooccurrence.csv")
    with text.open(encoding="utf-8") as file:
        rows = {row["finding"]: row for row in csv.DictReader(file)}
    prevalence = np.array([float(rows[name]["prevalence"]) for name in FINDINGS])
    phi = np.array([[float(rows[a][b]) for b in FINDINGS] for a in FINDINGS])
    return prevalence, phi


@functools.cache
def latent_correlation() -> Matrix:
    """Correlation of the normal numbers whose thresholding gives CT-RATE's phi.

    Tetrachoric, pair by pair, then the nearest positive definite matrix by clipping eigenvalues.
    """
    prevalence, phi = ct_rate_tables()
    cut = ndtri(prevalence)
    # d/dr of P(both) is the bivariate density at r: integrate it once over a grid of r.
    r = np.linspace(-0.98, 0.98, 981)
    latent = np.eye(len(FINDINGS))
    for i in range(len(FINDINGS)):
        for j in range(i):
            a, b = cut[i], cut[j]
            density = np.exp(-(a * a - 2 * r * a * b + b * b) / (2 * (1 - r * r)))
            density /= 2 * np.pi * np.sqrt(1 - r * r)
            steps = (density[1:] + density[:-1]) / 2 * np.diff(r)
            joint = np.concatenate([[0.0], np.cumsum(steps)])
            joint += ndtr(a) * ndtr(b) - np.interp(0.0, r, joint)
            p, q = prevalence[i], prevalence[j]
            target = p * q + phi[i, j] * np.sqrt(p * (1 - p) * q * (1 - q))
            latent[i, j] = latent[j, i] = np.interp(target, joint, r)
    values, vectors = np.linalg.eigh(latent)
    fixed = vectors @ np.diag(np.maximum(values, 1e-3)) @ vectors.T
    scale = np.sqrt(np.diag(fixed))
    return fixed / np.outer(scale, scale)


def sample_findings(
    rng: np.random.Generator, min_prevalence: float = 0.0
) -> tuple[dict[str, bool], float]:
    """Draw which findings one patient has.

    Args:
        rng: The patient's generator.
        min_prevalence: Findings rarer than this in CT-RATE are raised to it, so that a small
            cohort still holds cases of each; correlations stay.

    Returns:
        Finding to presence, and a standard normal score of frailty for the patient's age: the
        latent mean of the findings that come with age (calcification, large heart).
    """
    prevalence, _ = ct_rate_tables()
    latent = multivariate_normal.rvs(cov=latent_correlation(), random_state=rng)
    present = latent > -ndtri(np.maximum(prevalence, min_prevalence))
    ageing = [
        FINDINGS.index(name)
        for name in ("Arterial wall calcification", "Coronary artery wall calcification")
    ]
    score = float(latent[ageing].mean())
    return dict(zip(FINDINGS, map(bool, present), strict=True)), score
