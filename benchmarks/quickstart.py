"""How far the quickstart's result is luck: other seeds, and the reports shuffled.

    python benchmarks/quickstart.py --run runs/quickstart --seeds 0 1 2 --shuffled

Takes the cohort that ``make quickstart`` prepared, pretrains once per seed with the quickstart's
config and scores the held-out patients. ``--shuffled`` also trains on the reports of other
patients: what is learned then can only come from a leak, so its AUROC has to stay at 0.50. A
finding counts as learnt by its AUROC on the development split, never by the held-out one. Finished
runs are kept and not repeated. Writes benchmarks/results/quickstart.json.
"""

import argparse
import csv
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ctclip.summary import learnt_findings

CONFIG = "configs/pretrain/quickstart.yaml"
TEXT_COLUMNS = ("findings", "impression")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shuffled", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quickstart.json"))
    args = parser.parse_args()

    cohort = next((args.run / "cohort").glob("*/manifest.csv")).parent
    results = {}
    for seed in args.seeds:
        folder = args.run if seed == 0 else args.run / f"seed{seed}"
        results[f"seed {seed}"] = pretrain_and_score(cohort, folder, seed)
    if args.shuffled:
        shuffled = shuffle_reports(cohort, args.run / "shuffled" / "cohort" / cohort.name)
        results["shuffled reports"] = pretrain_and_score(shuffled, args.run / "shuffled", 0)

    learnt = [r["macro_learnt"] for name, r in results.items() if name.startswith("seed")]
    summary = {
        "command": " ".join(sys.argv),
        "macro_learnt_min": min(learnt),
        "macro_learnt_max": max(learnt),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(summary | {"runs": results}, indent=1) + "\n")
    print_table(results)


def pretrain_and_score(cohort: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Run the two commands of the README, as far as they have not run; AUROC per finding."""
    scores = folder / "zero_shot" / "auc.json"
    if not scores.exists():
        bin_folder = Path(sys.executable).parent
        ckpt = folder / "train" / "model.safetensors"
        run(
            f"{bin_folder}/deepspeed --num_gpus 2 --master_port {free_port()} train/pretrain.py "
            f"--config {CONFIG} cohort={cohort} out={folder}/train seed={seed}"
        )
        run(
            f"{sys.executable} eval/zero_shot.py --ckpt {ckpt} --cohort {cohort} --split test "
            f"--out {folder}/zero_shot"
        )
    result = json.loads(scores.read_text())
    areas = {row["finding"]: row["auroc"] for row in result["findings"]}
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    learnt = learnt_findings([json.loads(line) for line in lines], list(areas))
    return {
        "macro": result["macro"]["auroc"],
        "learnt": learnt,
        "macro_learnt": sum(areas[f] for f in learnt) / len(learnt) if learnt else None,
        "findings": areas,
    }


def run(command: str) -> None:
    """Run a command on the CPU with one thread a process, as the Makefile does."""
    defaults = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    subprocess.run(command.split(), check=True, env=defaults | dict(os.environ))


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shuffle_reports(cohort: Path, out: Path) -> Path:
    """Copy a prepared cohort with every training report given to another training patient."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "volumes").mkdir(exist_ok=True)
    for volume in (cohort / "volumes").iterdir():
        linked = out / "volumes" / volume.name
        if not linked.exists():  # it does where an earlier run was interrupted
            os.link(volume, linked)
    shutil.copy(cohort / "recipe.yaml", out / "recipe.yaml")
    with (cohort / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["split"] == "train"]
    order = random.Random(0).sample(range(len(train)), len(train))
    texts = [[train[i][column] for column in TEXT_COLUMNS] for i in order]
    for row, text in zip(train, texts, strict=True):
        row.update(zip(TEXT_COLUMNS, text, strict=True))
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return out


def print_table(results: dict[str, dict]) -> None:
    """AUROC per finding, one column per run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Zero-shot AUROC on held-out phantom patients (·: not learnt on development)"
    )
    table.add_column("finding")
    for name in results:
        table.add_column(name, justify="right")
    findings = next(iter(results.values()))["findings"]
    for finding in findings:
        cells = (
            f"{result['findings'][finding]:.3f}" + ("" if finding in result["learnt"] else " ·")
            for result in results.values()
        )
        table.add_row(finding, *cells)
    table.add_row("macro", *(f"{result['macro']:.3f}" for result in results.values()), style="bold")
    shown = (result["macro_learnt"] for result in results.values())
    table.add_row("macro, learnt", *("none" if m is None else f"{m:.3f}" for m in shown))
    Console().print(table)


if __name__ == "__main__":
    main()
