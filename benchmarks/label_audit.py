"""Does the audit find errors that were planted?

python benchmarks/label_audit.py
python benchmarks/label_audit.py --train train.parquet --test test.parquet \
    --truth cohort/truth_labels.csv --name phantom

Takes embeddings whose true labels are known (simulated ones, or an export of a phantom cohort with
its truth), makes some labels of one finding wrong, and asks the audit how many and which. Then
every finding's labels are made as bad as readers who agree in 70 % of cases, the audit corrects
them, and a probe is trained on either. Writes benchmarks/results/label_audit_<name>.json.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ctclip.embeddings import EmbeddingTable
from ctclip.evaluation import compare, label_audit, metrics, noise, planted, probes
from ctclip.evaluation.label_audit import AuditConfig
from ctclip.evaluation.scores import ScoreTable
from ctclip.findings import FINDINGS

RATES = (0.05, 0.1, 0.2, 0.3)
SEPARATION = np.tile([0.0, 1.5, 2.5, 3.0, 4.0, 5.0], 3)
PREVALENCE = np.repeat([0.1, 0.2, 0.35], 6)
VISIBLE = 0.85
"""Probe AUROC against the truth from which "findings that the model can see" is meant."""

TWO_READERS = 0.184
"""Share of wrong labels at which two independent readers agree in 70 % of cases."""


def main() -> None:
    """Run every seed, rate and kind."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--train", help="EmbeddingTable of the audited patients")
    parser.add_argument("--test", help="EmbeddingTable of other patients")
    parser.add_argument("--truth", help="CSV with volume_id and the true labels")
    parser.add_argument("--name", default="simulated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--findings", type=int, default=6, help="visible ones tried per seed")
    args = parser.parse_args()

    rows, corrections, visible_counts = [], [], []
    for seed in range(args.seeds):
        train, test = tables(args, seed)
        patient = np.asarray(train.patient_id)
        areas = []
        for k in range(18):
            logits = probes.out_of_fold(train.vectors, train.labels[:, k], patient)
            areas.append(metrics.auroc(train.labels[:, k], logits))
        visible = [k for k in range(18) if areas[k] >= VISIBLE]
        visible_counts.append(len(visible))
        chosen = np.random.default_rng(seed).permutation(visible)[: args.findings]
        jobs = [(k, kind, rate) for k in chosen for kind in ("flip", "drop") for rate in RATES]
        for k, kind, rate in tqdm(jobs, desc=f"seed {seed}", disable=not sys.stderr.isatty()):
            rows.append(one(train, int(k), kind, rate, seed) | {"auroc_truth": areas[k]})
        corrections.append(correct(train, test, seed))
    frame = pd.DataFrame(rows)
    summary = []
    for (kind, rate), group in frame.groupby(["kind", "rate"]):
        summary.append(
            {
                "kind": kind,
                "rate": rate,
                "cases": len(group),
                "estimate_mean": round(group["estimate"].mean(), 4),
                "within_5_points": round(float((group["error"].abs() <= 0.05).mean()), 3),
                "interval_holds_rate": round(float(group["held"].mean()), 3),
                "top_k_truly_wrong": round(group["top_k"].mean(), 3),
                "top_k_random": round(group["chance"].mean(), 3),
                "cleanlab_count_estimate": round(group["cleanlab"].mean(), 4)
                if kind == "flip"
                else None,
            }
        )
    result = {
        "command": "python " + " ".join(sys.argv),
        "source": "simulated embeddings" if args.train is None else args.train,
        "volumes": len(train),
        "visible_findings_per_seed": visible_counts,
        "definition": "flip: estimate is the share of all labels that are wrong; "
        "drop: the share of true positives labelled absent",
        "rates": summary,
        "two_readers_70_percent": corrections,
    }
    path = Path(__file__).parent / "results" / f"label_audit_{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def tables(args: argparse.Namespace, seed: int) -> tuple[EmbeddingTable, EmbeddingTable]:
    """Training and test embeddings with true labels."""
    if args.train is None:
        options = {"width": 128, "separation": SEPARATION, "prevalence": PREVALENCE}
        train = planted.table(2000, seed=10 * seed, **options)
        return train, planted.table(1000, seed=10 * seed + 1, split="test", **options)
    truth = pd.read_csv(args.truth, dtype={"volume_id": str}).set_index("volume_id")
    found = []
    for path in (args.train, args.test):
        table = EmbeddingTable.load(path)
        labels = truth.loc[table.volume_id, list(FINDINGS)].to_numpy(np.float32)
        found.append(replace(table, labels=labels))
    return found[0], found[1]


def one(train: EmbeddingTable, k: int, kind: str, rate: float, seed: int) -> dict:
    """Corrupt one finding and audit it."""
    labels = train.labels[:, k].astype(float)
    bad = planted.corrupt(labels, rate, kind, seed)
    labels[bad] = 1 - labels[bad]
    patient = np.asarray(train.patient_id)
    logits = probes.out_of_fold(train.vectors, labels, patient, seed=seed)
    found = noise.estimate(logits, labels, patient, replicates=50, seed=seed)
    name = "wrong" if kind == "flip" else "missed"
    estimate = getattr(found, name)
    true = len(bad) / (len(labels) if kind == "flip" else (train.labels[:, k] == 1).sum())
    top = np.argsort(-found.posterior, kind="stable")[: len(bad)]
    flagged = label_audit._confident_learning(labels, 1 / (1 + np.exp(-logits)))
    return {
        "finding": FINDINGS[k],
        "kind": kind,
        "rate": rate,
        "estimate": estimate,
        "error": estimate - true,
        "held": getattr(found, f"{name}_low") <= true <= getattr(found, f"{name}_high"),
        "top_k": float(np.isin(top, bad).mean()),
        "chance": len(bad) / len(labels),
        "cleanlab": float(flagged.mean()) if kind == "flip" else np.nan,
    }


def correct(train: EmbeddingTable, test: EmbeddingTable, seed: int) -> dict:
    """Noise in every finding, audit, retrain: AUROC on the truth, paired."""
    labels = train.labels.copy()
    for k in range(18):
        bad = planted.corrupt(labels[:, k], TWO_READERS, "flip", seed + k)
        labels[bad, k] = 1 - labels[bad, k]
    noisy = replace(train, labels=labels)
    audit = label_audit.audit(noisy, None, AuditConfig(replicates=20, seed=seed))
    cleaned = label_audit.cleaned(labels, audit)
    scored = {}
    for name, used in (("noisy", labels), ("corrected", cleaned), ("true", train.labels)):
        columns = [
            probes.fit(train.vectors, used[:, k] == 1, 1e-2).logits(test.vectors) for k in range(18)
        ]
        scored[name] = ScoreTable(
            volume_id=np.asarray(test.volume_id),
            study_id=np.asarray(test.study_id),
            patient_id=np.asarray(test.patient_id),
            split=np.asarray(test.split),
            findings=FINDINGS,
            labels=test.labels.astype(float),
            scores=np.stack(columns, axis=1),
            header={"model": name},
        )
    gain = compare.compare(scored["noisy"], scored["corrected"], 2000, seed).macro
    ceiling = compare.compare(scored["noisy"], scored["true"], 0, seed).macro
    return {
        "seed": seed,
        "labels_wrong_before": round(float((labels != train.labels).mean()), 4),
        "labels_wrong_after": round(float((cleaned != train.labels).mean()), 4),
        "macro_auroc_noisy": round(gain.auroc_a, 4),
        "macro_auroc_corrected": round(gain.auroc_b, 4),
        "macro_auroc_true_labels": round(ceiling.auroc_b, 4),
        "gain": round(gain.difference, 4),
        "gain_interval": [round(gain.low, 4), round(gain.high, 4)],
    }


if __name__ == "__main__":
    main()
