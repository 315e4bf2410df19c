"""Do 95 % intervals hold the true AUROC and average precision in 95 % of data sets?

python benchmarks/coverage.py
python benchmarks/coverage.py --part macro --datasets 200 --replicates 300

Simulates data sets with a known AUROC and one to three volumes per patient that share the
patient's label and half of the score's variance, and counts how often the interval that
``metrics.evaluate`` gives holds it. Beside it, always: percentiles of the bootstrap over patients,
the same over volumes as if they were independent, and DeLong's normal interval. The part "macro"
does it for 18 such findings at once, for each and for their mean, AUROC and average precision.
Writes its part of benchmarks/results/coverage.json.
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
from ctclip.evaluation.scores import ScoreTable
from ctclip.findings import FINDINGS

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


MACRO_SETTINGS = {
    "100 patients, AUROC 0.80, 10 % positive": (100, 0.80, 0.1),
    "100 patients, AUROC 0.95, 10 % positive": (100, 0.95, 0.1),
    "100 patients, AUROC 0.80, 20 % positive": (100, 0.80, 0.2),
    "300 patients, AUROC 0.80, 10 % positive": (300, 0.80, 0.1),
    "440 patients, AUROC 0.75, 20 % positive": (440, 0.75, 0.2),
    "1304 patients, AUROC 0.80, 10 % positive": (1304, 0.80, 0.1),
}


def simulate(
    rng: np.random.Generator, patients: int, area: float, prevalence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patient, label and score of each volume; the AUROC over volumes is ``area`` on average."""
    patient = np.repeat(np.arange(patients), rng.integers(1, 4, size=patients))
    return patient, *_finding(rng, patient, area, prevalence)


def _finding(
    rng: np.random.Generator, patient: np.ndarray, area: float, prevalence: float
) -> tuple[np.ndarray, np.ndarray]:
    patients = patient[-1] + 1
    label = (rng.random(patients) < prevalence)[patient]
    noise = rng.normal(size=patients)[patient] + rng.normal(size=len(patient))
    shift = norm.ppf(area) * np.sqrt(2)  # in units of the score's standard deviation
    return label, noise / np.sqrt(2) + shift * label


def main() -> None:
    """Run every setting of a part and write the coverage with its own error."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--part", choices=["auroc", "macro"], default="auroc")
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--replicates", type=int, default=1000)
    args = parser.parse_args()
    path = Path(__file__).parent / "results" / "coverage.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    measure = macro_setting if args.part == "macro" else auroc_setting
    settings = MACRO_SETTINGS if args.part == "macro" else SETTINGS
    result[args.part] = {
        "command": f"python benchmarks/coverage.py --part {args.part} "
        f"--datasets {args.datasets} --replicates {args.replicates}",
        "nominal_pct": 95,
        "settings": [
            {"setting": name} | measure(name, *values, args.datasets, args.replicates)
            for name, values in settings.items()
        ],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result[args.part], indent=1))


def auroc_setting(
    name: str, patients: int, area: float, prevalence: float, datasets: int, replicates: int
) -> dict[str, object]:
    """Coverage of every kind of interval of one finding's AUROC."""
    rng = np.random.default_rng(patients + int(100 * area))
    hits = {"reported": 0, "patients": 0, "volumes": 0, "DeLong, clustered": 0}
    widths, used = [], 0
    for seed in tqdm(range(datasets), desc=name, disable=not sys.stderr.isatty()):
        patient, label, score = simulate(rng, patients, area, prevalence)
        if len(np.unique(patient[label])) < 2:
            continue
        used += 1
        labels, scores = label.astype(float)[:, None], score[:, None]
        for how, units in (("patients", patient), ("volumes", np.arange(len(patient)))):
            draws = bootstrap.draw(units, replicates, seed)
            spread = bootstrap.replicate(draws, labels, scores)[:, 0]
            low, high = bootstrap.interval(spread)
            hits[how] += low <= area <= high
            if how == "patients":
                low, high = metrics.auroc_interval(labels[:, 0], score, patient, spread)
                hits["reported"] += low <= area <= high
                widths.append(high - low)
        low, high = delong(label, scores.T, patient).interval()
        hits["DeLong, clustered"] += low <= area <= high
    return {
        "datasets": used,
        "coverage_pct": {how: round(100 * count / used, 1) for how, count in hits.items()},
        "standard_error_pct": round(100 * np.sqrt(0.95 * 0.05 / used), 1),
        "mean_width": round(float(np.mean(widths)), 4),
    }


def macro_setting(
    name: str, patients: int, area: float, prevalence: float, datasets: int, replicates: int
) -> dict[str, object]:
    """Coverage of what ``metrics.evaluate`` reports of 18 findings that are all alike."""
    rng = np.random.default_rng(patients + int(100 * area))
    _, label, score = simulate(rng, 1_000_000, area, prevalence)
    truth = {"auroc": area, "average_precision": metrics.average_precision(label * 1.0, score)}
    hits: dict[str, list[bool]] = {}
    for seed in tqdm(range(datasets), desc=name, disable=not sys.stderr.isatty()):
        patient = np.repeat(np.arange(patients), rng.integers(1, 4, size=patients))
        columns = [_finding(rng, patient, area, prevalence) for _ in FINDINGS]
        table = ScoreTable(
            volume_id=np.arange(len(patient)).astype(str),
            study_id=np.arange(len(patient)).astype(str),
            patient_id=patient.astype(str),
            split=np.full(len(patient), "test"),
            findings=FINDINGS,
            labels=np.stack([label.astype(float) for label, _ in columns], axis=1),
            scores=np.stack([score for _, score in columns], axis=1),
        )
        found = metrics.evaluate(table, replicates=replicates, seed=seed)
        rows = [("macro", found.macro)]
        rows += [("finding", vars(row)) for row in found.findings if row.positive_patients > 1]
        for kind, row in rows:
            for value, true in truth.items():
                held = row[f"{value}_low"] <= true <= row[f"{value}_high"]
                hits.setdefault(f"{kind} {value}", []).append(held)
    return {
        "datasets": datasets,
        "average_precision": round(truth["average_precision"], 3),
        "coverage_pct": {how: round(100 * float(np.mean(held)), 1) for how, held in hits.items()},
        "standard_error_pct_macro": round(100 * np.sqrt(0.95 * 0.05 / datasets), 1),
    }


if __name__ == "__main__":
    main()
