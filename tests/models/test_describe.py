import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from ctclip.config import ConfigError
from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.describe import describe, read_model_config, table
from ctclip.models.text import TextConfig, build_text_tower
from ctclip.models.vit3d import VisionConfig

TEXT = TextConfig(name_or_path=None, width=32, layers=1, heads=2, context_length=64)
CONFIG = ModelConfig(
    embed_dim=24,
    vision=VisionConfig(size="tiny", width=48, heads=2, patch=(4, 8, 8), stem="linear"),
    text=TEXT,
)
SIZE = (16, 32, 32)


@pytest.fixture(scope="module")
def description():
    return describe(CONFIG, SIZE)


def test_counts_are_those_of_the_model(description):
    model = build_model(CONFIG)

    assert description.total_parameters == sum(p.numel() for p in model.parameters())
    assert description.vision.parameters == sum(p.numel() for p in model.visual.parameters())
    assert description.grid == (4, 4, 4)
    assert description.vision.tokens == 64


def test_flops_are_those_of_a_real_forward(description):
    tower = build_model(CONFIG).visual.eval()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.zeros(1, 1, *SIZE))

    assert description.vision.forward_tflop == pytest.approx(counter.get_total_flops() / 1e12)
    assert 2.5 < description.vision.training_tflop / description.vision.forward_tflop < 3.5


def test_memory_is_what_a_real_pass_keeps(description):
    """Up to what the CPU's attention kernel keeps for itself."""
    tower, kept = build_model(CONFIG).visual.train(), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tower(torch.zeros(1, 1, *SIZE))
    weights = {p.data_ptr() for p in tower.parameters()}
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)

    assert description.vision.activation_gib * 2**30 == pytest.approx(real, rel=0.05)


def test_checkpointing_and_short_floats_save_memory(description):
    half = describe(CONFIG, SIZE, precision="bf16")

    assert description.vision.checkpointed_gib < description.vision.activation_gib
    assert half.vision.activation_gib == pytest.approx(
        description.vision.activation_gib / 2, rel=0.1
    )


def test_a_larger_card_takes_a_larger_batch(description):
    batches = [description.largest_batch(gib) for gib in (0.0, 1.0, 24.0, 80.0)]

    assert batches[0] == 0
    assert batches == sorted(batches)
    assert description.largest_batch(24, checkpointing=True) > description.largest_batch(24)


def test_ct_clips_tower_costs_what_was_measured_of_it():
    """0.967 TFLOP were counted on the original; 0.177 of them recomputed one small table."""
    description = describe(ModelConfig(ctvit=CTViTConfig(), text=TEXT), (240, 480, 480))

    assert description.vision.tokens == 13_824
    assert description.vision.forward_tflop == pytest.approx(0.9667 - 0.1773, rel=0.01)
    assert description.vision.checkpointed_gib < 52.1 / 8 / 4, "a quarter of the original's"


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_training_config_or_a_models_own_is_read(tmp_path, wrapped):
    model = "embed_dim: 24\nvision: {size: tiny}\n"
    text = f"steps: 5\nmodel:\n  {model.replace(chr(10), chr(10) + '  ')}" if wrapped else model
    (tmp_path / "config.yaml").write_text(text)

    config = read_model_config(tmp_path / "config.yaml")

    assert (config.embed_dim, config.vision.size) == (24, "tiny")


def test_a_runs_windows_are_its_models_channels(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("windows_hu: [[-1000, 1000], [-150, 250]]\nmodel: {vision: {size: tiny}}\n")

    assert read_model_config(path).channels == 2


def test_a_run_from_a_checkpoint_is_not_mistaken_for_a_model():
    with pytest.raises(ConfigError, match="a run without a key 'model': its model is that of the"):
        read_model_config(Path(__file__).parents[2] / "configs/pretrain/vocabfine.yaml")


def test_a_bert_on_disk_is_counted_as_it_is_and_a_named_one_says_as_what(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"model_type": "bert", "vocab_size": 50, "intermediate_size": 32} | shape
    (tmp_path / "config.json").write_text(json.dumps(values))
    text = TextConfig(name_or_path=str(tmp_path))

    local = describe(replace(CONFIG, text=text), SIZE)
    named = describe(replace(CONFIG, text=TextConfig(name_or_path="some/bert")), SIZE)

    tower = build_text_tower(text, CONFIG.embed_dim, pretrained=False)
    assert local.text_parameters == sum(p.numel() for p in tower.parameters())
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(local), table(named))
    assert capture.get().count("(some/bert, counted as BERT-base)") == 1


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (CONFIG, (0, 32, 32), "at least 1, got"),
        (CONFIG, (-5, 32, 32), "at least 1, got"),
        (ModelConfig(ctvit=CTViTConfig(), text=TEXT), (240, 320, 320), r"set ctvit\.image_size"),
    ],
)
def test_a_size_that_no_volume_or_tower_has_is_refused(config, size, words):
    with pytest.raises(ValueError, match=words):
        describe(config, size)


def test_a_config_that_is_none_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("- a list")

    with pytest.raises(ConfigError, match="expected the keys of a model"):
        read_model_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="not a readable config"):
        read_model_config(tmp_path / "nothing.yaml")


def test_a_description_can_be_printed(description):
    console = Console(record=True, quiet=False, width=80)
    with console.capture() as capture:
        console.print(table(description))

    assert "largest batch, 24 GiB" in capture.get()
