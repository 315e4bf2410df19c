"""Speed of the patient-grouped bootstrap against a loop over scikit-learn, in one run.

python benchmarks/bootstrap.py

Writes benchmarks/results/bootstrap.json. The loop is timed on some of the replicates and scaled.
"""

import json
import platform
import time
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from ctclip.evaluation import bootstrap

VOLUMES, PATIENTS, FINDINGS, REPLICATES = 3039, 1304, 18, 10_000
"""CT-RATE's validation set."""

LOOP_REPLICATES = 20


def main() -> None:
    """Time both and check that they agree."""
    rng = np.random.default_rng(0)
    first = np.arange(PATIENTS)
    patient = np.sort(np.r_[first, rng.integers(PATIENTS, size=VOLUMES - PATIENTS)])
    labels = (rng.random((VOLUMES, FINDINGS)) < np.linspace(0.07, 0.45, FINDINGS)).astype(float)
    scores = rng.normal(size=labels.shape) + labels

    start = time.perf_counter()
    draws = bootstrap.draw(patient, REPLICATES, seed=0)
    areas = bootstrap.replicate(draws, labels, scores)
    ours_s = time.perf_counter() - start

    rows = [np.flatnonzero(patient == p) for p in range(PATIENTS)]
    counts = draws.counts[0].astype(int)
    worst = 0.0
    start = time.perf_counter()
    for r in range(LOOP_REPLICATES):
        drawn = np.concatenate([rows[p] for p in np.repeat(first, counts[:, r])])
        for k in range(FINDINGS):
            area = roc_auc_score(labels[drawn, k], scores[drawn, k])
            worst = max(worst, abs(area - areas[r, k]))
    loop_s = (time.perf_counter() - start) * REPLICATES / LOOP_REPLICATES

    result = {
        "command": "python benchmarks/bootstrap.py",
        "machine": f"{platform.processor() or platform.machine()}, one thread",
        "replicates": REPLICATES,
        "findings": FINDINGS,
        "volumes": VOLUMES,
        "patients": PATIENTS,
        "ctclip_s": round(ours_s, 2),
        "scikit_learn_loop_s": round(loop_s, 1),
        "scikit_learn_loop_note": f"measured on {LOOP_REPLICATES} replicates, scaled",
        "times_faster": round(loop_s / ours_s, 1),
        "largest_difference": float(worst),
    }
    path = Path(__file__).parent / "results" / "bootstrap.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
