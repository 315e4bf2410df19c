"""Going on from a checkpoint; CT-CLIP's VocabFine, where frozen means frozen."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import Run, column, pretrain, weights_of

from ctclip import checkpoint
from ctclip.data.cohort import PreparedCohort
from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.text import TextConfig, build_tokenizer

VOCABFINE = Path(__file__).parents[2] / "configs" / "pretrain" / "vocabfine.yaml"


@pytest.fixture(scope="module")
def start(cohort, tmp_path_factory):
    """A checkpoint with CT-CLIP's towers, codebook and all, for the cohort's volumes."""
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=16,
        ctvit=CTViTConfig(
            image_size=(16, 16),
            patch=(2, 4, 4),
            width=32,
            spatial_depth=1,
            temporal_depth=1,
            heads=2,
            head_dim=8,
            codes=64,
        ),
        text=TextConfig(name_or_path=None, width=32, layers=2, heads=2, context_length=64),
    )
    path = tmp_path_factory.mktemp("start") / "model.safetensors"
    checkpoint.save(
        path,
        build_model(config),
        build_tokenizer(config.text),
        config,
        PreparedCohort.open(cohort).volume_config,
        {"kind": "ct-clip"},
    )
    return path


def vocabfine(start, **changes):
    """The shipped config, with the pace of a test."""
    settings = yaml.safe_load(VOCABFINE.read_text())
    settings["optim"] |= {"lr": 5e-3, "warmup_steps": 2}
    settings |= {"steps": 16, "workers": 0, "engine": {}, "checkpoint": {"every": 16}}
    settings |= {"batch_size": 32, "micro_batch_size": 8}
    return settings | {"start_from": str(start), "monitor": {"log_every": 1}} | changes


def changed(start, out):
    """Names of the weights that a run moved, by a single bit or more."""
    before, after = load_file(start), weights_of(out)
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("world_size", [1, 2])
def test_vocabfine_teaches_the_prompts_and_leaves_the_volume_tower_to_the_bit(
    cohort, start, tmp_path, world_size
):
    lines = pretrain(cohort, tmp_path / "run", world_size, **vocabfine(start))

    moved = changed(start, tmp_path / "run")
    assert not any(name.startswith("visual.") for name in moved)
    assert {"text.proj.weight", "logit_scale"} <= moved
    loss = column(lines, "loss_opposite")
    assert sum(loss[-4:]) < 0.9 * sum(loss[:4])
    model = checkpoint.load(tmp_path / "run" / "model.safetensors")
    assert model.provenance["label_informed"] is True
    assert model.provenance["started_from"]["kind"] == "ct-clip"


@pytest.mark.parametrize(
    ("text", "frozen"),
    [
        ({"train": "frozen"}, "text.transformer."),
        ({"train": "last-n", "train_layers": 1}, "text.transformer.encoder.layer.0."),
    ],
)
def test_the_part_of_bert_that_is_frozen_is_frozen_to_the_bit(
    cohort, start, tmp_path, text, frozen
):
    changes = vocabfine(start, model={"text": text})

    pretrain(cohort, tmp_path / "run", **changes)

    moved = changed(start, tmp_path / "run")
    assert not any(name.startswith((frozen, "visual.")) for name in moved)
    assert "text.proj.weight" in moved


def test_lora_is_merged_into_the_berts_own_weights(cohort, start, tmp_path):
    changes = vocabfine(start, model={"text": {"train": "lora", "lora_rank": 2}})

    pretrain(cohort, tmp_path / "run", **changes)

    bert = {name for name in changed(start, tmp_path / "run") if ".transformer." in name}
    assert bert
    assert all(name.endswith(("query.weight", "value.weight")) for name in bert)


def test_an_unfrozen_volume_tower_learns_too(cohort, start, tmp_path):
    changes = vocabfine(start)
    changes["optim"]["volume_lr_scale"] = 1.0

    pretrain(cohort, tmp_path / "run", **changes)

    moved = changed(start, tmp_path / "run")
    assert {"visual.proj.weight", "visual.codebook.embed"} <= moved


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"embed_dim": 8}}, "start_from takes the model from its checkpoint"),
        ({"windows_hu": [[-500.0, 500.0]]}, "set windows_hu to the former"),
    ],
)
def test_what_the_checkpoint_decides_is_not_set_again(cohort, start, tmp_path, changes, words):
    run = Run(cohort, tmp_path / "run", 1, vocabfine(start, **changes))

    assert run.wait() == [1]
    assert words in run.said()
