r"""How fast is a training step, and how much memory does it take, beside a plain loop?

python benchmarks/train_step.py                                   # a laptop in half a minute
python benchmarks/train_step.py --size 112 336 336 --steps 3 --bf16 --checkpointing \
    --out benchmarks/results/train_step_field.json                # the field's size, two minutes

On a GPU, at the real sizes; micro-batches double from --micro until the memory is full:

python benchmarks/train_step.py --size 112 336 336 --tower base --batch 512 --bf16 --sweep \
    --out benchmarks/results/train_step_gpu.json
python benchmarks/train_step.py --size 192 192 192 --patch 16 16 16 --tower base --batch 512 \
    --bf16 --sweep --out benchmarks/results/train_step_gpu_192.json
python benchmarks/train_step.py --size 240 480 480 --patch 10 20 20 --tower ctvit --batch 64 \
    --bf16 --checkpointing --sweep --out benchmarks/results/train_step_gpu_ctvit.json

The default recipe (GradCache, fused attention, read-ahead, both views of a report) against a plain
loop over the same cohort of random volumes: fp32, explicit attention, no checkpointing, negatives
of the micro-batch only, reading in the loop; its micro-batch is halved until it fits. Each runs in
a process of its own.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WARM_STEPS = 2
PLAIN_STEPS = 20

Row = dict[str, float | str]

TINY_TEXT = {"width": 256, "layers": 4, "heads": 4}
BERT_BASE = {"width": 768, "layers": 12, "heads": 12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=3, default=[48, 96, 96])
    parser.add_argument("--patch", type=int, nargs=3, default=[8, 24, 24])
    parser.add_argument(
        "--tower", choices=("tiny", "small", "base", "large", "ctvit"), default="tiny"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="double --micro until memory is full")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        cohort = make_cohort(Path(folder), tuple(args.size), max(2 * args.batch, 16))
        baseline = largest_that_fits(plain, args, cohort)
        rows = [baseline]
        if args.sweep:
            rows += swept(args, cohort)
        else:
            rows.append(alone(recipe, args, cohort))
    for row in rows:
        if "failed" not in row:
            row["volumes_per_s_ratio"] = row["volumes_per_s"] / baseline["volumes_per_s"]
            row["peak_ratio"] = row["peak_gib"] / baseline["peak_gib"]
    print(table(rows))
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    result = {"device": device_name(), "arguments": arguments, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def alone(variant: Callable[..., Row], args: argparse.Namespace, cohort: Path) -> Row:
    """Measure in a process of its own; what the memory doesn't hold gives a row that says so."""
    # Not a Pool, whose workers may have no children: the recipe reads ahead in some.
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as out,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        try:
            return pool.submit(variant, args, cohort, Path(out)).result()
        except (RuntimeError, MemoryError, ValueError) as error:  # BrokenProcessPool: killed
            if not is_memory(error):
                raise
            return {"variant": variant.__name__, "micro_batch": args.micro, "failed": "memory"}


def is_memory(error: BaseException) -> bool:
    """Whether a variant failed for want of memory."""
    killed = isinstance(error, concurrent.futures.process.BrokenProcessPool)
    return killed or "memory" in str(error) or isinstance(error, MemoryError)


def largest_that_fits(variant: Callable[..., Row], args: argparse.Namespace, cohort: Path) -> Row:
    """Measure with ever smaller micro-batches until one fits."""
    for micro in halves(args.micro):
        row = alone(variant, with_micro(args, micro), cohort)
        if "failed" not in row:
            return row
    raise SystemExit(f"{variant.__name__}: not even two volumes fit the memory")


def swept(args: argparse.Namespace, cohort: Path) -> list[Row]:
    """Measure the recipe with ever larger micro-batches until memory or the batch is full."""
    rows = []
    micro = args.micro
    while True:
        rows.append(alone(recipe, with_micro(args, micro), cohort))
        if "failed" in rows[-1] or micro >= args.batch:
            return rows
        micro = min(2 * micro, args.batch)


def with_micro(args: argparse.Namespace, micro: int) -> argparse.Namespace:
    """The same arguments with another micro-batch."""
    return argparse.Namespace(**{**vars(args), "micro": micro})


def halves(number: int) -> Iterator[int]:
    """``number``, its half and so on down to 2, below which there are no negatives."""
    while number >= 2:
        yield number
        number //= 2


def make_cohort(folder: Path, size: tuple[int, ...], studies: int) -> Path:
    """Random volumes with reports, as ``ctclip-prepare`` leaves them.

    At most 16 different ones, under as many names as there are studies: no disk is measured here.
    """
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
        target, original = (path / "volumes" / f"v{number}.b2nd" for number in (study, study % 16))
        if target == original:
            frame = storage.compress(rng.normal(-500, 300, size).astype(np.int16))
            target.write_bytes(frame)
            outcomes[f"v{study}"] = {"crc32": storage.checksum(frame)}
        else:
            target.hardlink_to(original)
            outcomes[f"v{study}"] = outcomes[f"v{study % 16}"]
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
    tower: dict[str, Any] = {
        "vision": {"size": args.tower, "patch": args.patch, "readouts": 2},
    }
    if args.tower == "ctvit":
        tower = {"ctvit": {"image_size": args.size[1:], "patch": args.patch}}
    text = TINY_TEXT if args.tower in ("tiny", "small") else BERT_BASE
    return {
        "cohort": str(cohort),
        "out": str(out),
        "steps": args.steps,
        "batch_size": args.batch,
        "micro_batch_size": args.micro,
        "workers": args.workers,
        "model": {**tower, "text": {"name_or_path": None, **text}},
        "text_warmup": {"steps": 0},
        "loss": {"sentence": 1.0},
        "engine": {
            "precision": "bf16" if args.bf16 else "fp32",
            "activation_checkpointing": args.checkpointing,
            "compile": args.compile,
        },
        "checkpoint": {"every": 10**9},
        "monitor": {"log_every": 1},
    }


def recipe(args: argparse.Namespace, cohort: Path, out: Path) -> Row:
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


def plain(args: argparse.Namespace, cohort: Path, out: Path) -> Row:
    """What one writes first: read, forward, loss of the micro-batch, backward, step."""
    import torch.nn.functional as F

    from ctclip import config, losses
    from ctclip.data.cohort import PreparedCohort
    from ctclip.data.dataset import CohortDataset, collate
    from ctclip.models import ctvit, vit3d
    from ctclip.models.ctclip import build_model
    from ctclip.models.text import build_tokenizer
    from ctclip.training import pretrain

    class Explicit:
        """Attention as in the textbook, in place of the fused kernel."""

        def __getattr__(self, name: str) -> Any:
            return getattr(F, name)

        @staticmethod
        def scaled_dot_product_attention(
            q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float = 0.0
        ) -> Tensor:
            weights = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
            return (weights if attn_mask is None else weights + attn_mask).softmax(dim=-1) @ v

    vit3d.F = ctvit.F = Explicit()  # type: ignore[assignment]
    loaded = config.from_dict(pretrain.PretrainConfig, settings(args, cohort, out))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(loaded.model).to(device)
    tokenizer = build_tokenizer(loaded.model.text)
    prepared = PreparedCohort.open(cohort)
    dataset = CohortDataset(prepared, prepared.split("train"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    order = np.random.default_rng(0)
    waited, since = 0.0, 0.0
    steps = min(args.steps * args.batch // args.micro, WARM_STEPS + PLAIN_STEPS)
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
) -> Row:
    """One row: what was measured and what follows from counted FLOPs."""
    from ctclip.models.ctclip import build_model
    from ctclip.training import flops, monitor

    peak_gib = monitor.peak_gib()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    per_study = flops.per_study(build_model(loaded.model).to(device), tuple(args.size), 1)
    row: Row = {
        "variant": name,
        "micro_batch": args.micro,
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
        "micro_batch",
        "volumes_per_s",
        "volumes_per_s_ratio",
        "tflops",
        "mfu",
        "peak_gib",
        "peak_ratio",
        "data_wait_share",
        "negatives",
        "failed",
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
