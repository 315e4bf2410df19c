"""How small a nodule can each volume tower see? The own tower against CT-CLIP's, equal FLOPs.

python benchmarks/lesion_size.py --setting small     # CPU; results/lesion_size_small.json
python benchmarks/lesion_size.py --setting large     # one GPU

Cubes are cut from the lungs of phantom patients, each with and without one solid nodule, drawn by
the functions that draw the phantom cohort. Each tower, with the same text tower, learns which of
the two prompts about a nodule is true, for the same training FLOPs, on the same patients. Test
patients are never trained on; their AUC is measured at fixed diameters against the same cubes
without a nodule. Finished runs lie under --cache and aren't repeated; --tower and --seed make one
run and leave the summary to the last call.
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm import tqdm

from ctclip.models.ctclip import CTCLIP, ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.describe import describe
from ctclip.models.text import TextConfig, Tokenizer
from ctclip.models.vit3d import VisionConfig
from ctclip.phantom import acquisition
from ctclip.phantom.anatomy import Patient, sample_patient
from ctclip.phantom.grid import Grid
from ctclip.phantom.lesions import Lesion, draw
from ctclip.phantom.scene import Scene

logger = logging.getLogger(__name__)

PROMPTS = ("Lung nodule is present.", "Lung nodule is not present.")

TOWERS = {"ctclip": "ctclip's own tower", "ctvit": "CT-ViT (CT-CLIP)"}

NOISE_HU = 20.0

CENTRE_DEPTH_MM = 15.0
"""Cubes are cut about places at least so deep in a lung,"""

NODULE_DEPTH_MM = 4.0
"""and nodules lie about places at least so deep, in the inner three quarters of a cube."""

SMALLEST_MM, LARGEST_MM = 3.0, 30.0
"""Diameters of training, log-uniform."""

LEVEL = 0.8
"""The AUC from which on a nodule counts as seen."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One size of the experiment."""

    spacing_mm: tuple[float, float, float]
    size: tuple[int, int, int]
    """Voxels of a cube (D, H, W); even."""
    train_patients: int
    test_patients: int
    test_places: int
    """Places in the test patients; every diameter is planted at each."""
    diameters_mm: tuple[float, ...]
    training_tflop: float
    """Of the volume tower, forward and backward, for one run."""
    batch: int
    """Cubes per step, half of them with a nodule."""
    lr: float
    own: VisionConfig
    ctvit: CTViTConfig


SETTINGS = {
    # A token of CT-CLIP is a cube of 15 mm: 8 voxels here, and the same for the own tower, whose
    # width makes a cube cost as many FLOPs as CT-ViT's, so that both see as many.
    "small": Setting(
        spacing_mm=(1.875, 1.875, 1.875),
        size=(32, 32, 32),
        train_patients=28,
        test_patients=12,
        test_places=240,
        diameters_mm=(3, 4, 5, 6, 8, 10, 12, 15, 20),
        training_tflop=5.0,
        batch=32,
        lr=1e-3,
        own=VisionConfig(
            size="tiny",
            width=64,
            heads=2,
            patch=(8, 8, 8),
            stem_edge=2,
            stem_channels=16,
            queries=4,
        ),
        ctvit=CTViTConfig(
            image_size=(32, 32),
            patch=(8, 8, 8),
            width=96,
            spatial_depth=1,
            temporal_depth=1,
            heads=4,
            head_dim=24,
            codes=512,
        ),
    ),
    # CT-CLIP's own voxels, patch and width.
    "large": Setting(
        spacing_mm=(1.5, 0.75, 0.75),
        size=(80, 160, 160),
        train_patients=200,
        test_patients=60,
        test_places=600,
        diameters_mm=(2, 3, 4, 5, 6, 8, 10, 12, 15, 20),
        training_tflop=60_000.0,
        batch=64,
        lr=3e-4,
        own=VisionConfig(size="small", patch=(8, 16, 16), stem_edge=2),
        ctvit=CTViTConfig(image_size=(160, 160)),
    ),
}


# --- cubes ------------------------------------------------------


@dataclasses.dataclass
class Body:
    """A rendered chest without nodules."""

    patient: Patient
    grid: Grid
    hu: np.ndarray
    """``(D, H, W)`` int16."""
    lung: np.ndarray
    """Signed distance to the lungs' surface in mm, ``(D, H, W)`` float16."""
    centres: np.ndarray
    """``(N, 3)``: where a cube may be cut."""


def body(setting: Setting, seed: int, folder: Path) -> Body:
    """One healthy patient at the spacing of the experiment; its voxels are kept on disk."""
    rng = np.random.default_rng([seed, 1])
    patient = sample_patient(rng, int(rng.integers(30, 80)), str(rng.choice(["M", "F"])))
    low, high = acquisition.field_of_view(patient, rng)
    depth, height, width = (int(n) for n in np.ceil((high - low) / setting.spacing_mm))
    z, y, x = (float(v) for v in low)
    grid = Grid((depth, height, width), setting.spacing_mm, (z, y, x))
    path = folder / f"{seed:03d}.npz"
    if path.exists():
        kept = np.load(path)
        return Body(patient, grid, kept["hu"], kept["lung"], kept["centres"])
    hu, _ = acquisition.render(patient, [], grid)
    lung = Scene(patient, grid).lung
    half = np.array(setting.size) // 2
    inner = tuple(slice(int(h), -int(h)) for h in half)
    centres = np.argwhere(lung[inner] < -CENTRE_DEPTH_MM) + half
    made = Body(patient, grid, hu.astype(np.int16), lung.astype(np.float16), centres)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(path, hu=made.hu, lung=made.lung, centres=centres.astype(np.int16))
    return made


def cubes(
    chest: Body, setting: Setting, diameters_mm: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Cut one cube of lung without a nodule and with one of each diameter at the same place.

    Returns:
        ``(1 + len(diameters_mm), D, H, W)`` int16 in HU.
    """
    low = chest.centres[rng.integers(len(chest.centres))].astype(int) - np.array(setting.size) // 2
    d, h, w = (slice(int(a), int(a) + n) for a, n in zip(low, setting.size, strict=True))
    box = (d, h, w)
    grid = chest.grid.crop(box)
    clean, lung = chest.hu[box].astype(np.float32), chest.lung[box].astype(np.float32)
    rim = [n // 8 for n in setting.size]
    inner = tuple(slice(r, n - r) for r, n in zip(rim, setting.size, strict=True))
    inside = np.argwhere(lung[inner] < -NODULE_DEPTH_MM) + rim
    place = inside[rng.integers(len(inside))]
    point = np.array(grid.origin_mm) + place * np.array(grid.spacing_mm)
    seed = int(rng.integers(2**31))
    noise = rng.normal(0, NOISE_HU, clean.shape).astype(np.float32)
    made = [clean]
    for size in diameters_mm:
        nodule = Lesion(
            finding="Lung nodule",
            kind="solid",
            side="-",
            lobe="-",
            size_mm=size,
            severity=size / LARGEST_MM,
            points_mm=((float(point[0]), float(point[1]), float(point[2])),),
            seed=seed,
        )
        scene = Scene(chest.patient, grid, hu=clean.copy(), lung=lung)
        draw(scene, nodule)
        made.append(scene.hu)
    return np.clip(np.stack(made) + noise, -1000, 1000).astype(np.int16)


def training_batch(
    bodies: list[Body], setting: Setting, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cubes ``(B, 1, D, H, W)`` and which of :data:`PROMPTS` is true, fresh at each step."""
    pairs = []
    for _ in range(setting.batch // 2):
        size = float(np.exp(rng.uniform(np.log(SMALLEST_MM), np.log(LARGEST_MM))))
        pair = cubes(bodies[rng.integers(len(bodies))], setting, [size], rng)
        for axis in (1, 2, 3):
            if rng.random() < 0.5:
                pair = np.flip(pair, axis)
        pairs.append(pair)
    return np.concatenate(pairs)[:, None], np.tile([1, 0], setting.batch // 2)


# --- one run ----------------------------------------------------


def build(name: str, setting: Setting) -> tuple[CTCLIP, float]:
    """A tower with its text tower, and its training TFLOP for one cube."""
    text = TextConfig(name_or_path=None, width=64, layers=1, heads=2, dropout=0.0)
    config = ModelConfig(
        embed_dim=128,
        vision=setting.own,
        ctvit=setting.ctvit if name == "ctvit" else None,
        text=text,
    )
    return build_model(config), describe(config, setting.size).vision.training_tflop


def voxels(hu: np.ndarray, device: str) -> Tensor:
    """int16 HU to the input of a tower."""
    return torch.from_numpy(np.ascontiguousarray(hu)).to(device).float() / 1000.0


def logits(model: CTCLIP, hu: np.ndarray, prompts: Tensor) -> Tensor:
    """Scaled cosines of ``(B, 1, D, H, W)`` with the prompts, ``(B, 2)``."""
    output = model(voxels(hu, str(prompts.device)), prompts)
    return output["logit_scale"] * output["image_features"] @ output["text_features"].T


def run(name: str, seed: int, setting: Setting, folder: Path, device: str) -> dict:
    """Train one tower for the budget and score every test cube."""
    bodies = [
        body(setting, i, folder)
        for i in tqdm(
            range(setting.train_patients + setting.test_patients),
            desc="patients",
            disable=not sys.stderr.isatty(),
        )
    ]
    torch.manual_seed(seed)
    model, tflop = build(name, setting)
    model.to(device).train()
    prompts = Tokenizer.builtin()(PROMPTS).to(device)
    steps = round(setting.training_tflop / tflop / setting.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.lr, steps, pct_start=0.1)
    rng = np.random.default_rng([seed, 2])
    started, losses = time.process_time(), []
    for step in range(steps):
        hu, true = training_batch(bodies[: setting.train_patients], setting, rng)
        loss = F.cross_entropy(logits(model, hu, prompts), torch.from_numpy(true).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            mean = np.mean(losses[-100:])
            logger.info("%s %d: step %d of %d, loss %.3f", name, seed, step + 1, steps, mean)
    cpu_s = time.process_time() - started
    model.eval()
    scores = np.empty((setting.test_places, 1 + len(setting.diameters_mm)))
    with torch.no_grad():
        for i in range(setting.test_places):
            chest = bodies[setting.train_patients + i % setting.test_patients]
            made = cubes(chest, setting, setting.diameters_mm, np.random.default_rng([i, 3]))
            pair = logits(model, made[:, None], prompts)
            scores[i] = (pair[:, 0] - pair[:, 1]).cpu().numpy()
    return {
        "tower": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.visual.parameters()),
        "training_gflop_per_cube": round(1000 * tflop, 4),
        "steps": steps,
        "cpu_s": round(cpu_s, 1),
        "loss_last_100": round(float(np.mean(losses[-100:])), 4),
        "scores": scores.round(4).tolist(),
    }


# --- what the runs say ------------------------------------------


def auc(scores: np.ndarray) -> np.ndarray:
    """AUC of every later column of ``(places, 1 + diameters)`` against the first."""
    count = len(scores)
    ranks = np.stack(
        [rankdata(np.r_[scores[:, 0], column])[count:].sum() for column in scores.T[1:]]
    )
    return (ranks - count * (count + 1) / 2) / count**2


def smallest_seen(diameters: Sequence[float], curve: np.ndarray) -> float:
    """Diameter from which on a curve stays above :data:`LEVEL`, interpolated; inf if it doesn't."""
    if curve[-1] < LEVEL:
        return float("inf")
    below = np.flatnonzero(curve < LEVEL)
    if not len(below):
        return float(diameters[0])
    i = int(below[-1])
    share = (LEVEL - curve[i]) / (curve[i + 1] - curve[i])
    return float(diameters[i] + share * (diameters[i + 1] - diameters[i]))


def summarise(runs: list[dict], setting: Setting, replicates: int = 2000) -> dict:
    """Mean curves over seeds with 95 % intervals: test patients and seeds drawn with replacement.

    Both towers are measured at the same places, so a replicate draws the same ones for both.
    """
    rng = np.random.default_rng(0)
    sizes = setting.diameters_mm
    owner = np.arange(setting.test_places) % setting.test_patients
    scores = {
        name: np.stack([r["scores"] for r in runs if r["tower"] == name])
        for name in TOWERS
        if any(r["tower"] == name for r in runs)
    }
    mean = {name: np.mean([auc(one) for one in all_], axis=0) for name, all_ in scores.items()}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in scores}
    for _ in range(replicates):
        patients = rng.integers(setting.test_patients, size=setting.test_patients)
        rows = np.concatenate([np.flatnonzero(owner == p) for p in patients])
        for name, all_ in scores.items():
            seeds = rng.integers(len(all_), size=len(all_))
            each = {s: auc(all_[s][rows]) for s in set(seeds.tolist())}
            drawn[name].append(np.mean([each[s] for s in seeds.tolist()], axis=0))
    result: dict = {"towers": {}}
    for name in scores:
        curves = np.stack(drawn[name])
        seen = [smallest_seen(sizes, curve) for curve in curves]
        low, high = np.percentile(curves, [2.5, 97.5], axis=0)
        result["towers"][name] = {
            "seeds": len(scores[name]),
            "auc": {
                f"{s:g}": [round(float(v), 4) for v in values]
                for s, *values in zip(sizes, mean[name], low, high, strict=True)
            },
            "auc_of_each_seed": [auc(one).round(4).tolist() for one in scores[name]],
            "smallest_seen_mm": _finite(smallest_seen(sizes, mean[name])),
            "smallest_seen_interval_mm": [
                _finite(float(v)) for v in np.quantile(seen, [0.025, 0.975], method="nearest")
            ],
        }
    if len(scores) == len(TOWERS):
        gain = np.stack(drawn["ctclip"]) - np.stack(drawn["ctvit"])
        low, high = np.percentile(gain, [2.5, 97.5], axis=0)
        result["auc_gain"] = {
            f"{s:g}": [round(float(v), 4) for v in values]
            for s, *values in zip(sizes, mean["ctclip"] - mean["ctvit"], low, high, strict=True)
        }
        own, theirs = (
            np.array([smallest_seen(sizes, curve) for curve in [mean[name], *drawn[name]]])
            for name in ("ctclip", "ctvit")
        )
        # Where a tower never gets there, the larger of the two is infinite and so is the ratio.
        smaller = 1 - own / theirs
        low, high = np.quantile(smaller[1:], [0.025, 0.975], method="nearest")
        result["smaller_by"] = [round(float(value), 3) for value in (smaller[0], low, high)]
    return result


def _finite(value: float) -> float | None:
    return round(value, 2) if np.isfinite(value) else None


def plot(summary: dict, path: Path) -> None:
    """AUC against diameter: mean over seeds with its interval, and each seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, tower in summary["towers"].items():
        sizes = [float(s) for s in tower["auc"]]
        middle, low, high = np.array(list(tower["auc"].values())).T
        label = f"{TOWERS[name]}, {tower['seeds']} seeds"
        (line,) = axes.plot(sizes, middle, marker="o", ms=4, label=label)
        axes.fill_between(sizes, low, high, alpha=0.18, lw=0, color=line.get_color())
        for curve in tower["auc_of_each_seed"]:
            axes.plot(sizes, curve, lw=0.6, alpha=0.6, color=line.get_color())
    axes.axhline(LEVEL, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="nodule diameter (mm)", ylabel="AUC, nodule or none", ylim=(0.4, 1.02))
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Make the runs that are missing, then summarise all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tower", choices=TOWERS, help="only this one, for jobs side by side")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--figures", type=Path, default=Path(__file__).parents[1] / "docs/images")
    parser.add_argument("--cache", type=Path, default=Path("runs/lesion_size"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("open_clip").setLevel(logging.WARNING)
    setting = SETTINGS[arguments.setting]
    folder = arguments.cache / arguments.setting
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds) if arguments.seed is None else [arguments.seed]:
        for name in [arguments.tower] if arguments.tower else list(TOWERS):
            path = folder / f"{name}_{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(run(name, seed, setting, folder, arguments.device)))
    if arguments.tower is not None or arguments.seed is not None:
        return
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("ct*_*.json"))]
    summary = summarise(runs, setting)
    for name, tower in summary["towers"].items():
        logger.info("%s: %s from %s mm", name, tower["auc"], tower["smallest_seen_mm"])
    command = f"python benchmarks/lesion_size.py --setting {arguments.setting}"
    kept = [{k: v for k, v in one.items() if k != "scores"} for one in runs]
    summary |= {"command": command, "runs": kept, "config": dataclasses.asdict(setting)}
    path = arguments.out / f"lesion_size_{arguments.setting}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    plot(summary, arguments.figures / f"{path.stem}.png")


if __name__ == "__main__":
    main()
