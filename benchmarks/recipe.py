"""What does each part of the recipe gain at equal compute?

ctclip-phantom --config configs/phantom/quickstart.yaml --out phantoms
ctclip-prepare --config configs/prepare/quickstart.yaml --source phantoms/manifest.csv \
    --out prepared "spacing_mm=[9.0,6.7,8.3]" "size=[32,48,48]"
python benchmarks/recipe.py --cohort prepared

Trains every variant with every seed for the same number of steps on one prepared cohort, scores the
held-out patients zero-shot with "X is present." against "X is not present.", and compares macro
AUROC with the plain recipe, paired: the same patients and seeds are drawn for both. The table has
each variant's CPU time; what the default costs more than the plain recipe, mostly its text warm-up,
"plain, a quarter more steps" has as well. Each finished run leaves its scores in ``--runs``; start
any part of it (``--only``, ``--seeds``), again or several at once, and the table is made of all
that is there.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ctclip.evaluation import bootstrap
from ctclip.evaluation.metrics import auroc

PLAIN = [
    "text_warmup.steps=0",
    "loss.opposite=0",
    "loss.directions=0",
    "optim.text_lr_scale=1.0",
    "text.shuffle_sentences=false",
]
WARM = [*PLAIN, "text_warmup.steps=150", "optim.text_lr_scale=0.1"]
TWO_READOUTS = ["loss.sentence=1.0", "model.vision.readouts=2"]
VARIANTS: dict[str, list[str]] = {
    "plain: whole report, InfoNCE": PLAIN,
    "default": [],
    "plain, a quarter more steps": [*PLAIN, "steps=250"],
    "plain + opposite sentences": [*PLAIN, "loss.opposite=1.0"],
    "plain + text warm-up, slow text": WARM,
    "plain + text warm-up, directions apart": [*WARM, "loss.directions=0.1"],
    "plain + sentence, two read-outs": [*PLAIN, *TWO_READOUTS],
    "one random sentence": [*PLAIN, "loss.report=0", "loss.sentence=1.0"],
    "SigLIP": [*PLAIN, "loss.contrastive=siglip"],
    "plain + shuffled sentences": [*PLAIN, "text.shuffle_sentences=true"],
    "plain + hospital styles": [*PLAIN, "text.synonyms=0.3", "text.drop_section=0.2"],
    "plain + soft targets": [*PLAIN, "loss.soft_targets=0.3"],
    "plain + normal pairs ignored": [*PLAIN, "loss.ignore_normal_pairs=true"],
    "default + sentence, two read-outs": TWO_READOUTS,
    "default, report 0.3, opposite 2": ["loss.report=0.3", "loss.opposite=2.0"],
    "default, label-informed": ["loss.label_informed=true"],
    "default, text locked after warm-up": ["optim.text_lr_scale=0"],
    "default, LoRA text": ["model.text.train=lora"],
    "default, layer-wise lr decay 0.75": ["optim.layer_decay=0.75"],
    "default, EMA 0.98": ["optim.ema_decay=0.98"],
    "default, silence not a negation": ["loss.silence=0"],
}
"""Name to what differs from the config, the first being what the others are compared with."""

REPLICATES = 2000
SPLITS = ("valid", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohort", type=Path, required=True)
    parser.add_argument("--config", default="configs/pretrain/phantom.yaml")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipe.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/recipe.svg"))
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: table only")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of variants")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    args = parser.parse_args()

    names = [name for name in VARIANTS if name in args.only]
    jobs = [(name, seed) for name in names for seed in args.seeds]
    for name, seed in tqdm(jobs, "runs"):
        finish(name, seed, args)

    runs = {name: collect(args.runs, name) for name in VARIANTS}
    runs = {name: found for name, found in runs.items() if found}
    reference = next(iter(VARIANTS))
    if reference not in runs:
        raise SystemExit(f"no finished run of {reference!r} to compare with: train it, too")
    results = [summary(name, found, runs[reference], args.cohort) for name, found in runs.items()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(setting(args) | {"rows": results}, indent=1) + "\n")
    draw(results, args.figure)
    print(table(results))


def finish(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train and score one run unless it has been."""
    out = folder_of(args.runs, name, seed)
    if (out / "scores.npz").exists():
        return
    overrides = [f"cohort={args.cohort}", f"out={out}", f"seed={seed}"]
    overrides += [*args.overrides, *VARIANTS[name]]
    # Forked from a process that has imported everything and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "ctclip.training.pretrain"])
    process = context.Process(
        target=train_and_score, args=(args.config, overrides, args.cohort, out)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{name}, seed {seed}: exit code {process.exitcode}")


def train_and_score(path: str, overrides: Sequence[str], cohort: Path, out: Path) -> None:
    """One run in a process of its own."""
    torch.set_num_threads(1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from ctclip import config
    from ctclip.training import pretrain

    started = time.process_time()
    settings = config.load(pretrain.PretrainConfig, path, overrides)
    pretrain.run(settings)
    cpu_s = time.process_time() - started
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    spread = [line["health/prompt_direction_spread"] for line in lines if _is_health(line)]
    scores = {split: score(out / "model.safetensors", cohort, split) for split in SPLITS}
    temporary = out / "scores.tmp.npz"
    np.savez(temporary, cpu_s=cpu_s, spread=spread[-1], seed=settings.seed, **scores)
    os.replace(temporary, out / "scores.npz")
    shutil.rmtree(out / "checkpoints")


def _is_health(line: dict[str, float]) -> bool:
    return "health/prompt_direction_spread" in line


def score(model: Path, cohort: Path, split: str) -> np.ndarray:
    """``(N, F)`` zero-shot scores of a split."""
    from ctclip import checkpoint
    from ctclip.data.cohort import PreparedCohort
    from ctclip.data.dataset import CohortDataset
    from ctclip.training.text_views import prompts

    loaded = checkpoint.load(model)
    prepared = PreparedCohort.open(cohort)
    dataset = CohortDataset(
        prepared, prepared.split(split), windows_hu=loaded.volume_config.windows_hu
    )
    with torch.inference_mode():
        present, absent = (
            loaded.model.encode_text(loaded.tokenizer(texts), normalize=True) for texts in prompts()
        )
        image = torch.cat(
            [
                loaded.model.encode_image(dataset[index].volume[None], normalize=True)
                for index in range(len(dataset))
            ]
        )
    return (image @ (present - absent).T).numpy()


def collect(runs: Path, name: str) -> dict[int, dict[str, Any]]:
    """What the finished runs of a variant left, by seed."""
    found = {}
    for path in sorted(runs.glob(f"{folder_of(runs, name, 0).name[:-1]}*/scores.npz")):
        content = np.load(path)
        found[int(content["seed"])] = dict(content)
    return found


def folder_of(runs: Path, name: str, seed: int) -> Path:
    words = "".join(c if c.isalnum() or c == "." else " " for c in name).split()
    return runs / f"{'-'.join(words)}--{seed}"


def truth(cohort: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels ``(N, F)`` and patients ``(N,)`` of a split."""
    from ctclip.data.cohort import PreparedCohort

    records = PreparedCohort.open(cohort).split(split)
    labels = np.array([record.label_row() for record in records])
    return labels, np.array([record.patient_id for record in records])


def summary(
    name: str, runs: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]], cohort: Path
) -> dict[str, Any]:
    """Macro AUROC over seeds, and its paired gain over the plain recipe with an interval."""
    row: dict[str, Any] = {
        "variant": name,
        "label_informed": "label-informed" in name,
        "seeds": sorted(runs),
        "cpu_s": float(np.mean([run["cpu_s"] for run in runs.values()])),
        "prompt_direction_spread": float(np.mean([run["spread"] for run in runs.values()])),
    }
    for split in SPLITS:
        labels, patients = truth(cohort, split)
        macro = [float(np.mean(per_finding(runs[seed][split], labels))) for seed in sorted(runs)]
        row[split] = {"macro": float(np.mean(macro)), "per_seed": macro}
        shared = sorted(runs.keys() & plain.keys())
        row[split] |= gain(
            [runs[seed][split] for seed in shared],
            [plain[seed][split] for seed in shared],
            labels,
            patients,
        )
    labels, _ = truth(cohort, "test")
    findings = [per_finding(run["test"], labels) for run in runs.values()]
    row["per_finding"] = [round(float(value), 4) for value in np.mean(findings, axis=0)]
    return row


def per_finding(scores: np.ndarray, labels: np.ndarray) -> list[float]:
    return [auroc(labels[:, k], scores[:, k]) for k in range(labels.shape[1])]


def gain(
    ours: Sequence[np.ndarray],
    plain: Sequence[np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
) -> dict[str, float]:
    """Mean over seeds of the difference in macro AUROC, and its 95 % interval.

    A replicate draws patients with replacement, the same for both recipes and all seeds, and then
    seeds with replacement: what training's randomness adds is in the interval.
    """
    draws = bootstrap.draw(patients, REPLICATES, seed=0)
    paired = np.stack(
        [
            bootstrap.replicate(draws, labels, a).mean(axis=1)
            - bootstrap.replicate(draws, labels, b).mean(axis=1)
            for a, b in zip(ours, plain, strict=True)
        ]
    )
    seeds = np.random.default_rng(0).integers(len(paired), size=(len(paired), REPLICATES))
    replicates = paired[seeds, np.arange(REPLICATES)].mean(axis=0)
    low, high = bootstrap.interval(replicates)
    point = [
        np.mean(per_finding(a, labels)) - np.mean(per_finding(b, labels))
        for a, b in zip(ours, plain, strict=True)
    ]
    return {"gain": float(np.mean(point)), "gain_low": low, "gain_high": high}


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers belong to."""
    from ctclip import config
    from ctclip.data.cohort import PreparedCohort
    from ctclip.findings import FINDINGS
    from ctclip.training.pretrain import PretrainConfig

    values = {"cohort": "", "out": ""}
    settings = config.load(PretrainConfig, args.config, args.overrides, values)
    cohort = PreparedCohort.open(args.cohort)
    return {
        "config": args.config,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "cohort": cohort.fingerprint,
        "patients": {split: len(cohort.split(split)) for split in ("train", *SPLITS)},
        "replicates": REPLICATES,
        "findings": list(FINDINGS),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    headings = ("variant", "valid", "test", "test, per seed", "gain over plain, test (95 %)")
    lines = [f"| {' | '.join(headings)} | CPU | spread |", "|---" * 7 + "|"]
    plain_cpu_s = results[0]["cpu_s"]
    for row in results:
        test = row["test"]
        seeds = " ".join(f"{value:.3f}" for value in test["per_seed"])
        gained = f"{test['gain']:+.3f} ({test['gain_low']:+.3f} to {test['gain_high']:+.3f})"
        lines.append(
            f"| {row['variant']} | {row['valid']['macro']:.3f} | {test['macro']:.3f} | {seeds} | "
            f"{gained} | {row['cpu_s'] / plain_cpu_s:.2f} | {row['prompt_direction_spread']:.2f} |"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Gains with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 0.32 * len(results) + 1), layout="constrained")
    y = np.arange(len(results))[::-1]
    values = np.array(
        [[row["test"][k] for k in ("gain", "gain_low", "gain_high")] for row in results]
    )
    gained, low, high = values.T
    axes.errorbar(gained, y, xerr=[gained - low, high - gained], fmt="o", capsize=3)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_yticks(y, [row["variant"] for row in results])
    axes.set_xlabel("gain in macro zero-shot AUROC over the plain recipe, 95 % interval")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
