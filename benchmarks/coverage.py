"""Do 95 % intervals hold the true AUROC in 95 % of data sets?

python benchmarks/coverage.py

Simulates data sets with a known AUROC and one to three volumes per patient that share the
patient's label and half of the score's variance, and counts how often the interval that
``metrics.evaluate`` gives holds it. Beside it, always: percentiles of the bootstrap over patients,
the same over volumes as if they were independent, and DeLong's normal interval.
Writes benchmarks/results/coverage.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm
from tqdm import tqdm

from ctclip.evaluation import bootstrap, metrics
from ctclip.evaluation.delong import delong

SETTINGS = {
    "300 patients, AUROC 0.75, 20 % positive": (300, 0.75, 0.2),
    "300 patients, AUROC 0.90, 20 % positive": (300, 0.90, 0.2),
    "1304 patients, AUROC 0.80, 10 % positive": (1304, 0.80, 0.1),
    "100 patients, AUROC 0.80, 30 % positive": (100, 0.80, 0.3),
    "300 patients, AUROC 0.95, 10 % positive": (300, 0.95, 0.1),
    "200 patients, AUROC 0.97, 10 % positive": (200, 0.97, 0.1),
    "100 patients, AUROC 0.95, 10 % positive": (100, 0.95, 0.1),
    "100 patients, AUROC 0.80, 10 % positive": (100, 0.80, 0.1),
    "100 patients, AUROC 0.95, 5 % positive": (100, 0.95, 0.05),
}


def simulate(
    rng: np.random.Generator, patients: int, area: float, prevalence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patient, label and score of each volume; the AUROC over volumes is ``area`` on average."""
    volumes = rng.integers(1, 4, size=patients)
    patient = np.repeat(np.arange(patients), volumes)
    label = np.repeat(rng.random(patients) < prevalence, volumes)
    noise = np.repeat(rng.normal(size=patients), volumes) + rng.normal(size=len(patient))
    shift = norm.ppf(area) * np.sqrt(2)  # in units of the score's standard deviation
    return patient, label, noise / np.sqrt(2) + shift * label


def main() -> None:
    """Run every setting and write the coverage with its own error."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--replicates", type=int, default=1000)
    args = parser.parse_args()
    rows = []
    for name, (patients, area, prevalence) in SETTINGS.items():
        rng = np.random.default_rng(patients + int(100 * area))
        hits = {"reported": 0, "patients": 0, "volumes": 0, "DeLong, clustered": 0}
        widths, used = [], 0
        hidden = not sys.stderr.isatty()
        for seed in tqdm(range(args.datasets), desc=name, disable=hidden):
            patient, label, score = simulate(rng, patients, area, prevalence)
            if len(np.unique(patient[label])) < 2:
                continue
            used += 1
            labels, scores = label.astype(float)[:, None], score[:, None]
            for how, units in (("patients", patient), ("volumes", np.arange(len(patient)))):
                draws = bootstrap.draw(units, args.replicates, seed)
                spread = bootstrap.replicate(draws, labels, scores)[:, 0]
                low, high = bootstrap.interval(spread)
                hits[how] += low <= area <= high
                if how == "patients":
                    low, high = metrics.auroc_interval(labels[:, 0], score, patient, spread)
                    hits["reported"] += low <= area <= high
                    widths.append(high - low)
            low, high = delong(label, scores.T, patient).interval()
            hits["DeLong, clustered"] += low <= area <= high
        rows.append(
            {
                "setting": name,
                "datasets": used,
                "coverage_pct": {how: round(100 * count / used, 1) for how, count in hits.items()},
                "standard_error_pct": round(100 * np.sqrt(0.95 * 0.05 / used), 1),
                "mean_width": round(float(np.mean(widths)), 4),
            }
        )
    result = {
        "command": f"python benchmarks/coverage.py --datasets {args.datasets} "
        f"--replicates {args.replicates}",
        "nominal_pct": 95,
        "settings": rows,
    }
    path = Path(__file__).parent / "results" / "coverage.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
