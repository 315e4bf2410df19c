import pytest
import timm
import torch
from safetensors.torch import save_file

from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.inflate import inflate, inflate_from
from ctclip.models.text import TextConfig
from ctclip.models.vit3d import VisionConfig, ViT3D


def flat(**settings):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return timm.models.VisionTransformer(**(shape | {"num_classes": 0} | settings)).eval()


def deep(**settings):
    shape = {"width": 48, "depth": 2, "heads": 2, "patch": (4, 8, 8), "stem": "linear"}
    learned = {"positions": "learned", "position_grid": (1, 4, 4), "pooling": "cls"}
    return ViT3D(**(shape | learned | settings)).eval()


def normalised(grey, mean, std):
    """What the 2D network is given for a grey image in [-1, 1]."""
    colour = (grey[:, None].expand(-1, 3, -1, -1) + 1) / 2
    shape = (1, 3, 1, 1)
    return (colour - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)


@pytest.mark.parametrize(
    "network",
    [
        {},
        {"init_values": 0.3},
        {"reg_tokens": 2, "no_embed_class": True},
    ],
    ids=["plain", "layer scale", "registers"],
)
def test_equal_slices_give_the_2d_networks_tokens(network):
    """Nothing is lost: one plane of patches, slices alike, ImageNet's own normalisation."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    vit, tower = flat(**network), deep(registers=network.get("reg_tokens", 0))
    grey = torch.rand(2, 32, 32) * 2 - 1

    inflate(tower, vit.state_dict(), mean=mean, std=std)

    volume = grey[:, None, None].expand(-1, 1, 4, -1, -1)
    tokens, _ = tower.tokens(volume)
    expected = vit.forward_features(normalised(grey, mean, std))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_without_cls_any_number_of_planes_keeps_the_tokens():
    vit = flat(class_token=False, global_pool="avg", fc_norm=False)
    tower = deep(pooling="attention", position_grid=(3, 4, 4), slice_group=2)
    grey = torch.rand(2, 32, 32) * 2 - 1

    inflate(tower, vit.state_dict())

    tokens, grid = tower.tokens(grey[:, None, None].expand(-1, 1, 12, -1, -1))
    expected = vit.forward_features(normalised(grey, [0.5] * 3, [0.5] * 3))
    assert grid == (3, 4, 4)
    torch.testing.assert_close(tokens, expected.repeat(1, 3, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embedded", [True, False], ids=["with positions", "without"])
def test_a_register_keeps_the_cls_token_where_nothing_reads_it(embedded, caplog):
    """On a grid of odd side: its table of positions is odd with and without a CLS token."""
    vit = flat(img_size=40, no_embed_class=not embedded, reg_tokens=1)
    shape = {"pooling": "mean", "position_grid": (1, 5, 5)}
    grey = torch.rand(1, 40, 40) * 2 - 1
    tower = deep(**shape, registers=2)

    inflate(tower, vit.state_dict())
    assert not caplog.messages
    inflate(deep(**shape, registers=1), vit.state_dict())

    tokens, _ = tower.tokens(grey[:, None, None].expand(-1, 1, 4, -1, -1))
    expected = vit.forward_features(normalised(grey, [0.5] * 3, [0.5] * 3))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    assert "vision.registers=2 keeps them" in caplog.messages[0]


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"qk_norm": True}, r"attn\.q_norm\.weight has no place"),
        ({"pre_norm": True}, r"norm_pre\.weight has no place"),
        ({"qkv_bias": False}, r"it lacks blocks\.0\.attn\.qkv\.bias"),
        ({"mlp_ratio": 2}, r"mlp\.fc1\.weight is \(96, 48\) instead of \(192, 48\)"),
        ({"global_pool": "avg"}, r"it lacks norm\.weight"),
    ],
)
def test_weights_that_would_be_lost_are_refused(network, words):
    with pytest.raises(ValueError, match=words):
        inflate(deep(), flat(**network).state_dict())


def test_several_windows_of_one_image_count_once():
    tower, vit = deep(channels=3), flat()
    one = deep()
    for each in (tower, one):
        inflate(each, vit.state_dict())
    volume = torch.rand(1, 1, 4, 32, 32)

    torch.testing.assert_close(
        tower.tokens(volume.expand(-1, 3, -1, -1, -1))[0],
        one.tokens(volume)[0],
        atol=1e-5,
        rtol=1e-4,
    )


def test_positions_stretch_to_another_grid_and_repeat_along_depth():
    tower = deep(position_grid=(3, 8, 8))

    inflate(tower, flat().state_dict())

    table = tower.positions.table
    assert torch.equal(table[0], table[2])


def test_a_local_file_will_do(tmp_path):
    vit, tower = flat(), deep()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")

    inflate_from(tower, str(tmp_path / "vit.safetensors"))

    assert torch.equal(tower.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)


def test_a_config_can_ask_for_it(tmp_path):
    vit = flat()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    vision = VisionConfig(
        size="tiny",
        width=48,
        depth=2,
        heads=2,
        patch=(4, 8, 8),
        inflate_from=str(tmp_path / "vit.safetensors"),
    )
    text = TextConfig(name_or_path=None, width=32, layers=1, heads=2)

    model = build_model(ModelConfig(embed_dim=12, vision=vision, text=text))

    assert torch.equal(model.visual.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="48 wide and 2 blocks deep, the tower is 48 wide and 3"):
        inflate(deep(depth=3), flat().state_dict())
    with pytest.raises(ValueError, match="no vision transformer"):
        inflate(deep(), {"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="timm has no model 'vit_enormous'"):
        inflate_from(deep(), "vit_enormous")
    with pytest.raises(FileNotFoundError, match="to inflate"):
        inflate_from(deep(), str(tmp_path / "nothing.safetensors"))
    (tmp_path / "hello.pt").write_text("hello")
    with pytest.raises(ValueError, match="damaged or cut short"):
        inflate_from(deep(), str(tmp_path / "hello.pt"))


def test_a_timm_name_brings_its_own_normalisation(monkeypatch):
    """Weights would come from a network; the name's architecture and input statistics are real."""
    create, made = timm.create_model, {}

    def offline(name, pretrained):
        assert pretrained
        torch.manual_seed(0)
        return made.setdefault(name, create(name, pretrained=False).eval())

    monkeypatch.setattr(timm, "create_model", offline)
    shape = {"width": 192, "depth": 12, "patch": (2, 16, 16), "position_grid": (1, 14, 14)}
    with pytest.raises(ValueError, match="has 3 heads, the tower 4; set vision"):
        inflate_from(deep(**shape, heads=4), "deit_tiny_patch16_224.fb_in1k")
    tower = deep(**shape, heads=3)

    inflate_from(tower, "deit_tiny_patch16_224.fb_in1k")

    vit = made["deit_tiny_patch16_224.fb_in1k"]
    grey = torch.rand(1, 224, 224) * 2 - 1
    known = vit.pretrained_cfg
    with torch.no_grad():
        tokens, _ = tower.tokens(grey[:, None, None].expand(-1, 1, 2, -1, -1))
        expected = vit.forward_features(normalised(grey, known["mean"], known["std"]))
    assert tuple(known["mean"]) != (0.5, 0.5, 0.5)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
