"""One scan scored from its file: what is not HU is held back here as it is from a cohort."""

import json

import numpy as np
import page_service
import pytest
import torch
from scans import chest_hu, save

import ctclip
from ctclip import checkpoint as checkpoints
from ctclip import cli
from ctclip.config import from_dict
from ctclip.data.problems import VolumeError
from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.text import Tokenizer


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = from_dict(ModelConfig, page_service.MODEL)
    model = build_model(config).eval()
    checkpoints.save(path, model, Tokenizer.builtin(), config, page_service.VOLUMES, {"step": 0})
    return path


@pytest.fixture
def scans(tmp_path):
    """One chest three times: as it is, windowed to 8 bits, and stored with an offset."""
    windowed = np.clip((chest_hu() + 1000) / 8, 0, 255).astype(np.uint8)
    return {
        "hu": save(tmp_path / "hu.nii.gz"),
        "8-bit": save(tmp_path / "windowed.nii.gz", windowed),
        "hu-offset": save(tmp_path / "offset.nii.gz", chest_hu() + np.int16(1024)),
    }


def test_python_holds_back_what_is_not_hu_and_says_how_to_go_on(ckpt, scans):
    scanner = ctclip.load(ckpt)
    expected = scanner.embed(scans["hu"])
    for code in ("8-bit", "hu-offset"):
        for ask in (scanner.score, scanner.embed):
            with pytest.raises(VolumeError, match=r"accept=") as error:
                ask(scans[code])
            assert error.value.code == code
    assert len(scanner.score(scans["8-bit"], accept=["8-bit"])) == 18
    assert not np.allclose(scanner.embed(scans["8-bit"], accept=["8-bit"]), expected)
    assert np.allclose(scanner.embed(scans["hu-offset"], rescale=(1, -1024)), expected)


def test_the_command_refuses_what_is_not_hu_until_it_is_told(ckpt, scans, tmp_path, capsys):
    def score(code, *told):
        out = tmp_path / "out"
        cli.zero_shot([f"--ckpt={ckpt}", f"--volume={scans[code]}", f"--out={out}", *told])
        return json.loads((out / "scores.json").read_text())["scores"]

    with pytest.raises(SystemExit) as stopped:
        score("8-bit")
    assert stopped.value.code == 2
    assert "--accept 8-bit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    expected = score("hu")
    assert score("8-bit", "--accept", "8-bit") == score("8-bit", "accept=[8-bit]")
    for told in (["--rescale", "1", "-1024"], ["rescale=[1,-1024]"]):
        assert score("hu-offset", *told) == pytest.approx(expected)


def test_a_cohort_is_not_told_how_to_read_scans(ckpt, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.zero_shot([f"--ckpt={ckpt}", f"--cohort={tmp_path}", "--accept=8-bit"])
    assert "a cohort was prepared" in capsys.readouterr().err
