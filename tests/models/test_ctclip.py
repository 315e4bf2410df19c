import math
import shutil

import pytest
import torch

from ctclip.config import ConfigError, from_dict
from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.text import TextConfig, Tokenizer
from ctclip.models.vit3d import VisionConfig


def little(**vision):
    shape = {"size": "tiny", "width": 48, "depth": 2, "heads": 2, "patch": (4, 8, 8)}
    return ModelConfig(
        embed_dim=24,
        vision=VisionConfig(**(shape | vision)),
        text=TextConfig(name_or_path=None, width=32, layers=1, heads=2, context_length=64),
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(little())


IMAGE = torch.rand(3, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
TEXT = Tokenizer.builtin(64)(["No nodule.", "Pleural effusion is present.", "Emphysema."])


def test_forward_gives_what_open_clips_loss_takes(model):
    from open_clip.loss import ClipLoss

    output = model(IMAGE, TEXT)
    loss = ClipLoss()(**output)
    loss.backward()

    assert output["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert output["image_features"].norm(dim=-1).tolist() == pytest.approx([1.0] * 3, rel=1e-5)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_scale_is_bounded_in_forward(model):
    torch.nn.init.constant_(model.logit_scale, 50.0)

    assert model.logit_scale.shape == (1,)
    assert model(IMAGE, TEXT)["logit_scale"].item() == pytest.approx(100.0, rel=1e-5)


def test_either_side_can_be_embedded_alone(model):
    model.eval()

    assert torch.equal(model(image=IMAGE)["image_features"], model.encode_image(IMAGE, True))
    assert torch.equal(model(text=TEXT)["text_features"], model.encode_text(TEXT, True))


def test_logits_are_scaled_cosines(model):
    model.eval()
    per_image, per_text = model.get_logits(IMAGE, TEXT)

    output = model(IMAGE, TEXT)
    expected = output["logit_scale"] * output["image_features"] @ output["text_features"].T
    torch.testing.assert_close(per_image, expected)
    assert torch.equal(per_text, per_image.T)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vision": {"queries": 0}}, r"vision\.queries must be at least 1, got 0"),
        ({"vision": {"registers": -1}}, r"vision\.registers must be at least 0, got -1"),
        ({"vision": {"depth": 0}}, r"vision\.depth must be at least 1, got 0"),
        ({"vision": {"heads": 0}}, r"vision\.heads must be at least 1, got 0"),
        ({"vision": {"patch": [8, 0, 8]}}, r"vision\.patch must be at least 1, got \(8, 0, 8\)"),
        ({"vision": {"position_step": [1, 1, 0]}}, r"vision\.position_step must be positive"),
        ({"ctvit": {"heads": 0}}, r"ctvit\.heads must be at least 1, got 0"),
        ({"ctvit": {"codes": 0}}, r"ctvit\.codes must be at least 1, got 0"),
        ({"ctvit": {"spatial_depth": 0}}, r"ctvit\.spatial_depth must be at least 1, got 0"),
        ({"text": {"heads": 0}}, r"text\.heads must be at least 1, got 0"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
    ],
)
def test_numbers_that_no_model_can_have_are_refused_by_name(values, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(ModelConfig, values)


def test_one_read_out_serves_both_purposes(model):
    readouts = model.eval().encode_image_readouts(IMAGE)

    assert readouts["prompt"] is readouts["report"]
    assert torch.equal(readouts["prompt"], model.encode_image(IMAGE))


def test_two_read_outs_differ():
    model = build_model(little(readouts=2)).eval()
    readouts = model.encode_image_readouts(IMAGE, normalize=True)

    assert not torch.allclose(readouts["prompt"], readouts["report"])
    assert torch.equal(model(IMAGE)["report_image_features"], readouts["report"])


def test_region_scores_add_up_to_the_volumes_score(model):
    model.eval()
    prompt = model.encode_text(TEXT[1:2], normalize=True)[0]

    regions = model.encode_patches(IMAGE) @ prompt

    torch.testing.assert_close(
        regions.mean(dim=(1, 2, 3)), model.encode_image(IMAGE) @ prompt, rtol=1e-4, atol=1e-5
    )


def test_hounsfield_units_are_refused(model):
    with pytest.raises(ValueError, match=r"look like HU: apply ctclip\.data\.volume\.window"):
        model.encode_image(IMAGE * 1000)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused(model, value):
    broken = IMAGE.clone()
    broken[1, 0, 2, 3, 4] = value

    with pytest.raises(ValueError, match="NaN or infinite"):
        model.encode_image(broken)


def test_text_of_another_tokenizer_is_refused(model):
    with pytest.raises(ValueError, match="text has 65 tokens, the model reads 64"):
        model.encode_text(torch.ones(1, 65, dtype=torch.long))


def test_locked_towers_do_not_learn(model):
    model.lock_image_tower()
    model.lock_text_tower()

    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "logit_scale",
        "text.proj.weight",
    }


def test_vectors_are_spared_from_weight_decay(model):
    spared = model.no_weight_decay()

    assert {"logit_scale", "visual.norm.weight", "visual.readouts.prompt.queries"} <= spared
    assert "visual.blocks.0.attn.qkv.weight" not in spared


def test_checkpointing_reaches_both_towers_and_can_be_undone(model):
    model.set_grad_checkpointing()
    model(IMAGE, TEXT)["image_features"].sum().backward()

    assert model.text.transformer.is_gradient_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.text.transformer.is_gradient_checkpointing


def test_the_own_tower_compiles_without_a_graph_break():
    model = build_model(little(positions="rotary", slice_group=1, full_every=2, registers=1)).eval()

    compiled = torch.compile(model.encode_image, fullgraph=True, backend="eager")

    torch.testing.assert_close(compiled(IMAGE), model.encode_image(IMAGE))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants g++ on a CPU")
def test_training_reads_volumes_through_the_compiled_blocks(model):
    from torch._dynamo.utils import counters

    expected = model.encode_image_readouts(IMAGE)["prompt"]
    torch._dynamo.reset()
    counters.clear()
    model.visual.compile_blocks()

    torch.testing.assert_close(model.encode_image_readouts(IMAGE)["prompt"], expected)

    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_autocast_takes_volumes_of_any_short_float(model):
    with torch.autocast("cpu", torch.bfloat16):
        short, long = (
            model.eval().encode_image(IMAGE.to(t)) for t in (torch.bfloat16, IMAGE.dtype)
        )

    torch.testing.assert_close(short, long, rtol=0.1, atol=0.1)
