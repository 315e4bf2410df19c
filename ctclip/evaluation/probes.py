"""Linear probes on frozen embeddings: what the image tower knows, whatever its prompts reach.

A probe is a ridge-penalised logistic regression per finding. ``kind="classfine"`` has CT-CLIP's
ClassFine head instead: rectified embeddings and classes weighted to balance (Hamamci et al.
2024), trained to convergence where the original takes ten epochs of AdamW.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from ctclip.evaluation import bootstrap, metrics

Kind = Literal["linear", "classfine"]
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Inverse penalties to choose from, by the log-loss on patients left out."""

CHOICE_CASES = 4000
"""Cases at most that the penalty is chosen on."""

SHOTS: tuple[int | None, ...] = (1, 4, 16, 64, None)
"""Cases of each class; ``None`` takes all."""


@dataclass(frozen=True, eq=False)
class Probe:
    """One finding's linear classifier over ``(N, E)`` embeddings."""

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: float
    kind: Kind = "linear"

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """``(N,)`` log-odds of "present"."""
        features = (_features(vectors, self.kind) - self.mean) / self.scale
        found: np.ndarray = features @ self.weight + self.bias
        return found


def fit(
    vectors: np.ndarray,
    present: np.ndarray,
    strength: float = 1e-2,
    kind: Kind = "linear",
    weights: np.ndarray | None = None,
) -> Probe:
    """Fit one finding.

    Args:
        vectors: ``(N, E)``.
        present: ``(N,)`` bool, both classes among them.
        strength: Inverse ridge penalty on standardised features; smaller is smoother.
        kind: See the module.
        weights: ``(N,)`` case weights.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features = _features(vectors, kind)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale < 1e-12, 1.0, scale)
    balance = "balanced" if kind == "classfine" else None
    model = LogisticRegression(C=strength, max_iter=500, class_weight=balance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((features - mean) / scale, present, sample_weight=weights)
    return Probe(mean, scale, model.coef_[0], float(model.intercept_[0]), kind)


def folds(patient_id: np.ndarray, present: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Deal patients into folds so that every fold has its share of positive ones: ``(N,)``."""
    names, patient = np.unique(patient_id, return_inverse=True)
    sick = np.bincount(patient, weights=present.astype(float), minlength=len(names)) > 0
    rng = np.random.default_rng(seed)
    fold = np.empty(len(names), dtype=np.int64)
    start = 0
    for group in (np.flatnonzero(sick), np.flatnonzero(~sick)):
        shuffled = rng.permutation(group)
        fold[shuffled] = (np.arange(len(shuffled)) + start) % num
        start += len(shuffled)
    return fold[patient]


def out_of_fold(
    vectors: np.ndarray,
    labels: np.ndarray,
    patient_id: np.ndarray,
    *,
    num_folds: int = 5,
    seed: int = 0,
    kind: Kind = "linear",
) -> np.ndarray:
    """Log-odds of every case from probes that never saw its patient.

    Args:
        vectors: ``(N, E)``.
        labels: ``(N,)`` of one finding; nan = unknown: scored, never trained on.
        patient_id: ``(N,)``.
        num_folds: Number of folds.
        seed: Of the dealing.
        kind: See the module.

    Returns:
        ``(N,)``; all nan where a class has fewer patients than folds.
    """
    known = ~np.isnan(labels)
    present = labels == 1.0
    for side in (present & known, ~present & known):
        if len(np.unique(patient_id[side])) < num_folds:
            return np.full(len(labels), np.nan)
    fold = folds(patient_id, present, num_folds, seed)
    strength = _choose_strength(vectors, present, known, fold, num_folds, seed, kind)
    return _cross(vectors, present, known, fold, num_folds, strength, kind)


def few_shot(
    train_vectors: np.ndarray,
    train_labels: np.ndarray,
    test_vectors: np.ndarray,
    test_labels: np.ndarray,
    findings: Sequence[str],
    *,
    test_patient_id: np.ndarray | None = None,
    replicates: int = 1000,
    shots: Sequence[int | None] = SHOTS,
    repeats: int = 20,
    seed: int = 0,
    kind: Kind = "linear",
) -> pd.DataFrame:
    """AUROC on test cases of probes trained on a few cases of each class.

    Args:
        train_vectors: ``(N, E)``.
        train_labels: ``(N, K)``, nan = unknown.
        test_vectors: ``(M, E)``.
        test_labels: ``(M, K)``.
        findings: ``K`` names.
        test_patient_id: ``(M,)`` for intervals that resample patients; by default every case is
            one of its own.
        replicates: Bootstrap replicates of the test patients.
        shots: Cases of each class; ``None`` takes all, once.
        repeats: Draws of the few cases.
        seed: Of the draws.
        kind: See the module.

    Returns:
        Columns ``finding, shots, repeats, auroc, low, high, draws_low, draws_high``: mean over the
        draws; its 95 % interval for the AUROC of one probe so trained, over draws of the few and
        of the test patients at once; and the range that holds 95 % of the draws on these patients.
        Findings with too few cases for a size are absent there.
    """
    rng = np.random.default_rng(seed)
    patients = np.arange(len(test_labels)) if test_patient_id is None else test_patient_id
    draws = bootstrap.draw(patients, replicates, seed)
    rows = []
    for k, finding in enumerate(findings):
        positive = np.flatnonzero(train_labels[:, k] == 1.0)
        negative = np.flatnonzero(train_labels[:, k] == 0.0)
        for size in shots:
            if min(len(positive), len(negative)) < (size or 2):
                continue
            logits = []
            for _ in range(repeats if size else 1):
                if size is None:
                    chosen = np.concatenate([positive, negative])
                else:
                    chosen = np.concatenate(
                        [rng.choice(side, size, replace=False) for side in (positive, negative)]
                    )
                present = train_labels[chosen, k] == 1.0
                probe = fit(train_vectors[chosen], present, 1e-2, kind)
                logits.append(probe.logits(test_vectors))
            scores, label = np.stack(logits, axis=1), test_labels[:, [k] * len(logits)]
            areas = [metrics.auroc(label[:, 0], column) for column in scores.T]
            spread = bootstrap.replicate(draws, label, scores)
            if size is None:
                low, high = metrics.auroc_interval(
                    label[:, 0], scores[:, 0], patients, spread[:, 0]
                )
            else:
                low, high = bootstrap.interval(spread.ravel())
            draws_low, draws_high = np.quantile(areas, (0.025, 0.975)) if size else [np.nan] * 2
            rows.append(
                {
                    "finding": finding,
                    "shots": "all" if size is None else size,
                    "repeats": len(areas),
                    "auroc": float(np.mean(areas)),
                    "low": float(low),
                    "high": float(high),
                    "draws_low": float(draws_low),
                    "draws_high": float(draws_high),
                }
            )
    columns = ["finding", "shots", "repeats", "auroc", "low", "high", "draws_low", "draws_high"]
    return pd.DataFrame(rows, columns=columns)


def _cross(
    vectors: np.ndarray,
    present: np.ndarray,
    known: np.ndarray,
    fold: np.ndarray,
    num_folds: int,
    strength: float,
    kind: Kind,
) -> np.ndarray:
    logits = np.full(len(present), np.nan)
    for left_out in range(num_folds):
        train = known & (fold != left_out)
        probe = fit(vectors[train], present[train], strength, kind)
        logits[fold == left_out] = probe.logits(vectors[fold == left_out])
    return logits


def _choose_strength(
    vectors: np.ndarray,
    present: np.ndarray,
    known: np.ndarray,
    fold: np.ndarray,
    num_folds: int,
    seed: int,
    kind: Kind,
) -> float:
    rows = np.flatnonzero(known)
    if len(rows) > CHOICE_CASES:
        picked = np.random.default_rng(seed).choice(rows, CHOICE_CASES, replace=False)
        sides = [present[picked][fold[picked] != f] for f in range(num_folds)]
        if all(side.any() and not side.all() for side in sides):
            rows = np.sort(picked)
    losses = {}
    for strength in STRENGTHS:
        logits = _cross(
            vectors[rows], present[rows], known[rows], fold[rows], num_folds, strength, kind
        )
        signed = np.where(present[rows], logits, -logits)
        losses[strength] = float(np.logaddexp(0.0, -signed).mean())
    return min(losses, key=lambda strength: losses[strength])


def _features(vectors: np.ndarray, kind: Kind) -> np.ndarray:
    values = vectors.astype(np.float64)
    return np.maximum(values, 0.0) if kind == "classfine" else values
