"""What does each part of the recipe gain at equal compute?

python benchmarks/recipe.py --cohort prepared/FINGERPRINT --config configs/pretrain/phantom.yaml

Trains every variant with every seed on one prepared cohort (finished runs are kept and skipped),
scores the test split zero-shot with "X is present." against "X is not present.", and compares
macro AUROC with the plain recipe: paired, resampling patients and seeds.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

PLAIN = [
    "text_warmup.steps=0",
    "loss.opposite=0",
    "loss.directions=0",
    "optim.text_lr_scale=1.0",
    "text.shuffle_sentences=false",
]
OPPOSITE = [*PLAIN, "loss.opposite=1.0"]
VARIANTS: dict[str, list[str]] = {
    "plain: whole report, InfoNCE": PLAIN,
    "SigLIP": [*PLAIN, "loss.contrastive=siglip"],
    "one random sentence": [*PLAIN, "loss.report=0", "loss.sentence=1.0"],
    "report + sentence, two read-outs": [
        *PLAIN,
        "loss.sentence=1.0",
        "model.vision.readouts=2",
    ],
    "shuffled sentences": [*PLAIN, "text.shuffle_sentences=true"],
    "soft targets": [*PLAIN, "loss.soft_targets=0.3"],
    "normal pairs ignored": [*PLAIN, "loss.ignore_normal_pairs=true"],
    "text warm-up": [*PLAIN, "text_warmup.steps=200", "optim.text_lr_scale=0.1"],
    "opposite sentences": OPPOSITE,
    "opposite, silence ignored": [*OPPOSITE, "loss.silence=0"],
    "opposite, directions apart": [*OPPOSITE, "loss.directions=0.1"],
    "default": [],
    "default, text tower locked after warm-up": ["optim.text_lr_scale=0"],
    "default, EMA": ["optim.ema_decay=0.99"],
    "default, layer-wise lr decay 0.75": ["optim.layer_decay=0.75"],
    "default, label-informed": ["loss.label_informed=true"],
}
"""Name to what differs from the config; the first is what the others are compared with."""

REPLICATES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohort", type=Path, required=True)
    parser.add_argument("--config", default="configs/pretrain/phantom.yaml")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipe.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of variants")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()

    names = [name for name in VARIANTS if name in args.only]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in names}
    jobs = [(name, seed) for seed in range(args.seeds) for name in names]
    for name, seed in tqdm(jobs, "runs"):
        out = args.runs / f"{'-'.join(name.replace(',', '').replace(':', '').split())}-{seed}"
        overrides = [f"cohort={args.cohort}", f"out={out}", f"seed={seed}"]
        overrides += [*args.overrides, *VARIANTS[name]]
        command = [sys.executable, "train/pretrain.py", "--config", args.config, *overrides]
        subprocess.run(command, check=True)
        scores[name].append(score(out / "model.safetensors", args.cohort))
    labels, patients = truth(args.cohort)
    results = [summary(name, scores[name], scores[names[0]], labels, patients) for name in names]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1))
    draw(results, args.out.with_suffix(".svg"))
    print(table(results))


def score(model: Path, cohort: Path) -> np.ndarray:
    """``(N, F)`` zero-shot scores of the test split."""
    from ctclip import checkpoint
    from ctclip.data.cohort import PreparedCohort
    from ctclip.data.dataset import CohortDataset
    from ctclip.training.text_views import prompts

    loaded = checkpoint.load(model)
    prepared = PreparedCohort.open(cohort)
    dataset = CohortDataset(
        prepared, prepared.split("test"), windows_hu=loaded.volume_config.windows_hu
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


def truth(cohort: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels ``(N, F)`` and patients ``(N,)`` of the test split."""
    from ctclip.data.cohort import PreparedCohort

    records = PreparedCohort.open(cohort).split("test")
    labels = np.array([record.label_row() for record in records])
    return labels, np.array([record.patient_id for record in records])


def macro_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean AUROC over the findings that have both classes among the known labels."""
    values = []
    for column in range(labels.shape[1]):
        known = ~np.isnan(labels[:, column])
        answer = labels[known, column]
        if 0 < answer.sum() < len(answer):
            values.append(roc_auc_score(answer, scores[known, column]))
    return float(np.mean(values))


def summary(
    name: str,
    runs: list[np.ndarray],
    plain: list[np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
) -> dict[str, object]:
    """Macro AUROC over seeds and the paired gain over the plain recipe with its interval."""
    per_seed = [macro_auroc(run, labels) for run in runs]
    rng = np.random.default_rng(0)
    rows_of = {patient: np.flatnonzero(patients == patient) for patient in np.unique(patients)}
    everyone = list(rows_of)
    gains = []
    for _ in range(REPLICATES):
        drawn = rng.choice(len(everyone), len(everyone))
        rows = np.concatenate([rows_of[everyone[index]] for index in drawn])
        seeds = rng.choice(len(runs), len(runs))
        gains.append(
            np.mean([macro_auroc(runs[seed][rows], labels[rows]) for seed in seeds])
            - np.mean([macro_auroc(plain[seed][rows], labels[rows]) for seed in seeds])
        )
    low, high = np.quantile(gains, [0.025, 0.975])
    return {
        "variant": name,
        "label_informed": "label-informed" in name,
        "macro": float(np.mean(per_seed)),
        "per_seed": per_seed,
        "gain": float(np.mean(gains)),
        "gain_low": float(low),
        "gain_high": float(high),
    }


def table(results: list[dict]) -> str:
    """The results as Markdown."""
    lines = ["| variant | macro AUROC | seeds | gain over plain (95 %) |", "|---|---|---|---|"]
    for row in results:
        spread = f"{min(row['per_seed']):.3f} to {max(row['per_seed']):.3f}"
        gain = f"{row['gain']:+.3f} ({row['gain_low']:+.3f} to {row['gain_high']:+.3f})"
        lines.append(f"| {row['variant']} | {row['macro']:.3f} | {spread} | {gain} |")
    return "\n".join(lines)


def draw(results: list[dict], path: Path) -> None:
    """Gains with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(results) + 1), layout="constrained")
    y = np.arange(len(results))[::-1]
    gain = np.array([row["gain"] for row in results])
    low = np.array([row["gain_low"] for row in results])
    high = np.array([row["gain_high"] for row in results])
    axes.errorbar(gain, y, xerr=[gain - low, high - gain], fmt="o", capsize=3)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_yticks(y, [row["variant"] for row in results])
    axes.set_xlabel("gain in macro zero-shot AUROC over the plain recipe")
    figure.savefig(path)


if __name__ == "__main__":
    main()
