"""Is the verdict of the train-set fit right where the reason was planted?

python benchmarks/train_fit.py

18 diseases with a known state each: learnt, invisible, seen only when large, missed by its
prompts, memorised, rare, and wrongly labelled. Embeddings are simulated, so that the state is
known exactly; three seeds. Writes benchmarks/results/train_fit.json.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from ctclip.embeddings import EmbeddingTable
from ctclip.evaluation import label_audit, planted, train_fit
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


def main() -> None:
    """Plant, judge, count."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--corruption", type=float, default=0.2, help="share of labels flipped")
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        found = judge(seed, args.corruption)
        wrong = [
            {"finding": j.evidence.finding, "planted": PLAN[k].value, "verdict": j.verdict.value}
            for k, j in enumerate(found)
            if j.verdict is not PLAN[k]
        ]
        runs.append({"seed": seed, "right_of_18": 18 - len(wrong), "wrong": wrong})
    result = {
        "command": f"python benchmarks/train_fit.py --seeds {args.seeds} "
        f"--corruption {args.corruption}",
        "runs": runs,
    }
    path = Path(__file__).parent / "results" / "train_fit.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


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
        zero_shot=ZeroShotConfig(replicates=500), audit=AuditConfig(replicates=40)
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
