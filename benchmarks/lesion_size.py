"""How small a nodule can each volume tower see? The own tower against CT-CLIP's, equal FLOPs.

python benchmarks/lesion_size.py --setting small     # CPU; writes benchmarks/results/lesion_size.*
python benchmarks/lesion_size.py --setting large     # one GPU

Cubes are cut from the lungs of phantom patients; half of them get one solid nodule, drawn by the
functions that draw the phantom cohort. Each tower learns "nodule or not" with a linear head on its
embedding, for the same training FLOPs on the same cubes. Test patients are never trained on. AUC is
measured at fixed diameters against the same cubes without a nodule.
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

from ctclip.models.ctclip import ModelConfig
from ctclip.models.ctvit import CTViT, CTViTConfig
from ctclip.models.describe import describe
from ctclip.models.text import TextConfig
from ctclip.models.vit3d import VisionConfig, ViT3D
from ctclip.phantom import acquisition
from ctclip.phantom.anatomy import Patient, sample_patient
from ctclip.phantom.grid import Grid
from ctclip.phantom.lesions import Lesion, draw
from ctclip.phantom.scene import Scene

logger = logging.getLogger(__name__)

NOISE_HU = 20.0
CENTRE_DEPTH_MM = 12.0
"""Cubes are cut about places at least so deep in a lung."""

SMALLEST_MM, LARGEST_MM = 3.0, 30.0
"""Diameters of training, log-uniform."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One size of the experiment."""

    spacing_mm: float
    edge: int
    """Voxels of a cube's edge."""
    train_patients: int
    test_patients: int
    train_cubes: int
    test_cubes: int
    """Cubes of each diameter, and as many times three without a nodule."""
    diameters_mm: tuple[float, ...]
    training_tflop: float
    batch: int
    lr: float
    own: VisionConfig
    ctvit: CTViTConfig


SETTINGS = {
    # CT-CLIP's patch is a cube of 15 mm; at 3 mm that is 5 voxels. Both towers see the same cubes.
    "small": Setting(
        spacing_mm=3.0,
        edge=20,
        train_patients=24,
        test_patients=12,
        train_cubes=12_000,
        test_cubes=200,
        diameters_mm=(4, 6, 8, 10, 12, 15, 20, 28),
        training_tflop=2.0,
        batch=32,
        lr=2e-3,
        own=VisionConfig(
            size="tiny", width=96, depth=2, heads=4, patch=(8, 8, 8), stem_edge=2, queries=4
        ),
        ctvit=CTViTConfig(
            image_size=(20, 20),
            patch=(5, 5, 5),
            width=96,
            spatial_depth=1,
            temporal_depth=1,
            heads=4,
            head_dim=24,
            codes=512,
        ),
    ),
    "large": Setting(
        spacing_mm=1.5,
        edge=160,
        train_patients=200,
        test_patients=60,
        train_cubes=20_000,
        test_cubes=300,
        diameters_mm=(3, 4, 5, 6, 8, 10, 12, 15, 20, 28),
        training_tflop=60_000.0,
        batch=32,
        lr=3e-4,
        own=VisionConfig(size="small", patch=(16, 16, 16), stem_edge=2),
        ctvit=CTViTConfig(image_size=(160, 160), patch=(10, 10, 10)),
    ),
}


@dataclasses.dataclass
class Body:
    """A rendered chest without nodules."""

    patient: Patient
    grid: Grid
    hu: np.ndarray
    lung: np.ndarray


def render(seed: int, spacing_mm: float) -> Body:
    """Draw one healthy patient at the spacing of the experiment."""
    rng = np.random.default_rng([seed, 1])
    patient = sample_patient(rng, int(rng.integers(30, 80)), str(rng.choice(["M", "F"])))
    low, high = acquisition.field_of_view(patient, rng)
    shape = tuple(int(n) for n in np.ceil((high - low) / spacing_mm))
    grid = Grid(shape, (spacing_mm,) * 3, tuple(float(v) for v in low))
    hu, _ = acquisition.render(patient, [], grid)
    return Body(patient, grid, hu, Scene(patient, grid).lung)


def cube(body: Body, edge: int, diameter_mm: float | None, rng: np.random.Generator) -> np.ndarray:
    """Cut a cube of lung, with one nodule or none, int16 HU."""
    margin = edge // 2
    depth = -body.lung[margin:-margin, margin:-margin, margin:-margin]
    places = np.argwhere(depth > CENTRE_DEPTH_MM) + margin
    centre = places[rng.integers(len(places))]
    box = tuple(slice(int(c) - margin, int(c) - margin + edge) for c in centre)
    grid = body.grid.crop(box)
    hu, lung = body.hu[box].copy(), body.lung[box]
    if diameter_mm is not None:
        inner = slice(margin // 4, edge - margin // 4)
        inside = np.argwhere(lung[inner, inner, inner] < -2.0) + margin // 4
        point = inside[rng.integers(len(inside))]
        where = tuple(
            o + i * s for o, i, s in zip(grid.origin_mm, point, grid.spacing_mm, strict=True)
        )
        nodule = Lesion(
            finding="Lung nodule",
            kind="solid",
            side="-",
            lobe="-",
            size_mm=diameter_mm,
            severity=diameter_mm / 30,
            points_mm=((float(where[0]), float(where[1]), float(where[2])),),
            seed=int(rng.integers(2**31)),
        )
        draw(Scene(body.patient, grid, hu=hu, lung=lung), nodule)
    hu += rng.normal(0, NOISE_HU, hu.shape).astype(np.float32)
    return np.clip(hu, -1000, 1000).astype(np.int16)


def make_cubes(setting: Setting, cache: Path) -> dict[str, np.ndarray]:
    """Training and test cubes, kept on disk."""
    if cache.exists():
        return dict(np.load(cache))
    rng = np.random.default_rng(0)
    count = setting.train_patients + setting.test_patients
    bodies = [
        render(seed, setting.spacing_mm)
        for seed in tqdm(range(count), desc="patients", disable=not sys.stderr.isatty())
    ]
    train, test = bodies[: setting.train_patients], bodies[setting.train_patients :]
    sizes = np.exp(rng.uniform(np.log(SMALLEST_MM), np.log(LARGEST_MM), setting.train_cubes))
    has = np.arange(setting.train_cubes) % 2 == 0

    def cut(group: list[Body], i: int, size: float | None) -> np.ndarray:
        return cube(group[i % len(group)], setting.edge, size, rng)

    arrays = {
        "train": np.stack(
            [
                cut(train, i, s if h else None)
                for i, (s, h) in enumerate(zip(sizes, has, strict=True))
            ]
        ),
        "train_label": has.astype(np.float32),
        "none": np.stack([cut(test, i, None) for i in range(3 * setting.test_cubes)]),
    }
    for size in setting.diameters_mm:
        arrays[f"{size:g}"] = np.stack([cut(test, i, size) for i in range(setting.test_cubes)])
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.savez(cache, **arrays)
    return arrays


def build(name: str, setting: Setting) -> tuple[nn.Module, float]:
    """A tower with its head, and its training TFLOP for one cube."""
    text = TextConfig(name_or_path=None, width=32, layers=1, heads=2)
    size = (setting.edge,) * 3
    if name == "ctclip":
        config = ModelConfig(embed_dim=128, vision=setting.own, text=text)
        tower: nn.Module = ViT3D.from_config(setting.own, 128)
    else:
        config = ModelConfig(embed_dim=128, ctvit=setting.ctvit, text=text)
        tower = CTViT.from_config(setting.ctvit, 128)
    return nn.Sequential(tower, nn.Linear(128, 1)), describe(config, size).vision.training_tflop


def scores(model: nn.Module, cubes: np.ndarray, batch: int, device: str) -> np.ndarray:
    """Logit of every cube."""
    model.eval()
    with torch.no_grad():
        parts = [
            model(voxels(part, device)) for part in np.array_split(cubes, -(-len(cubes) // batch))
        ]
    return torch.cat(parts)[:, 0].float().cpu().numpy()


def voxels(cubes: np.ndarray, device: str) -> Tensor:
    """int16 HU to the input of a tower."""
    return torch.from_numpy(cubes).to(device)[:, None].float() / 1000.0


def fit(name: str, setting: Setting, data: dict[str, np.ndarray], seed: int, device: str) -> dict:
    """Train one tower for the budget and measure it."""
    torch.manual_seed(seed)
    model, tflop = build(name, setting)
    model.to(device)
    steps = int(setting.training_tflop / tflop / setting.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.01)
    warmup = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.5 * (1 + np.cos(np.pi * min(s / steps, 1.0)))),
    )
    rng = np.random.default_rng([seed, 2])
    started, losses = time.process_time(), []
    order: list[int] = []
    model.train()
    for _ in tqdm(range(steps), desc=f"{name} {seed}", disable=not sys.stderr.isatty()):
        while len(order) < setting.batch:
            order += rng.permutation(len(data["train"])).tolist()
        rows, order = order[: setting.batch], order[setting.batch :]
        image = voxels(data["train"][rows], device)
        for axis in (2, 3, 4):
            if rng.random() < 0.5:
                image = image.flip(axis)
        target = torch.from_numpy(data["train_label"][rows]).to(device)
        loss = F.binary_cross_entropy_with_logits(model(image)[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    negative = scores(model, data["none"], setting.batch, device)
    positive = {
        size: scores(model, data[f"{size:g}"], setting.batch, device)
        for size in setting.diameters_mm
    }
    result = {
        "tower": name,
        "seed": seed,
        "steps": steps,
        "tflop_per_cube": tflop,
        "cpu_s": round(time.process_time() - started, 1),
        "loss_last_50": float(np.mean(losses[-50:])),
        "auc": {f"{size:g}": auc(value, negative) for size, value in positive.items()},
        "interval": {f"{s:g}": interval(value, negative) for s, value in positive.items()},
    }
    logger.info("%s seed %d: %d steps, %s", name, seed, steps, result["auc"])
    return result


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve of two sets of scores."""
    labels = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    return float(roc_auc_score(labels, np.r_[positive, negative]))


def interval(positive: np.ndarray, negative: np.ndarray, rounds: int = 300) -> list[float]:
    """95 % bootstrap interval over test cubes."""
    rng = np.random.default_rng(0)
    values = [
        auc(rng.choice(positive, len(positive)), rng.choice(negative, len(negative)))
        for _ in range(rounds)
    ]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def smallest_seen(curve: dict[float, float], level: float = 0.8) -> float | None:
    """Diameter at which a curve first stays above a level, between the measured ones."""
    sizes = sorted(curve)
    for i, size in enumerate(sizes):
        if all(curve[s] >= level for s in sizes[i:]):
            if i == 0:
                return size
            low, high = sizes[i - 1], size
            share = (level - curve[low]) / (curve[high] - curve[low])
            return float(low + share * (high - low))
    return None


def mean_curve(results: list[dict], tower: str) -> dict[float, float]:
    """AUC by diameter, averaged over the seeds of one tower."""
    runs = [r["auc"] for r in results if r["tower"] == tower]
    return {float(s): float(np.mean([run[s] for run in runs])) for s in runs[0]} if runs else {}


def plot(results: list[dict], path: Path) -> None:
    """AUC against diameter: mean over seeds, the seeds, and the mean's bootstrap interval."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, label in (("ctclip", "ctclip's own tower"), ("ctvit", "CT-ViT (CT-CLIP)")):
        runs = [r for r in results if r["tower"] == name]
        if not runs:
            continue
        sizes = np.array([float(s) for s in runs[0]["auc"]])
        seeds = np.array([[r["auc"][s] for s in r["auc"]] for r in runs])
        bounds = np.array([[r["interval"][s] for s in r["interval"]] for r in runs]).mean(axis=0)
        (line,) = axes.plot(
            sizes, seeds.mean(axis=0), marker="o", label=f"{label}, {len(runs)} seeds"
        )
        axes.fill_between(sizes, *bounds.T, alpha=0.15, color=line.get_color())
        axes.plot(sizes, seeds.T, lw=0.6, alpha=0.6, color=line.get_color())
    axes.axhline(0.8, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="nodule diameter (mm)", ylabel="AUC, nodule or none", ylim=(0.4, 1.02))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the experiment; finished runs are kept and not repeated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cache", type=Path, default=Path("runs/lesion_size"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("open_clip").setLevel(logging.WARNING)
    setting = SETTINGS[arguments.setting]
    data = make_cubes(setting, arguments.cache / f"{arguments.setting}.npz")
    path = arguments.out / f"lesion_size_{arguments.setting}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text())["runs"] if path.exists() else []
    for seed in range(arguments.seeds):
        for name in ("ctclip", "ctvit"):
            if any(r["tower"] == name and r["seed"] == seed for r in results):
                continue
            results.append(fit(name, setting, data, seed, arguments.device))
            smallest = {
                tower: smallest_seen(
                    {
                        float(s): float(
                            np.mean([r["auc"][s] for r in results if r["tower"] == tower])
                        )
                        for s in results[0]["auc"]
                    }
                )
                for tower in {r["tower"] for r in results}
            }
            summary = {
                "setting": arguments.setting,
                "diameter_at_auc_0.8_mm": smallest,
                "runs": results,
                "config": dataclasses.asdict(setting),
            }
            path.write_text(json.dumps(summary, indent=1) + "\n")
            plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
