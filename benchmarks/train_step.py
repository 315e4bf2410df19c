r"""How fast is a training step, and how much memory does it take, beside a plain loop?

python benchmarks/train_step.py                                   # a laptop in half a minute
python benchmarks/train_step.py --size 112 336 336 --steps 3 --bf16 --checkpointing \
    --out benchmarks/results/train_step_field.json                # the field's size, two minutes
python benchmarks/train_step.py --size 112 336 336 --tower base --batch 512 --micro 16 --bf16

The default recipe (GradCache, fused attention, read-ahead, both views of a report) against a plain
loop over the same cohort of random volumes: fp32, explicit attention, no checkpointing, negatives
of the micro-batch only, reading in the loop. Each runs in a process of its own.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WARM_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=3, default=[48, 96, 96])
    parser.add_argument("--patch", type=int, nargs=3, default=[8, 24, 24])
    parser.add_argument("--tower", choices=("tiny", "small", "base", "large"), default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        cohort = make_cohort(Path(folder), tuple(args.size), max(2 * args.batch, 16))
        rows = []
        for variant in (plain, recipe):
            # Not a Pool, whose workers may have no children: the recipe reads ahead in some.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                rows.append(pool.submit(variant, args, cohort, Path(folder) / "run").result())
    baseline = rows[0]
    for row in rows:
        row["volumes_per_s_ratio"] = row["volumes_per_s"] / baseline["volumes_per_s"]
        row["peak_ratio"] = row["peak_gib"] / baseline["peak_gib"]
    print(table(rows))
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    result = {"device": device_name(), "arguments": arguments, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def make_cohort(folder: Path, size: tuple[int, ...], studies: int) -> Path:
    """Random volumes with reports, as ``ctclip-prepare`` leaves them."""
    from ctclip import config
    from ctclip.data import storage
    from ctclip.data.cohort import write_cohort_manifest
    from ctclip.data.manifest import VolumeRecord
    from ctclip.data.volume import VolumeConfig

    recipe = VolumeConfig(size=size)
    path = folder / recipe.fingerprint()
    for name in ("volumes", "tmp"):
        (path / name).mkdir(parents=True)
    config.save(recipe, path / "recipe.yaml")
    rng = np.random.default_rng(0)
    records, outcomes = [], {}
    for study in range(studies):
        frame = storage.compress(rng.normal(-500, 300, size).astype(np.int16))
        (path / "volumes" / f"v{study}.b2nd").write_bytes(frame)
        outcomes[f"v{study}"] = {"crc32": storage.checksum(frame)}
        report = f"Scan {study}. No pleural effusion. A lung nodule of {study % 9 + 3} mm is seen. "
        records.append(
            VolumeRecord(
                volume_id=f"v{study}",
                study_id=f"s{study}",
                patient_id=f"p{study}",
                split="train",
                path=None,
                findings=report * 5,
            )
        )
    write_cohort_manifest(path, records, outcomes)
    return path


def settings(args: argparse.Namespace, cohort: Path, out: Path) -> dict[str, Any]:
    """The run's config."""
    return {
        "cohort": str(cohort),
        "out": str(out),
        "steps": args.steps,
        "batch_size": args.batch,
        "micro_batch_size": args.micro,
        "workers": args.workers,
        "model": {
            "vision": {"size": args.tower, "patch": args.patch, "readouts": 2},
            "text": {"name_or_path": None, "width": 256, "layers": 4, "heads": 4},
        },
        "text_warmup": {"steps": 0},
        "loss": {"sentence": 1.0},
        "engine": {
            "precision": "bf16" if args.bf16 else "fp32",
            "activation_checkpointing": args.checkpointing,
        },
        "checkpoint": {"every": 10**9},
        "monitor": {"log_every": 1},
    }


def recipe(args: argparse.Namespace, cohort: Path, out: Path) -> dict[str, float | str]:
    """The package's trainer."""
    from ctclip import config
    from ctclip.training import pretrain

    loaded = config.from_dict(pretrain.PretrainConfig, settings(args, cohort, out))
    pretrain.run(loaded)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][WARM_STEPS:]
    seconds = sum(args.batch / line["volumes_per_s"] for line in steps)
    waited = sum(line["data_wait_share"] * args.batch / line["volumes_per_s"] for line in steps)
    rate = args.batch * len(steps) / seconds
    return measured("default recipe", rate, waited / seconds, args.batch - 1, loaded, args)


def plain(args: argparse.Namespace, cohort: Path, out: Path) -> dict[str, float | str]:
    """What one writes first: read, forward, loss of the micro-batch, backward, step."""
    import torch.nn.functional as F

    from ctclip import config, losses
    from ctclip.data.cohort import PreparedCohort
    from ctclip.data.dataset import CohortDataset, collate
    from ctclip.models import vit3d
    from ctclip.models.ctclip import build_model
    from ctclip.models.text import build_tokenizer
    from ctclip.training import pretrain

    class Explicit:
        """Attention as in the textbook, in place of the fused kernel."""

        normalize = staticmethod(F.normalize)
        pad = staticmethod(F.pad)

        @staticmethod
        def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v

    vit3d.F = Explicit  # type: ignore[assignment]
    loaded = config.from_dict(pretrain.PretrainConfig, settings(args, cohort, out))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(loaded.model).to(device)
    tokenizer = build_tokenizer(loaded.model.text)
    prepared = PreparedCohort.open(cohort)
    dataset = CohortDataset(prepared, prepared.split("train"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    order = np.random.default_rng(0)
    waited, since = 0.0, 0.0
    steps = args.steps * args.batch // args.micro
    for step in range(steps):
        if step == WARM_STEPS:
            waited, since = 0.0, time.perf_counter()
        reading = time.perf_counter()
        batch = collate([dataset[int(i)] for i in order.integers(len(dataset), size=args.micro)])
        waited += time.perf_counter() - reading
        tokens = tokenizer([str(record.findings) for record in batch.records]).to(device)
        image = model.encode_image(batch.volume.to(device), normalize=True)
        text = model.encode_text(tokens, normalize=True)
        loss = losses.info_nce(image, text, model.scale(), batch.study.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    seconds = time.perf_counter() - since
    rate = args.micro * (steps - WARM_STEPS) / seconds
    return measured("plain loop", rate, waited / seconds, args.micro - 1, loaded, args)


def measured(
    name: str, rate: float, wait_share: float, negatives: int, loaded: Any, args: argparse.Namespace
) -> dict[str, float | str]:
    """One row: what was measured and what follows from counted FLOPs."""
    from ctclip.models.ctclip import build_model
    from ctclip.training import flops, monitor

    peak_gib = monitor.peak_gib()
    per_study = flops.per_study(build_model(loaded.model), tuple(args.size), 1)
    row: dict[str, float | str] = {
        "variant": name,
        "volumes_per_s": rate,
        "tflops": rate * per_study / 1e12,
        "peak_gib": peak_gib,
        "data_wait_share": wait_share,
        "negatives": negatives,
    }
    peak = monitor.peak_flops()
    if peak is not None:
        row["mfu"] = rate * per_study / peak
    return row


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = [
        "variant",
        "volumes_per_s",
        "volumes_per_s_ratio",
        "tflops",
        "mfu",
        "peak_gib",
        "peak_ratio",
        "data_wait_share",
        "negatives",
    ]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append(
            f"| {' | '.join(f'{c:.3g}' if isinstance(c, float) else str(c) for c in cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
