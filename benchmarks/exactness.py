"""Is training the same on any number of processes, micro-batches and ZeRO stages?

python benchmarks/exactness.py --out benchmarks/results/exactness.json

Trains the same tiny model for 5 steps in every combination, with real processes and dropout on, and
compares loss, every gradient of the first step, and the final weights with the plainest of them.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

STEPS = 5
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exactness.json"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cohort = make_cohort(work)
        combinations = [
            combination
            for combination in itertools.product(args.processes, args.splits, args.stages)
            if combination[0] * combination[1] <= BATCH
        ]
        rows = []
        reference = None
        for world, splits, stage in tqdm(combinations, "combinations"):
            result = train(work, cohort, world, splits, stage, args.precision)
            reference = reference or result
            rows.append(
                {"processes": world, "micro_batches": splits, "zero": stage}
                | difference(result, reference)
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"precision": args.precision, "rows": rows}, indent=1))
    print(table(rows))


def make_cohort(work: Path) -> Path:
    """Two dozen small phantoms, prepared."""
    from ctclip.data.cache import prepare
    from ctclip.data.manifest import read_manifest
    from ctclip.data.volume import VolumeConfig
    from ctclip.phantom.cohort import PhantomConfig, build

    settings = PhantomConfig(num_patients=24, shape=(16, 24, 24), workers=1)
    records, problems = read_manifest(build(settings, work / "phantoms"))
    recipe = VolumeConfig(spacing_mm=(20.0, 15.0, 15.0), size=(16, 24, 24))
    accept = ("no-chest", "partial-chest", "not-chest", "coarse", "spacing")
    return prepare(records, work / "prepared", recipe, problems=problems, accept=accept).path


def train(
    work: Path, cohort: Path, world: int, splits: int, stage: int, precision: str
) -> dict[str, object]:
    """One run; returns losses, first gradients and final weights."""
    name = f"{world}-{splits}-{stage}"
    (work / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    settings = {
        "cohort": str(cohort),
        "out": str(work / name),
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batch_size": BATCH // world // splits,
        "workers": 0,
        "model": {
            "embed_dim": 32,
            "vision": {"size": "tiny", "width": 48, "depth": 2, "heads": 2, "patch": [4, 8, 8]},
            "text": {"name_or_path": None, "width": 32, "layers": 2, "heads": 2, "dropout": 0.2},
        },
        "text_warmup": {"steps": 2},
        "loss": {"sentence": 1.0},
        "optim": {"warmup_steps": 1, "text_lr_scale": 1.0},
        "engine": {"deepspeed": str(work / f"zero{stage}.json"), "precision": precision},
        "checkpoint": {"every": STEPS, "keep": 1},
        "monitor": {"log_every": 1},
    }
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes = [
        context.Process(target=child, args=(rank, world, port, settings, work / name))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{name} failed: {[process.exitcode for process in processes]}")
    from safetensors.torch import load_file

    lines = (work / name / "metrics.jsonl").read_text().splitlines()
    return {
        "losses": [line["loss"] for line in map(json.loads, lines) if "loss" in line],
        "gradients": torch.load(work / name / "gradients.pt"),
        "weights": load_file(work / name / "model.safetensors"),
    }


def child(rank: int, world: int, port: int, settings: dict[str, object], out: Path) -> None:
    """One rank: train, and keep the gradients of the first step."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from ctclip import config
    from ctclip.training import optim, pretrain

    take_step = optim.take_step

    def recording(engine: object) -> float | None:
        path = out / "gradients.pt"
        if not path.exists():
            from deepspeed.utils import safe_get_full_grad

            gradients = {
                name: safe_get_full_grad(parameter)
                for name, parameter in engine.module.named_parameters()  # type: ignore[attr-defined]
                if parameter.requires_grad
            }
            if rank == 0:
                torch.save({n: g for n, g in gradients.items() if g is not None}, path)
        return take_step(engine)

    optim.take_step = recording
    pretrain.run(config.from_dict(pretrain.PretrainConfig, settings))


def difference(result: dict, reference: dict) -> dict[str, float]:
    """Largest relative differences; a tensor's is measured against its own largest element."""
    losses = zip(result["losses"], reference["losses"], strict=True)
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in losses),
        "gradient": tensors_apart(result["gradients"], reference["gradients"]),
        "weight": tensors_apart(result["weights"], reference["weights"]),
    }


def tensors_apart(tensors: dict, reference: dict) -> float:
    """Largest difference over all tensors, relative to the largest element among them."""
    largest = max(float(tensor.abs().max()) for tensor in reference.values())
    return max(
        float((tensors[name].float() - tensor.float()).abs().max()) / largest
        for name, tensor in reference.items()
    )


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| processes | micro-batches | ZeRO | loss | gradient | weights after 5 steps |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {row['processes']} | {row['micro_batches']} | {row['zero']} | {row['loss']:.0e} | "
        f"{row['gradient']:.0e} | {row['weight']:.0e} |"
        for row in rows
    ]
    return "\n".join(lines)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


if __name__ == "__main__":
    main()
