"""CT-CLIP's model at its real size: as it is usually written, and as ctclip writes it.

python benchmarks/ctvit.py            # writes benchmarks/results/ctvit.json

Same random weights (one file, loaded in the same way) and volume (240 x 480 x 480); a process for
one forward of a volume and one for scoring 18 findings, for each formulation. "plain" computes the
position bias for every pair of patches, softmax attention step by step, one-hot matrices in the
codebook, one encoding of the volume for each finding and prompts padded to 512 tokens. Ours encodes
all prompts, lets go of the text tower and encodes the volume once. Time is given in wall and in CPU
seconds; the latter hardly depend on what else the machine does. Peaks are of the whole process:
libraries, weights and volume included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ctclip import checkpoint
from ctclip.findings import FINDINGS
from ctclip.models import ctvit
from ctclip.models.ctclip import CTCLIP, ModelConfig, build_model
from ctclip.models.ctvit import LOGIT_SCALE, CTViTConfig
from ctclip.models.describe import CXR_BERT_CONFIG, KeptForBackward
from ctclip.models.text import Tokenizer

PARTS = ("forward", "findings")

PROMPT_TOKENS = 12
"""About the length of "Coronary artery wall calcification is not present."."""


class PlainBias(ctvit.OffsetBias):
    """Every pair of patches through the network."""

    def forward(self, h: int, w: int) -> Tensor:
        """As the tower's."""
        device = self.net[0].weight.device
        rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        places = places.reshape(-1, 2).float()
        offsets = places[:, None] - places[None]
        return rearrange(self.net(offsets.sign() * offsets.abs().log1p()), "i j g -> g i j")


class PlainAttention(ctvit.Attention):
    """Similarities and weights as whole matrices."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As the tower's."""
        q = rearrange(self.to_q(self.norm(x)), "b n (g c) -> b g n c", g=self.heads)
        k, v = rearrange(self.to_kv(x), "b n (two g c) -> two b g n c", two=2, g=self.heads)
        q = F.normalize(q, dim=-1) * self.q_scale
        k = F.normalize(k, dim=-1) * self.k_scale
        similarity = torch.einsum("b g i c, b g j c -> b g i j", q, k) * LOGIT_SCALE
        if bias is not None:
            similarity = similarity + bias
        weights = similarity.softmax(dim=-1)
        out = torch.einsum("b g i j, b g j c -> b g i c", weights, v)
        return self.proj(rearrange(out, "b g n c -> b n (g c)"))


class PlainMLP(ctvit.GatedMLP):
    """All tokens at once."""

    def forward(self, x: Tensor) -> Tensor:
        """As the tower's."""
        return self._tokenwise(x)


class PlainCodebook(ctvit.Codebook):
    """The nearest code by a one-hot matrix."""

    def forward(self, tokens: Tensor) -> Tensor:
        """As the tower's."""
        flat = F.normalize(tokens.reshape(-1, tokens.shape[-1]), dim=-1)
        similarity = flat @ F.normalize(self.embed, dim=-1).T
        one_hot = F.one_hot(similarity.argmax(dim=-1), len(self.embed)).type(flat.dtype)
        codes = (one_hot @ self.embed).reshape(tokens.shape)
        return tokens + (codes - tokens).detach() if self.training else codes


PLAIN: dict[type, type] = {
    ctvit.OffsetBias: PlainBias,
    ctvit.Attention: PlainAttention,
    ctvit.GatedMLP: PlainMLP,
    ctvit.Codebook: PlainCodebook,
}


CONFIG = ModelConfig(ctvit=CTViTConfig())


def write_model(path: Path) -> None:
    """A checkpoint with weights that depend on nothing but the seed."""
    torch.manual_seed(0)
    model = build_model(CONFIG, hf_config=CXR_BERT_CONFIG)
    volumes = checkpoint.ct_clip_volumes(CTViTConfig())
    checkpoint.save(path, model, Tokenizer.builtin(), CONFIG, volumes, {})


def as_formulated(model: CTCLIP, formulation: str) -> CTCLIP:
    """The model with its layers exchanged for the plain ones, if these are asked."""
    if formulation == "plain":
        for module in model.modules():
            if type(module) in PLAIN:
                module.__class__ = PLAIN[type(module)]
        visual = model.visual
        # Patches of the whole volume at once.
        visual._embed = lambda image: visual.stem(  # type: ignore[method-assign, union-attr]
            rearrange(image, "b c (t x) (h y) (w z) -> (b t) (h w) (c x y z)", x=10, y=20, z=20)
        )
    return model


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resident_gib() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def training_gib(formulation: str, batch: int) -> float:
    """What autograd keeps of the volume tower for a batch, counted on the meta device.

    Ours with activation checkpointing, the insides of one block included.
    """
    with torch.device("meta"):
        model = build_model(CONFIG, hf_config=CXR_BERT_CONFIG)
        visual = as_formulated(model, formulation).visual.train()
        image = torch.empty(batch, 1, 240, 480, 480)
    plain = KeptForBackward(visual)
    if formulation == "plain":
        with plain.counting():
            visual(image)
        return plain.bytes / 2**30
    # Without the fused kernel: on a CPU, attention with a learned bias falls apart into its steps.
    with plain.counting():
        visual(image)
    visual.set_grad_checkpointing()
    outside = KeptForBackward(visual)
    with outside.counting():
        visual(image)
    return (outside.bytes + plain.largest_part) / 2**30


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}


@torch.no_grad()
def measure(formulation: str, part: str, weights: Path, out: Path, plain_findings: int) -> None:
    """One formulation in this process: one forward, or the 18 findings of one volume.

    ``plain_findings`` of the 18 are really scored by the plain one, and its time scaled to 18.
    """
    model = as_formulated(checkpoint.load(weights).model, formulation)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(5, 30000, (len(FINDINGS), 2, PROMPT_TOKENS), generator=generator)
    prompts[..., 0], prompts[..., -1] = 2, 3

    def volume() -> Tensor:
        generator.manual_seed(2)
        return torch.rand(1, 1, 240, 480, 480, generator=generator).mul_(2).sub_(1)

    before, clock = resident_gib(), Clock()
    if part == "forward":
        found = model.encode_image(volume(), normalize=True)
        result: dict[str, Any] = clock.read()
    elif formulation == "plain":
        logits, image = [], volume()
        for pair in prompts[:plain_findings]:
            padded = F.pad(pair, (0, 512 - PROMPT_TOKENS))
            embedded = model.encode_image(image, normalize=True)
            logits.append(model.scale() * model.encode_text(padded, normalize=True) @ embedded[0])
        found = torch.stack(logits)
        result = {name: value * len(FINDINGS) / len(found) for name, value in clock.read().items()}
        result |= {"scored": len(found), "volume_encodes": len(found)}
    else:  # as zero_shot.py --volume does
        texts = model.encode_text(prompts.flatten(0, 1), normalize=True)
        del model.text
        embedded = model.encode_image(volume(), normalize=True)
        found = (model.scale() * texts @ embedded[0]).reshape(-1, 2)
        result = clock.read() | {"scored": len(found), "volume_encodes": 1}
    result |= {"loaded_gib": round(before, 3), "peak_gib": round(peak_gib(), 3)}
    np.save(out.with_suffix(".npy"), found.numpy())
    out.write_text(json.dumps(result))


def difference(ours: np.ndarray, plain: np.ndarray) -> float:
    """Largest difference between the formulations, over what both computed."""
    return float(np.abs(ours[: len(plain)] - plain).max())


def main() -> None:
    """Measure both formulations one after the other and compare their outputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--plain-findings",
        type=int,
        default=len(FINDINGS),
        help="findings that the plain formulation really scores; its time is scaled to 18",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        measure(*arguments.one, arguments.weights, arguments.out, arguments.plain_findings)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {"ctclip": {}, "plain": {}}
    outputs: dict[tuple[str, str], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights, out = Path(folder) / "weights.safetensors", Path(folder) / "part.json"
        write_model(weights)
        for formulation, part in product(results, PARTS):
            command = [sys.executable, __file__, "--one", formulation, part]
            command += ["--weights", str(weights), "--out", str(out)]
            command += ["--threads", str(arguments.threads)]
            command += ["--plain-findings", str(arguments.plain_findings)]
            subprocess.run(command, check=True)
            results[formulation][part] = json.loads(out.read_text())
            outputs[formulation, part] = np.load(out.with_suffix(".npy"))
    ours, plain = results["ctclip"], results["plain"]

    def ratio(value: str, part: str, digits: int) -> float:
        return round(plain[part][value] / ours[part][value], digits)

    summary = {
        **results,
        "largest_difference": {
            part: difference(outputs["ctclip", part], outputs["plain", part]) for part in PARTS
        },
        "ratios": {
            "forward_cpu": ratio("cpu_s", "forward", 2),
            "findings_wall": ratio("wall_s", "findings", 1),
            "findings_cpu": ratio("cpu_s", "findings", 1),
            **{
                f"{part}_peak": round(ours[part]["peak_gib"] / plain[part]["peak_gib"], 3)
                for part in PARTS
            },
        },
        "training_activations_gib_batch_8": {
            formulation: round(training_gib(formulation, 8), 2) for formulation in results
        },
        "threads": arguments.threads,
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
    }
    (arguments.out / "ctvit.json").write_text(json.dumps(summary, indent=1) + "\n")
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
