"""What would a pretraining run take on 1 to 1,024 GPUs? A model with few assumptions, all printed.

python benchmarks/cost_model.py --out benchmarks/results/cost_model.json
python benchmarks/cost_model.py --volumes-per-s 86       # put in what train_step.py measured

time of a step = max(compute, reading) + the communication that compute doesn't hide
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Defaults: the base tower at 112 x 336 x 336 with CXR-BERT on H200s."""

    volumes_per_s: float = 86.0
    """One GPU: 989 TFLOP/s x 45 % / 5.2 TFLOP a study. That is 3.7 forward and backward, 1.2 for
    GradCache's second forward (``ctclip-describe configs/pretrain/base.yaml --size 112 336 336``)
    and some 0.3 for report and sentence. No activation checkpointing, which 32 volumes a card don't
    need and which would add 1.2."""

    weights: float = 229e6
    """Trained parameters of both towers."""

    embed_dim: int = 512
    views: int = 4
    """Embeddings gathered per study: two read-outs, report, sentence."""

    gpus_per_node: int = 8
    nvlink_gb_s: float = 450.0
    network_gb_s: float = 50.0
    """Per GPU, one direction: 400 Gbit/s InfiniBand."""

    hidden_share: float = 0.7
    """Share of the gradient's communication that overlaps with the backward."""

    volume_mb: float = 25.3
    """int16 voxels of one study."""

    compression: float = 2.7
    disk_gb_s_node: float = 12.0
    """The prepared cohort lies on each node's own NVMe disks. From shared storage of 40 GB/s in
    all, the whole cluster could read no more than 4,300 studies a second."""

    decode_mb_s_core: float = 570.0
    cores_per_gpu: int = 12
    dollars_per_gpu_hour: float = 3.0


def bytes_per_step(a: Assumptions, batch: int, gpus: int, zero: int) -> dict[str, float]:
    """Bytes that each GPU sends in one optimiser step, by component.

    In whole sets of weights (Rajbhandari et al. 2020): an all-reduce is two, a gather or a
    reduce-scatter one. DeepSpeed all-reduces gradients at ZeRO 1 and 2 too; ZeRO 3 gathers weights
    for the forward and for the backward. benchmarks/multi_node.py measures them.
    """
    share = (gpus - 1) / gpus
    full = 4.0 * a.weights
    per_gpu = batch / gpus
    sent = {
        "embeddings, gather": 4.0 * a.embed_dim * a.views * per_gpu * (gpus - 1),
        "embeddings, gradient": 2 * 4.0 * a.embed_dim * a.views * batch * share,
        "gradients": {0: 2, 1: 2, 2: 2, 3: 1}[zero] * full * share,
        "weights": {0: 0, 1: 1, 2: 1, 3: 2}[zero] * full * share,
    }
    return sent


def step_s(a: Assumptions, batch: int, gpus: int, zero: int) -> float:
    """Seconds of one step."""
    compute = batch / gpus / a.volumes_per_s
    nodes = math.ceil(gpus / a.gpus_per_node)
    from_disk = batch * a.volume_mb / a.compression / (1e3 * a.disk_gb_s_node * nodes)
    decoding = batch / gpus * a.volume_mb / (a.decode_mb_s_core * a.cores_per_gpu)
    gb_s = a.nvlink_gb_s if gpus <= a.gpus_per_node else a.network_gb_s
    sent = bytes_per_step(a, batch, gpus, zero)
    exposed = sent["embeddings, gather"] + sent["embeddings, gradient"]
    gradients = (sent["gradients"] + sent["weights"]) / (1e9 * gb_s)
    hidden = min(a.hidden_share * gradients, compute * 2 / 3)
    return max(compute, from_disk, decoding) + exposed / (1e9 * gb_s) + gradients - hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes-per-s", type=float, default=Assumptions.volumes_per_s)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    a = Assumptions(volumes_per_s=args.volumes_per_s)

    rows = [
        prediction(a, studies, epochs, gpus, args.zero)
        for studies, epochs in ((24_128, args.epochs), (10_000_000, 3))
        for gpus in (1, 8, 64, 256, 1024)
    ]
    print("| studies | GPUs | batch | studies/s | efficiency | hours | dollars |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['studies']:,} x {row['epochs']} | {row['gpus']} | {row['batch']:,} | "
            f"{row['studies_per_s']:,.0f} | {row['efficiency']:.0%} | {row['hours']:,.2f} | "
            f"{row['dollars']:,.0f} |"
        )
    sent = [bytes_per_step(a, 512, 64, zero) for zero in range(4)]
    print("\n| bytes sent per GPU and step (MB) | ZeRO 0 | 1 | 2 | 3 |\n|---|---|---|---|---|")
    for name in sent[0]:
        cells = " | ".join(f"{column[name] / 1e6:,.0f}" for column in sent)
        print(f"| {name} | {cells} |")
    if args.out is not None:
        result = {"assumptions": asdict(a), "zero": args.zero, "rows": rows, "bytes_sent": sent}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def prediction(
    a: Assumptions, studies: int, epochs: int, gpus: int, zero: int
) -> dict[str, float | int]:
    """One row: the global batch grows with the GPUs once each has 16 studies of 512."""
    batch = max(512, 16 * gpus)
    rate = batch / step_s(a, batch, gpus, zero)
    hours = studies * epochs / rate / 3600
    return {
        "studies": studies,
        "epochs": epochs,
        "gpus": gpus,
        "batch": batch,
        "studies_per_s": rate,
        "efficiency": rate / (gpus * a.volumes_per_s),
        "hours": hours,
        "dollars": hours * gpus * a.dollars_per_gpu_hour,
    }


if __name__ == "__main__":
    main()
