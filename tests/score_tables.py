"""Score tables of known quality, for the tests of the evaluation."""

import numpy as np

from ctclip.evaluation.scores import ScoreTable


def cohort(
    n: int = 400,
    findings: tuple[str, ...] = ("Emphysema", "Lung nodule"),
    separation: float = 1.0,
    seed: int = 0,
    **header: str,
) -> ScoreTable:
    """Two volumes per patient; scores are normal, shifted by ``separation`` where positive."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, len(findings))) < 0.3).astype(float)
    return ScoreTable(
        volume_id=np.array([f"v{i}" for i in range(n)]),
        study_id=np.array([f"s{i}" for i in range(n)]),
        patient_id=np.array([f"p{i // 2}" for i in range(n)]),
        split=np.full(n, "test"),
        findings=findings,
        labels=labels,
        scores=rng.normal(size=(n, len(findings))) + separation * labels,
        header={"model": "toy", **header},
    )
