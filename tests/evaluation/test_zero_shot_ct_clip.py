"""CT-CLIP's file, straight into the script: its preprocessing, prompts and text length."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models_ct_clip import as_original, little_ct_clip
from scans import chest_hu, image

import ctclip
from ctclip import checkpoint
from ctclip.evaluation import prompts, scoring, zero_shot
from ctclip.evaluation.scoring import ZeroShotConfig
from ctclip.findings import FINDINGS

ROOT = Path(__file__).parents[2]
SPACING_MM = (8.0, 6.0, 5.0)
WORDS = ["is", "present", "not", ".", *sorted({w for f in FINDINGS for w in f.lower().split()})]


@pytest.fixture
def folder(tmp_path):
    """The original's ``.pt`` with its vocabulary beside it, and a scan stored left-posterior-up."""
    torch.save(as_original(little_ct_clip()), tmp_path / "CT-CLIP_v2.pt")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    nib.save(image(chest_hu(), "LPS", SPACING_MM), tmp_path / "scan.nii.gz")
    return tmp_path


def theirs(model):
    """Probabilities as CT-CLIP's scripts compute them, one finding after another."""
    hu = np.clip(chest_hu().astype(np.float64), -1000, 1000).transpose(0, 2, 1)
    steps = (SPACING_MM[0], SPACING_MM[2], SPACING_MM[1])
    size = [int(n * s / t) for n, s, t in zip(hu.shape, steps, (1.5, 0.75, 0.75), strict=True)]
    volume = F.interpolate(torch.from_numpy(hu)[None, None], size=size, mode="trilinear")
    volume = volume / 1000
    low = [max((n - t) // 2, 0) for n, t in zip(size, (240, 8, 8), strict=True)]
    volume = volume[:, :, low[0] : low[0] + 240, low[1] : low[1] + 8, low[2] : low[2] + 8]
    missing = 240 - volume.shape[2]
    volume = F.pad(volume, (0, 0, 0, 0, missing // 2, missing - missing // 2), value=-1.0)
    ids = {word: 5 + i for i, word in enumerate(WORDS)}
    found = {}
    with torch.no_grad():
        embedding = F.normalize(model.visual(volume.float()), dim=-1)
        for finding in FINDINGS:
            rows = torch.zeros(2, 32, dtype=torch.long)
            for row, text in zip(
                rows, (f"{finding} is present", f"{finding} is not present"), strict=True
            ):
                tokens = [2, *(ids[w] for w in text.lower().split()), ids["."], 3]
                row[: len(tokens)] = torch.tensor(tokens)
            logits = model.logit_scale.exp() * F.normalize(model.text(rows), dim=-1) @ embedding[0]
            found[finding] = float(logits.softmax(0)[0])
    return found


def test_the_script_scores_a_ct_clip_file_as_ct_clip_does(folder):
    command = [sys.executable, ROOT / "eval" / "zero_shot.py", "--ckpt", folder / "CT-CLIP_v2.pt"]
    command += ["--volume", folder / "scan.nii.gz", "--out", folder / "out"]

    subprocess.run(command, check=True, cwd=folder, capture_output=True)

    written = json.loads((folder / "out" / "scores.json").read_text())
    assert written["prompts"].startswith("ct-clip@")
    expected = theirs(little_ct_clip())
    assert written["scores"] == pytest.approx(expected, abs=1e-6)
    assert np.ptp(list(expected.values())) > 1e-3, "a constant would prove nothing"
    python = ctclip.load(folder / "CT-CLIP_v2.pt").score(folder / "scan.nii.gz")
    assert python == pytest.approx(expected, abs=1e-6)


def test_a_classfine_file_scores_with_its_linear_head(folder):
    state = {f"trained_model.{n}": w for n, w in as_original(little_ct_clip()).items()}
    weight, bias = torch.randn(18, 12), torch.randn(18)
    torch.save(state | {"classifier.weight": weight, "classifier.bias": bias}, folder / "l.pt")
    scanner = ctclip.load(folder / "l.pt")

    found = zero_shot.score_volume(scanner.checkpoint, folder / "scan.nii.gz")

    latent = torch.from_numpy(scanner.embed(folder / "scan.nii.gz"))
    expected = (latent.relu() @ weight.T + bias).sigmoid()
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert scanner.score(folder / "scan.nii.gz") == found
    config = ZeroShotConfig(score="softmax")
    prompted = zero_shot.score_volume(scanner.checkpoint, folder / "scan.nii.gz", config)
    assert prompted == pytest.approx(theirs(little_ct_clip()), abs=1e-6)
    said = scoring.header(scanner.checkpoint, scanner.prompts, ZeroShotConfig(), "l")
    assert (said["score"], said["label_informed"]) == ("head", True)
    with pytest.raises(ValueError, match="score=softmax"):
        scoring.kind_of(scanner.checkpoint, ZeroShotConfig(score="head", patches=2))


def test_a_head_is_not_asked_of_a_checkpoint_without_one(folder):
    loaded = checkpoint.load(folder / "CT-CLIP_v2.pt")
    with pytest.raises(ValueError, match="no linear head"):
        zero_shot.score_volume(loaded, folder / "scan.nii.gz", ZeroShotConfig(score="head"))


def test_what_was_fine_tuned_from_ct_clip_keeps_its_prompts():
    provenance = {"step": 5, "started_from": {"sha256": "0", "kind": "ct-clip"}}
    assert prompts.of(SimpleNamespace(provenance=provenance)).name == "ct-clip"


def test_a_converted_file_keeps_its_kind_and_so_its_prompts(folder):
    checkpoint.convert_ct_clip(folder / "CT-CLIP_v2.pt", folder / "out.safetensors")

    loaded = checkpoint.load(folder / "out.safetensors")

    assert prompts.of(loaded).pairs["Emphysema"] == (
        ("Emphysema is present.", "Emphysema is not present."),
    )
    assert prompts.of(loaded, "default") == prompts.load("default")
