"""Does a job span machines, and how much does it send? Two network namespaces stand for them.

sudo python benchmarks/multi_node.py --out benchmarks/results/multi_node.json    # five minutes

Linux, root and the ``ip`` command. Each namespace has its own loopback and one cable to the other,
so that whatever reaches the other side went through an address, as between machines; the disk is
shared, as a run folder has to be. The job is started as docs/training.md says, with the variables
that stand for SLURM's and with DeepSpeed's hostfile (``--no_ssh``, one command per machine), two
processes on each side, and its losses are compared with four processes on one machine. Then one
process per side trains at each ZeRO stage, and what its end of the cable sent per step is set
beside benchmarks/cost_model.py's count; a longer run less a shorter one leaves out start and end.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cost_model import Assumptions, bytes_per_step
from train_step import make_cohort

ROOT = Path(__file__).parents[1]
SIDES = ("ctclip0", "ctclip1")
ADDRESSES = ("10.213.0.1", "10.213.0.2")
SHORT, LONG = 2, 12
EMBED_DIM, VIEWS, BATCH = 64, 2, 8
SETTINGS = [
    f"batch_size={BATCH}",
    f"model.embed_dim={EMBED_DIM}",
    "model.vision.patch=[8,16,16]",
    "model.text.width=128",
    "text_warmup.steps=0",
    "checkpoint.every=0",
    "monitor.log_every=1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/multi_node.json"))
    args = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("network namespaces want root: sudo python benchmarks/multi_node.py")

    with tempfile.TemporaryDirectory() as scratch, two_machines():
        folder = Path(scratch)
        cohort = make_cohort(folder, (16, 32, 32), 32)
        launches = [launched(name, folder, cohort) for name in ("one machine", *LAUNCHES)]
        for row in launches:
            row["largest_difference"] = max(
                abs(ours / theirs - 1)
                for ours, theirs in zip(row["losses"], launches[0]["losses"], strict=True)
            )
        traffic = [sent_per_step(stage, folder, cohort) for stage in (0, 1, 2, 3)]
    print(table(launches, traffic))
    result = {"settings": SETTINGS, "launches": launches, "traffic": traffic}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


@contextlib.contextmanager
def two_machines() -> Iterator[None]:
    """Two namespaces, a cable, an address at each end."""
    try:
        for side in SIDES:
            ip("netns", "add", side)
        ip(
            "link",
            "add",
            "end0",
            "netns",
            SIDES[0],
            "type",
            "veth",
            "peer",
            "end1",
            "netns",
            SIDES[1],
        )
        for number, (side, address) in enumerate(zip(SIDES, ADDRESSES, strict=True)):
            ip("-n", side, "address", "add", f"{address}/24", "dev", f"end{number}")
            for device in (f"end{number}", "lo"):
                ip("-n", side, "link", "set", device, "up")
        yield
    finally:
        for side in SIDES:
            subprocess.run(["ip", "netns", "delete", side], check=False)


def ip(*words: str) -> None:
    """Configure the network."""
    subprocess.run(["ip", *words], check=True)


def pretrain(cohort: Path, out: Path, steps: int, *settings: str) -> list[str]:
    """The arguments of train/pretrain.py."""
    given = [f"cohort={cohort}", f"out={out}", f"steps={steps}", *SETTINGS, *settings]
    return ["train/pretrain.py", "--config", "configs/pretrain/tiny.yaml", *given]


def start(side: int | None, command: list[str], **variables: object) -> subprocess.Popen[str]:
    """Start a command on one of the two machines, or on this one."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in variables.items()}
    if side is not None:
        environment["GLOO_SOCKET_IFNAME"] = f"end{side}"
        command = ["ip", "netns", "exec", SIDES[side], *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for all of them; the first that failed ends the benchmark with its last words."""
    said = [process.communicate(timeout=600)[1] for process in processes]
    for process, words in zip(processes, said, strict=True):
        if process.returncode:
            raise SystemExit(words[-3000:])


def ranks(sides: list[int | None], arguments: list[str]) -> list[subprocess.Popen[str]]:
    """A process for each entry, told what SLURM's variables would tell it."""
    on_several = len(set(sides)) > 1
    common: dict[str, object] = {
        "WORLD_SIZE": len(sides),
        "MASTER_ADDR": ADDRESSES[0] if on_several else "127.0.0.1",
        "MASTER_PORT": 29555,
    }
    return [
        start(
            side,
            [sys.executable, *arguments],
            **common,
            RANK=rank,
            LOCAL_RANK=sides[:rank].count(side),
        )
        for rank, side in enumerate(sides)
    ]


def hostfile(arguments: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """DeepSpeed's launcher on each machine."""
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{address} slots=2\n" for address in ADDRESSES))
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--hostfile", str(hosts), "--no_ssh", "--master_addr", ADDRESSES[0]]
    return [start(side, [*command, "--node_rank", str(side), *arguments]) for side in (0, 1)]


LAUNCHES = ("two machines, SLURM's variables", "two machines, hostfile")


def launched(name: str, folder: Path, cohort: Path) -> dict[str, Any]:
    """Train with four processes in one of the ways; returns the losses."""
    out = folder / name.replace(" ", "_")
    arguments = pretrain(cohort, out, 5)
    since = time.perf_counter()
    if name == LAUNCHES[1]:
        finish(hostfile(arguments, folder))
    else:
        finish(ranks([0, 0, 1, 1] if name == LAUNCHES[0] else [None] * 4, arguments))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return {"launch": name, "losses": losses, "seconds": time.perf_counter() - since}


def sent_per_step(stage: int, folder: Path, cohort: Path) -> dict[str, float]:
    """Bytes that one of two processes sends in a step, measured and counted."""
    from safetensors import safe_open

    settings = []
    if stage:
        engine = folder / f"zero{stage}.json"
        engine.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        settings = [f"engine.deepspeed={engine}"]
    sent = []
    for steps in (SHORT, LONG):
        out = folder / f"zero{stage}_{steps}"
        before = sent_by_first()
        finish(ranks([0, 1], pretrain(cohort, out, steps, *settings)))
        sent.append(sent_by_first() - before)
    with safe_open(out / "model.safetensors", "pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    counted = bytes_per_step(
        Assumptions(weights=weights, embed_dim=EMBED_DIM, views=VIEWS), BATCH, 2, stage
    )
    measured = (sent[1] - sent[0]) / (LONG - SHORT)
    total = sum(counted.values())
    return {
        "zero": stage,
        "weights": weights,
        "measured_bytes": measured,
        "counted_bytes": total,
        "ratio": measured / total,
    }


def sent_by_first() -> int:
    """Bytes that have left the first machine."""
    statistics = subprocess.run(
        ["ip", "-n", SIDES[0], "-json", "-statistics", "link", "show", "end0"],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(json.loads(statistics.stdout)[0]["stats64"]["tx"]["bytes"])


def table(launches: list[dict[str, Any]], traffic: list[dict[str, float]]) -> str:
    """Both tables as Markdown."""
    lines = ["| four processes | largest difference of a loss |", "|---|---|"]
    lines += [f"| {row['launch']} | {row['largest_difference']:.1e} |" for row in launches]
    lines += ["", "| ZeRO | MB sent per step | counted | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {row['zero']} | {row['measured_bytes'] / 1e6:.2f} | {row['counted_bytes'] / 1e6:.2f} | "
        f"{row['ratio']:.2f} |"
        for row in traffic
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
