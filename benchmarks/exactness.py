"""Is training the same on any number of processes, micro-batches and ZeRO stages?

python benchmarks/exactness.py --out benchmarks/results/exactness.json
python benchmarks/exactness.py --precision bf16 --out benchmarks/results/exactness_bf16.json

Trains the same small model for 5 steps in every combination, with real processes and dropout on,
and compares loss, every gradient of every step, and the final weights with the plainest of them:
one process, one micro-batch, ZeRO 0, fp32. Combinations that ``--out`` holds already are kept.

A relative difference is the norm of the difference over the norm of the whole: of all steps'
losses, of one step's gradient over all parameters, of all weights. In a tensor whose gradient is
nothing but rounding, a bias in front of a softmax, that counts as little. Later steps start from
weights that differ in the last bit already, so the first gradient is listed apart.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

STEPS = 5
BATCH = 16
REFERENCE = (1, 1, 0, "fp32")
"""Processes, micro-batches per process, ZeRO stage, precision."""

MODEL = {
    "embed_dim": 32,
    "vision": {
        "size": "tiny",
        "width": 48,
        "depth": 2,
        "heads": 2,
        "patch": [4, 8, 8],
        "readouts": 2,
    },
    "text": {"name_or_path": None, "width": 32, "layers": 2, "heads": 2, "dropout": 0.2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exactness.json"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()

    combinations = [
        (*combination, args.precision)
        for combination in itertools.product(args.processes, args.splits, args.stages)
    ]
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    done = {(row["processes"], row["micro_batches"], row["zero"]) for row in rows}
    missing = [combination for combination in combinations if combination[:3] not in done]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for row in compare(missing, make_cohort(Path(folder)), Path(folder)):
            rows = sorted(
                [*rows, row], key=lambda r: (r["processes"], r["micro_batches"], r["zero"])
            )
            result = {"steps": STEPS, "batch": BATCH, "precision": args.precision, "rows": rows}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


def compare(
    combinations: Sequence[tuple[int, int, int, str]], cohort: Path, work: Path
) -> Iterator[dict[str, Any]]:
    """Train the reference and every combination; one row each."""
    reference = train(work / "reference", cohort, *REFERENCE)
    for index, (world, splits, stage, precision) in enumerate(tqdm(combinations, "combinations")):
        result = train(work / f"{index}", cohort, world, splits, stage, precision)
        row: dict[str, Any] = {"processes": world, "micro_batches": splits, "zero": stage}
        yield row | difference(result, reference)


def make_cohort(work: Path) -> Path:
    """Three dozen small phantoms, prepared."""
    from ctclip.data.cache import prepare
    from ctclip.data.manifest import read_manifest
    from ctclip.data.volume import VolumeConfig
    from ctclip.phantom.cohort import PhantomConfig, build

    settings = PhantomConfig(num_patients=36, shape=(16, 24, 24), workers=1)
    records, problems = read_manifest(build(settings, work / "phantoms"))
    recipe = VolumeConfig(spacing_mm=(20.0, 15.0, 15.0), size=(16, 24, 24))
    accept = ("no-chest", "partial-chest", "not-chest", "coarse", "spacing")
    return prepare(records, work / "prepared", recipe, problems=problems, accept=accept).path


def train(
    out: Path, cohort: Path, world: int, splits: int, stage: int, precision: str
) -> dict[str, Any]:
    """One run; returns losses, each step's gradients and the final weights."""
    out.mkdir(parents=True)
    zero = out / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    settings = {
        "cohort": str(cohort),
        "out": str(out),
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batch_size": BATCH // world // splits,
        "workers": 0,
        "model": MODEL,
        "text_warmup": {"steps": 2},
        "loss": {"sentence": 1.0},
        "optim": {"warmup_steps": 1, "text_lr_scale": 1.0},
        "engine": {"deepspeed": str(zero), "precision": precision},
        "checkpoint": {"every": STEPS, "keep": 1},
        "monitor": {"log_every": 1},
    }
    # Children are forked from a process that has imported everything and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "ctclip.training.pretrain"])
    port = free_port()
    processes = [
        context.Process(target=child, args=(rank, world, port, settings, out))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"{world} processes x {splits} micro-batches, ZeRO {stage}: {codes}")
    from safetensors.torch import load_file

    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        "losses": {"loss": torch.tensor([line["loss"] for line in lines if "loss" in line])},
        "gradients": torch.load(out / "gradients.pt"),
        "weights": load_file(out / "model.safetensors"),
    }


def child(rank: int, world: int, port: int, settings: dict[str, Any], out: Path) -> None:
    """One rank: train, and keep the gradient of every step."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from deepspeed.utils import safe_get_full_grad

    from ctclip import config
    from ctclip.training import optim, pretrain

    take_step = optim.take_step
    steps: list[dict[str, Tensor]] = []

    def recording(engine: Any) -> float | None:
        gradients = {
            name: safe_get_full_grad(parameter)
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        }
        steps.append({name: g.clone() for name, g in gradients.items() if g is not None})
        return take_step(engine)

    optim.take_step = recording
    pretrain.run(config.from_dict(pretrain.PretrainConfig, settings))
    if rank == 0:
        torch.save(steps, out / "gradients.pt")


def difference(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Relative differences of two runs."""
    steps = zip(result["gradients"], reference["gradients"], strict=True)
    gradients = [apart(ours, theirs) for ours, theirs in steps]
    return {
        "loss": apart(result["losses"], reference["losses"]),
        "gradient": gradients[0],
        "later_gradients": max(gradients[1:]),
        "weight": apart(result["weights"], reference["weights"]),
    }


def apart(tensors: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of the whole, over all tensors together."""
    if tensors.keys() != reference.keys():
        raise ValueError(f"not the same tensors: {sorted(tensors.keys() ^ reference.keys())}")
    squared = [
        (tensors[name].double() - reference[name].double()).square().sum() for name in tensors
    ]
    whole = [tensor.double().square().sum() for tensor in reference.values()]
    return float((torch.stack(squared).sum() / torch.stack(whole).sum()).sqrt())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = ("loss", "gradient", "later_gradients", "weight")
    lines = ["| processes | micro-batches | ZeRO | losses | 1st gradient | 2nd to 5th | weights |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = " | ".join(f"{row[name]:.0e}" for name in columns)
        lines.append(f"| {row['processes']} | {row['micro_batches']} | {row['zero']} | {cells} |")
    return "\n".join(lines)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


if __name__ == "__main__":
    main()
