"""Is the verdict of the train-set fit right where the reason was planted?

python benchmarks/train_fit.py
python benchmarks/train_fit.py --name phantom --ckpt runs/quickstart/train/model.safetensors … \
    --cohort runs/quickstart/cohort --truth runs/quickstart/phantoms

Simulated: 18 diseases with a known state each: learnt, invisible, seen only when large, missed by
its prompts, memorised, rare, and wrongly labelled; three seeds. Phantom: one checkpoint per seed;
labels of one disease that the model sees are flipped or dropped, and its verdict must be that its
labels are suspect; that of nodules below the resolution must be that they are too small; every
other disease's must be what the criteria say where labels are known to be right. Writes
benchmarks/results/train_fit.json, or train_fit_<name>.json.
"""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import label_audit as label_audit_benchmark
import numpy as np

from ctclip.embeddings import EmbeddingTable
from ctclip.evaluation import label_audit, planted, scoring, train_fit, verdicts
from ctclip.evaluation.label_audit import AuditConfig
from ctclip.evaluation.scores import ScoreTable
from ctclip.evaluation.scoring import ZeroShotConfig
from ctclip.evaluation.train_fit import TrainFitConfig
from ctclip.evaluation.verdicts import Verdict
from ctclip.findings import FINDINGS

WIDTH = 128
NODULE = FINDINGS.index("Lung nodule")
PLAN = (
    dict.fromkeys(range(18), Verdict.LEARNT)
    | {0: Verdict.SMALL, 1: Verdict.SMALL, 2: Verdict.PROMPTS, 3: Verdict.PROMPTS}
    | {4: Verdict.OVERFITS, 5: Verdict.OVERFITS, 6: Verdict.FEW, 7: Verdict.LABELS}
    | {NODULE: Verdict.SMALL}
)
RESOLUTION_MM = 9.0
"""Nodules below this leave no trace in the embedding."""


RATES = (0.05, 0.1, 0.2, 0.3)
CORRUPTED = 2
"""Diseases of each checkpoint that are corrupted, one at a time."""


def main() -> None:
    """Plant, judge, count."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--corruption", type=float, default=0.2, help="share of labels flipped")
    parser.add_argument("--ckpt", nargs="+", help="one checkpoint per seed")
    parser.add_argument("--cohort", nargs="+", help="prepared phantom cohort, of all or of each")
    parser.add_argument("--truth", nargs="+", help="phantom folder, of all or of each")
    parser.add_argument("--cache", default="runs/label_audit", help="folder of the embeddings")
    parser.add_argument("--name", help="of the result; the simulation has none")
    args = parser.parse_args()
    if args.ckpt:
        places = enumerate(label_audit_benchmark.places(args))
        runs = [run for seed, place in places for run in on_phantoms(place, seed, args.cache)]
    else:
        runs = [simulated(seed, args.corruption) for seed in range(args.seeds)]
    result = {"command": "python " + " ".join(sys.argv), "runs": runs}
    stem = "train_fit" if args.name is None else f"train_fit_{args.name}"
    path = Path(__file__).parent / "results" / f"{stem}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def simulated(seed: int, corruption: float) -> dict:
    """Every state planted into simulated embeddings."""
    found = judge(seed, corruption)
    wrong = [
        {"finding": j.evidence.finding, "planted": PLAN[k].value, "verdict": j.verdict.value}
        for k, j in enumerate(found)
        if j.verdict is not PLAN[k]
    ]
    return {"seed": seed, "right_of_18": 18 - len(wrong), "wrong": wrong}


def on_phantoms(place: tuple[str, str, str], seed: int, cache: str) -> list[dict]:
    """One checkpoint: errors of each kind and rate planted into diseases that it sees."""
    from ctclip import checkpoint as checkpoints

    case = label_audit_benchmark.phantoms(*place, cache)
    train, test, texts = case.train, case.test, case.texts
    checkpoint = checkpoints.load(place[0])
    config = TrainFitConfig(
        zero_shot=ZeroShotConfig(replicates=500), audit=AuditConfig(replicates=100, seed=seed)
    )
    sizes = train_fit.read_sizes(Path(place[2]) / "truth.csv")
    clean = label_audit.audit(train, texts, config.audit)
    tables = [
        scoring.score_embeddings(checkpoint, table, config.zero_shot, "model")
        for table in (train, test)
    ]
    token_mm = train_fit._token_mm(checkpoint)
    said = label_audit.read_reports(texts, train.volume_id)
    seen = [k for k in range(18) if clean.findings[k].auroc >= label_audit_benchmark.VISIBLE]
    rows = []
    for k in np.random.default_rng(seed).permutation(seen)[:CORRUPTED].tolist():
        for kind, rate in itertools.product(("flip", "drop"), RATES):
            labels = train.labels.copy()
            bad = planted.corrupt(labels[:, k], rate, kind, seed)
            labels[bad, k] = 1 - labels[bad, k]
            spoilt = replace(train, labels=labels)
            findings = list(clean.findings)
            findings[k] = label_audit._audit_finding(
                spoilt, k, np.asarray(train.patient_id), said, config.audit
            )
            audited = replace(clean, findings=findings)
            scored = [replace(tables[0], labels=labels.astype(float)), tables[1]]
            judged = train_fit.assess(scored, audited, config, sizes=sizes, token_mm=token_mm)
            wrong = []
            for j, judgement in enumerate(judged):
                expected = verdicts.judge(replace(judgement.evidence, noise=None), config.criteria)
                right = Verdict.LABELS if j == k else expected.verdict
                right = Verdict.SMALL if j == NODULE else right
                if judgement.verdict is not right:
                    name, verdict = judgement.evidence.finding, judgement.verdict.value
                    wrong.append({"finding": name, "right": right.value, "verdict": verdict})
            rows.append(
                {
                    "seed": seed,
                    "corrupted": FINDINGS[k],
                    "kind": kind,
                    "rate": rate,
                    "right_of_18": 18 - len(wrong),
                    "corrupted_called_suspect": judged[k].verdict is Verdict.LABELS,
                    "nodules_called_too_small": judged[NODULE].verdict is Verdict.SMALL,
                    "wrong": wrong,
                }
            )
    return rows


def judge(seed: int, corruption: float) -> list[train_fit.Judgement]:
    """One cohort with every state planted, and the verdicts on it."""
    rng = np.random.default_rng(seed)
    separation = np.resize([3.5, 4.0, 5.0], 18)
    separation[[0, 1]] = 0.0
    separation[[4, 5]] = 2.2
    prevalence = np.resize([0.12, 0.2, 0.35], 18)
    options = {"width": WIDTH, "separation": separation, "prevalence": prevalence}
    train, sizes = shrink(planted.table(2000, seed=50 + seed, **options), rng)
    test, _ = shrink(planted.table(800, seed=80 + seed, split="test", **options), rng)
    labels = train.labels.copy()
    bad = planted.corrupt(labels[:, 7], corruption, "flip", seed)
    labels[bad, 7] = 1 - labels[bad, 7]
    labels[:, 6] = 0
    labels[:8, 6] = 1
    train = replace(train, labels=labels)
    config = TrainFitConfig(
        zero_shot=ZeroShotConfig(replicates=500), audit=AuditConfig(replicates=100)
    )
    audited = label_audit.audit(train, None, config.audit)
    tables = [scored(train, seed, memorised=True), scored(test, seed + 1, memorised=False)]
    return train_fit.assess(tables, audited, config, sizes=sizes, token_mm=12.0)


def shrink(
    table: EmbeddingTable, rng: np.random.Generator
) -> tuple[EmbeddingTable, dict[tuple[str, str], float]]:
    """Give nodules sizes, and take those below the resolution out of the embedding."""
    size = np.exp(rng.normal(np.log(7.0), 0.45, size=len(table)))
    hidden = (table.labels[:, NODULE] == 1) & (size < RESOLUTION_MM)
    vectors = table.vectors.astype(np.float64)
    direction = planted.directions(table.width)[NODULE]
    along = vectors @ direction
    empty = rng.permutation(along[table.labels[:, NODULE] == 0])[: hidden.sum()]
    vectors[hidden] += (empty - along[hidden])[:, None] * direction
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = {
        (volume, "Lung nodule"): float(mm) for volume, mm in zip(table.volume_id, size, strict=True)
    }
    return replace(table, vectors=vectors.astype(np.float32)), names


def scored(table: EmbeddingTable, seed: int, *, memorised: bool) -> ScoreTable:
    """Zero-shot scores: along each direction, but for lost prompts and memorised labels."""
    rng = np.random.default_rng(seed)
    scores = table.vectors @ planted.directions(table.width).T
    scores[:, [2, 3]] = 0.1 * rng.normal(size=(len(table), 2))
    if memorised:
        scores[:, [4, 5]] += 0.25 * (table.labels[:, [4, 5]] - 0.5)
    return ScoreTable(
        volume_id=np.asarray(table.volume_id),
        study_id=np.asarray(table.study_id),
        patient_id=np.asarray(table.patient_id),
        split=np.asarray(table.split),
        findings=FINDINGS,
        labels=table.labels.astype(float),
        scores=scores,
        header={"model": "simulated"},
    )


if __name__ == "__main__":
    main()
