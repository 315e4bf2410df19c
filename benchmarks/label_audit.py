"""Does the audit find errors that were planted?

python benchmarks/label_audit.py
python benchmarks/label_audit.py --name phantom --ckpt runs/quickstart/train/model.safetensors … \
    --cohort runs/quickstart/cohort --truth runs/quickstart/phantoms

Takes embeddings whose true labels are known (simulated ones, or those of a phantom cohort by one
checkpoint per seed), makes some labels of one finding wrong, and asks the audit how many and
which: from the image alone, and with the reports as further evidence. Then every finding's labels
are made as bad as readers who agree in 70 % of cases, the audit corrects them from the image, and
a probe is trained on either. Writes benchmarks/results/label_audit_<name>.json.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Case:
    """What one seed is measured on; labels are the truth."""

    train: EmbeddingTable
    test: EmbeddingTable
    """Every other patient."""

    texts: dict[str, str] | None = None


def main() -> None:
    """Run every seed, rate and kind."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--ckpt", nargs="+", help="one checkpoint per seed")
    parser.add_argument("--cohort", nargs="+", help="prepared phantom cohort, of all or of each")
    parser.add_argument("--truth", nargs="+", help="phantom folder, of all or of each")
    parser.add_argument("--cache", default="runs/label_audit", help="folder of the embeddings")
    parser.add_argument("--name", default="simulated")
    parser.add_argument("--seeds", type=int, default=3, help="of the simulation")
    parser.add_argument(
        "--findings", type=int, default=6, help="visible ones per seed; 0: readers only"
    )
    args = parser.parse_args()

    rows, corrections, visible = [], [], []
    for seed, case in enumerate(cases(args)):
        train, patient = case.train, np.asarray(case.train.patient_id)
        areas = []
        for k in range(18 if args.findings else 0):
            logits = probes.out_of_fold(train.vectors, train.labels[:, k], patient)
            areas.append(metrics.auroc(train.labels[:, k], logits))
        seen = [k for k, area in enumerate(areas) if area >= VISIBLE]
        visible.append({FINDINGS[k]: round(areas[k], 3) for k in seen})
        chosen = np.random.default_rng(seed).permutation(seen)[: args.findings]
        jobs = [(k, kind, rate) for k in chosen for kind in ("flip", "drop") for rate in RATES]
        for k, kind, rate in tqdm(jobs, desc=f"seed {seed}", disable=not sys.stderr.isatty()):
            rows += one(case, int(k), kind, rate, seed)
        corrections.append(correct(train, case.test, seed))
    result = {
        "command": "python " + " ".join(sys.argv),
        "volumes": len(train),
        "visible": visible,
        "definition": "flip: estimate is the share of all labels that are wrong; drop: the share "
        "of true positives labelled absent. withheld: the audit gave no rate",
        "rates": summarise(pd.DataFrame(rows)),
        "two_readers_70_percent": corrections,
        "cases": rows,
    }
    path = Path(__file__).parent / "results" / f"label_audit_{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["rates"], indent=1))
    print(json.dumps(corrections, indent=1))


def summarise(frame: pd.DataFrame) -> list[dict]:
    """Means over seeds and findings, per evidence, kind and rate."""
    rows: list[dict] = []
    if frame.empty:
        return rows
    for (evidence, kind, rate), group in frame.groupby(["evidence", "kind", "rate"]):
        rated = group[~group["withheld"]]
        rows.append(
            {
                "evidence": evidence,
                "kind": kind,
                "rate": rate,
                "cases": len(group),
                "withheld": int(group["withheld"].sum()),
                "estimate_mean": round(rated["estimate"].mean(), 4),
                "within_5_points": round(float((rated["error"].abs() <= 0.05).mean()), 3),
                "interval_holds_rate": round(float(rated["held"].mean()), 3),
                "top_k_truly_wrong": round(group["top_k"].mean(), 3),
                "top_k_random": round(group["chance"].mean(), 3),
            }
        )
    return rows


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Training and test embeddings with true labels, one pair per seed."""
    if args.ckpt is None:
        options = {"width": 128, "separation": SEPARATION, "prevalence": PREVALENCE}
        for seed in range(args.seeds):
            train = planted.table(2000, seed=10 * seed, **options)
            yield Case(train, planted.table(1000, seed=10 * seed + 1, split="test", **options))
        return
    for ckpt, cohort, folder in places(args):
        yield phantoms(ckpt, cohort, folder, args.cache)


def places(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Checkpoint, cohort and phantom folder of each seed."""
    for index, ckpt in enumerate(args.ckpt):
        yield ckpt, args.cohort[index % len(args.cohort)], args.truth[index % len(args.truth)]


def phantoms(ckpt: str, cohort: str, folder: str, cache: str) -> Case:
    """Embeddings of a phantom cohort, computed once, with its true labels and its reports."""
    from ctclip import checkpoint as checkpoints
    from ctclip.data.cohort import PreparedCohort
    from ctclip.data.report import report_text
    from ctclip.embeddings import embed_volumes
    from ctclip.embeddings.table import concatenate

    checkpoint, prepared = checkpoints.load(ckpt), PreparedCohort.open(cohort)
    name = checkpoint.sha256[:12]
    truth = pd.read_csv(Path(folder) / "truth_labels.csv", dtype={"volume_id": str})
    truth = truth.set_index("volume_id")[list(FINDINGS)]
    tables = []
    for split in ("train", "valid", "test"):
        out = Path(cache) / f"embeddings-{split}-{name}.parquet"
        table = embed_volumes(checkpoint, prepared, prepared.split(split), out=out)
        labels = truth.loc[table.volume_id].to_numpy(np.float32)
        tables.append(replace(table, labels=labels))
    records = prepared.split("train")
    texts = {r.volume_id: report_text(r.findings, r.impression) for r in records}
    return Case(tables[0], concatenate(tables[1:]), texts)


def one(case: Case, k: int, kind: str, rate: float, seed: int) -> list[dict]:
    """Corrupt one finding and audit it, from the image alone and with the reports."""
    truth = case.train.labels[:, k].astype(float)
    bad = planted.corrupt(truth, rate, kind, seed)
    labels = truth.copy()
    labels[bad] = 1 - labels[bad]
    patient = np.asarray(case.train.patient_id)
    logits = probes.out_of_fold(case.train.vectors, labels, patient, seed=seed)
    read = {"image": None}
    if case.texts is not None:
        said = label_audit.read_reports(case.texts, case.train.volume_id)
        read["image and report"] = label_audit.readings(said, FINDINGS[k])
    name = "wrong" if kind == "flip" else "missed"
    true = len(bad) / (len(labels) if kind == "flip" else (truth == 1).sum())
    rows = []
    for evidence, readings in read.items():
        found = noise.estimate(logits, labels, patient, readings=readings, replicates=50, seed=seed)
        top = np.argsort(-found.posterior, kind="stable")[: len(bad)]
        estimate = getattr(found, name)
        held = getattr(found, f"{name}_low") <= true <= getattr(found, f"{name}_high")
        rows.append(
            {
                "seed": seed,
                "finding": FINDINGS[k],
                "kind": kind,
                "rate": rate,
                "evidence": evidence,
                "withheld": not found.is_identified,
                "estimate": round(estimate, 4),
                "error": round(estimate - true, 4),
                "held": bool(held),
                "top_k": round(float(np.isin(top, bad).mean()), 3),
                "chance": round(len(bad) / len(labels), 4),
            }
        )
    return rows


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
