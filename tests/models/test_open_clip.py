import json

import open_clip
import pytest
import torch

from ctclip.models import open_clip as adapter
from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.ctvit import CTViTConfig
from ctclip.models.text import TextConfig, Tokenizer
from ctclip.models.vit3d import VisionConfig

TEXT = TextConfig(name_or_path=None, width=32, layers=1, heads=2, context_length=64)
CONFIG = {
    "embed_dim": 24,
    "vision": {"size": "tiny", "width": 48, "heads": 2, "patch": [4, 8, 8], "pooling": "mean"},
    "text": {"name_or_path": None, "width": 32, "layers": 1, "heads": 2, "context_length": 64},
}


def test_open_clip_builds_a_model_from_a_json_file(tmp_path):
    (tmp_path / "my-model.json").write_text(json.dumps(CONFIG))

    model = open_clip.create_model(adapter.register_file(tmp_path / "my-model.json"))

    assert model.encode_image(torch.zeros(1, 1, 8, 16, 16)).shape == (1, 24)


def test_our_weights_give_our_numbers_in_open_clip():
    config = ModelConfig(
        embed_dim=24,
        vision=VisionConfig(size="tiny", width=48, heads=2, patch=(4, 8, 8), registers=1),
        text=TextConfig(name_or_path=None, width=32, layers=1, heads=2, context_length=64),
    )
    adapter.register("twin", config)
    ours = build_model(config).eval()
    theirs = open_clip.create_model("twin", output_dict=True).eval()
    theirs.load_state_dict(adapter.from_ctclip(ours.state_dict()))
    image, text = torch.rand(2, 1, 8, 16, 16), Tokenizer.builtin(64)(["nodule", "no nodule"])

    expected = ours(image, text)

    for name, value in theirs(image, text).items():
        assert torch.equal(value, expected[name]), name


def test_open_clips_zero_shot_classifier_runs_on_our_model():
    model = open_clip.create_model("ctclip-tiny").eval()
    ours = build_model(ModelConfig(embed_dim=256, text=TextConfig(name_or_path=None))).eval()

    for each in (model, ours):
        weights = open_clip.build_zero_shot_classifier(
            each, Tokenizer.builtin(256), ["nodule", "emphysema"], ["{} is present."]
        )
        assert weights.shape == (256, 2)


def test_every_packaged_config_describes_a_model():
    names = {path.stem for path in adapter.CONFIGS.glob("*.json")}

    assert {"ctclip-tiny", "ctclip-small", "ctclip-base", "ctclip-large", "ct-clip"} <= names
    assert names <= set(open_clip.list_models())


def test_open_clip_builds_ct_clips_tower_too():
    ctvit = CTViTConfig(image_size=(8, 8), patch=(2, 4, 4), width=24, heads=2, codes=16)
    text = TextConfig(name_or_path=None, width=32, layers=1, heads=2, context_length=64)
    config = ModelConfig(embed_dim=12, ctvit=ctvit, text=text)
    adapter.register("little-ct-clip", config)
    ours, theirs = build_model(config).eval(), open_clip.create_model("little-ct-clip").eval()

    theirs.load_state_dict(adapter.from_ctclip(ours.state_dict()))

    image = torch.rand(1, 1, 4, 8, 8)
    assert torch.equal(theirs.encode_image(image), ours.encode_image(image))


def test_a_misspelt_setting_in_a_name_is_refused():
    with pytest.raises(ValueError, match="did you mean pooling"):
        adapter.ctclip_vit3d(pretrained_cfg="size=tiny;poling=mean")


def test_open_clips_patch_dropout_switch_reaches_the_tower():
    model = open_clip.create_model("ctclip-tiny", force_patch_dropout=0.5)

    assert model.visual.trunk.patch_dropout == 0.5


def test_of_two_read_outs_open_clip_gives_what_prompts_are_compared_with():
    vision = VisionConfig(size="tiny", width=48, depth=1, heads=2, patch=(4, 8, 8), readouts=2)
    config = ModelConfig(embed_dim=12, vision=vision, text=TEXT)
    adapter.register("two", config)
    ours, theirs = build_model(config).eval(), open_clip.create_model("two").eval()

    theirs.load_state_dict(adapter.from_ctclip(ours.state_dict()))

    image = torch.rand(1, 1, 8, 16, 16)
    readouts = ours.encode_image_readouts(image)
    assert torch.equal(theirs.encode_image(image), readouts["prompt"])
    assert not torch.equal(readouts["prompt"], readouts["report"])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.rand(1, 1, 16, 32, 32) * 1000, "look like HU"),
        (torch.full((1, 1, 16, 32, 32), torch.nan), "NaN or infinite"),
        (torch.zeros(1, 1, 0, 32, 32), "no voxels"),
        (torch.zeros(1, 1, 16, 32, 32, dtype=torch.float64), "the model computes in torch.float32"),
        (torch.zeros(1, 1, 16, 32, 32, dtype=torch.int16), r"image\.to\(torch\.float32\)"),
    ],
    ids=["HU", "NaN", "no depth", "float64", "int16"],
)
def test_what_our_model_refuses_open_clips_refuses_too(image, words):
    model = open_clip.create_model("ctclip-tiny").eval()
    ours = build_model(ModelConfig(vision=VisionConfig(size="tiny"), text=TEXT)).eval()

    for each in (model, ours):
        with pytest.raises(ValueError, match=words):
            each.encode_image(image)
    with pytest.raises(TypeError, match="got ndarray"):
        ours.encode_image(image.numpy())
