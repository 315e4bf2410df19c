import json

import pytest
import torch

from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.text import TextConfig
from ctclip.models.vit3d import VisionConfig
from ctclip.training.optim import (
    EngineConfig,
    OptimConfig,
    WeightAverage,
    deepspeed_config,
    lr_at,
    param_groups,
)


@pytest.fixture(scope="module")
def model():
    return build_model(
        ModelConfig(
            embed_dim=16,
            vision=VisionConfig(size="tiny", width=32, depth=2, heads=2, patch=(4, 8, 8)),
            text=TextConfig(name_or_path=None, width=32, layers=2, heads=2),
        )
    )


def groups_by_name(model, config):
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name_of[id(parameter)]: group
        for group in param_groups(model, config)
        for parameter in group["params"]
    }


def test_every_trained_parameter_is_in_one_group_and_vectors_do_not_decay(model):
    groups = groups_by_name(model, OptimConfig(weight_decay=0.1))

    assert set(groups) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert groups["logit_scale"]["weight_decay"] == 0.0
    assert groups["visual.blocks.0.mlp.fc1.bias"]["weight_decay"] == 0.0
    assert groups["visual.blocks.0.mlp.fc1.weight"]["weight_decay"] == 0.1


def test_the_text_tower_has_its_own_learning_rate(model):
    groups = groups_by_name(model, OptimConfig(lr=1.0, text_lr_scale=0.1))

    assert groups["visual.blocks.0.mlp.fc1.weight"]["lr_scale"] == 1.0
    assert groups["text.transformer.encoder.layer.0.output.dense.weight"]["lr_scale"] == 0.1
    assert groups["logit_scale"]["lr_scale"] == 1.0


def test_layers_further_from_the_output_learn_slower(model):
    groups = groups_by_name(model, OptimConfig(layer_decay=0.5, text_lr_scale=1.0))
    scale = {name: group["lr_scale"] for name, group in groups.items()}

    assert scale["visual.norm.weight"] == scale["text.proj.weight"] == 1.0
    assert scale["visual.blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["visual.blocks.0.mlp.fc1.weight"] == 0.25
    assert scale["visual.stem.norm.weight"] == 0.125
    assert scale["text.transformer.encoder.layer.1.output.dense.weight"] == 0.5
    assert scale["text.transformer.embeddings.word_embeddings.weight"] == 0.125


def test_ct_vit_s_temporal_layers_lie_above_its_spatial_ones():
    ctvit = CTViTConfig(image_size=(20, 20), width=32, codes=4, spatial_depth=2, temporal_depth=2)
    text = TextConfig(name_or_path=None, layers=1)
    groups = groups_by_name(
        build_model(ModelConfig(ctvit=ctvit, text=text)), OptimConfig(layer_decay=0.5)
    )
    scale = {name: group["lr_scale"] for name, group in groups.items()}

    assert scale["visual.proj.weight"] == 1.0
    assert scale["visual.temporal.1.mlp.fc1.weight"] == 0.5
    assert scale["visual.temporal.0.position.conv.weight"] == 0.25
    assert scale["visual.spatial.1.mlp.fc1.weight"] == 0.125
    assert scale["visual.spatial.0.mlp.fc1.weight"] == 0.0625
    assert scale["visual.stem.1.weight"] == scale["visual.offset_bias.net.4.weight"] == 0.03125


def test_learning_rate_warms_up_then_follows_a_cosine():
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    rates = [lr_at(step, total_steps=110, config=config) for step in range(110)]

    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert max(rates) <= 1.0


def test_the_average_follows_the_weights_and_gives_them_back():
    layer = torch.nn.Linear(2, 2)
    average = WeightAverage(layer, 0.5)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1.0
    average.update(layer)

    with average.applied(layer):
        torch.testing.assert_close(layer.weight, before + 0.5)
    torch.testing.assert_close(layer.weight, before + 1.0)


def written(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return EngineConfig(deepspeed=str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 8}, "'train_batch_size' is set by batch_size"),
        ({"bf16": {"enabled": True}}, "'bf16' is set by engine.precision"),
        ({"fp16": {"enabled": True}}, "'fp16' is set by engine.precision"),
        ({"activation_checkpointing": {}}, "is set by engine.activation_checkpointing"),
        ({"zero_optimization": {"stage": 4}}, "stage must be 0, 1, 2 or 3"),
        (
            {"zero_optimisation": {"stage": 2}},
            r"ds.json: unknown key 'zero_optimisation'; did you mean 'zero_optimization'\?",
        ),
        ({"frobnicate": 1}, "unknown key 'frobnicate'; known: zero_optimization, checkpoint"),
        ({"zero_optimization": None}, "'zero_optimization' must be a JSON object .* got null"),
        ({"zero_optimization": True}, "'zero_optimization' must be a JSON object .* got true"),
        ({"checkpoint": None}, "'checkpoint' must be a JSON object"),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "ZeRO 0 has nothing to offload",
        ),
    ],
)
def test_settings_with_another_home_and_combinations_that_fail_silently_are_refused(
    tmp_path, content, message
):
    with pytest.raises(ValueError, match=message):
        deepspeed_config(written(tmp_path, content), OptimConfig(), rows_per_rank=4, world_size=2)


def test_zero_3_with_micro_batches_is_refused(tmp_path):
    engine = written(tmp_path, {"zero_optimization": {"stage": 3}})
    rows = {"rows_per_rank": 4, "world_size": 2}

    with pytest.raises(ValueError, match="ZeRO 3 x micro-batches is refused"):
        deepspeed_config(engine, OptimConfig(), **rows, micro_batch_size=2)
    assert deepspeed_config(engine, OptimConfig(), **rows, micro_batch_size=4)


def test_our_settings_reach_deepspeed(tmp_path):
    config = deepspeed_config(
        written(tmp_path, {"zero_optimization": {"stage": 2}}),
        OptimConfig(grad_clip=0.7),
        rows_per_rank=4,
        world_size=2,
    )

    assert config["train_batch_size"] == 8
    assert config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.7
    assert config["zero_optimization"]["stage"] == 2
