"""How long does the whole report take for as many scores as CT-RATE's validation set?

python benchmarks/report.py

Writes a score table of 3,039 volumes x 18 findings with development cases and subgroups, runs
``eval/report.py`` on it as a user would, and writes its time and memory to
benchmarks/results/report.json.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ctclip.evaluation.scores import ScoreTable
from ctclip.findings import FINDINGS

VOLUMES, PATIENTS, DEVELOPMENT = 3039, 1304, 1000
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write, run, measure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        table().save(path)
        command = [sys.executable, str(ROOT / "eval" / "report.py"), str(path)]
        command += ["--protocol", "ct-rate-18-volumes", "--out", str(Path(folder) / "report")]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        size = (Path(folder) / "report" / "report.html").stat().st_size
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "command": "python benchmarks/report.py",
        "volumes": VOLUMES,
        "development_volumes": DEVELOPMENT,
        "findings": len(FINDINGS),
        "replicates": 2000,
        "cores": len(os.sched_getaffinity(0)),
        "wall_s": round(seconds, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
        "page_kib": round(size / 1024),
    }
    path = Path(__file__).parent / "results" / "report.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def table() -> ScoreTable:
    """Scores between 0 and 1 with patients, two splits and three subgroup columns."""
    rng = np.random.default_rng(0)
    total = VOLUMES + DEVELOPMENT
    first = np.arange(PATIENTS)
    patient = np.sort(np.r_[first, rng.integers(PATIENTS, size=VOLUMES - PATIENTS)])
    patient = np.r_[patient, PATIENTS + np.arange(DEVELOPMENT) // 2]
    labels = (rng.random((total, 18)) < np.linspace(0.03, 0.45, 18)).astype(float)
    scores = 1 / (1 + np.exp(-rng.normal(size=labels.shape) - 1.5 * labels + 1))
    return ScoreTable(
        volume_id=np.array([f"v{i}" for i in range(total)]),
        study_id=np.array([f"v{i}" for i in range(total)]),
        patient_id=np.array([f"p{i}" for i in patient]),
        split=np.where(np.arange(total) < VOLUMES, "test", "valid"),
        findings=FINDINGS,
        labels=labels,
        scores=scores,
        header={"model": "simulated"},
        meta={
            "sex": rng.choice(["F", "M"], total),
            "age": rng.integers(20, 90, total).astype(str),
            "kernel": rng.choice(["B30f", "B70f", "L"], total),
        },
    )


if __name__ == "__main__":
    main()
