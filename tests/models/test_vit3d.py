import itertools

import pytest
import torch

from ctclip.models.positions import RotaryPositions, SinCosPositions, centred
from ctclip.models.stem import strides
from ctclip.models.vit3d import Attention, Block, VisionConfig, ViT3D

SMALL = {"width": 48, "depth": 3, "heads": 2, "embed_dim": 24, "patch": (2, 4, 4)}


def tower(**settings):
    torch.manual_seed(0)
    return ViT3D(**(SMALL | settings)).eval()


def scan(*size, batch=2, channels=1, seed=1):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("positions", ["sincos", "rotary", "learned"])
@pytest.mark.parametrize("pooling", ["attention", "mean", "cls"])
@pytest.mark.parametrize("slice_group", [0, 2])
def test_every_combination_embeds_and_learns(stem, positions, pooling, slice_group):
    model = tower(
        stem=stem,
        positions=positions,
        pooling=pooling,
        slice_group=slice_group,
        registers=2,
        readouts=2,
        channels=2,
        patch_dropout=0.25,
    ).train()

    readouts = model.forward_readouts(scan(10, 8, 12, channels=2))
    sum(value.square().sum() for value in readouts.values()).backward()

    assert {name: tuple(v.shape) for name, v in readouts.items()} == {
        "prompt": (2, 24),
        "report": (2, 24),
    }
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_patch_embeddings_average_to_the_embedding(pooling):
    model, image = tower(pooling=pooling), scan(8, 8, 12)

    patches = model.patches(image)

    assert patches.shape == (2, 4, 2, 3, 24)
    torch.testing.assert_close(patches.mean(dim=(1, 2, 3)), model(image), rtol=1e-4, atol=1e-5)


def test_a_group_as_deep_as_the_scan_is_full_attention():
    full, grouped = tower(registers=1), tower(registers=1, slice_group=99)

    assert torch.equal(full(scan(8, 8, 8)), grouped(scan(8, 8, 8)))


@pytest.mark.parametrize("rotary", [False, True])
def test_a_local_block_sees_its_own_slices_only(rotary):
    """Attention in groups equals attention over everything with other groups masked out."""
    planes, per_plane, group = 5, 3, 2
    torch.manual_seed(0)
    block = Block(12, 2, slice_group=group)
    x = torch.randn(1, planes * per_plane, 12, requires_grad=True)
    turn = None
    if rotary:
        where = (centred(planes), centred(per_plane), centred(1))
        turn = RotaryPositions(6)(*where)

    for plane in range(planes):
        rows = slice(plane * per_plane, (plane + 1) * per_plane)
        (grad,) = torch.autograd.grad(block(x, planes, 0, turn)[:, rows].sum(), x)
        seen = grad.abs().sum(dim=-1).reshape(planes, per_plane).sum(dim=1) > 0
        assert seen.tolist() == [other // group == plane // group for other in range(planes)]


def test_grouped_prefix_is_the_average_over_groups():
    torch.manual_seed(0)
    block = Block(12, 2, slice_group=1)
    head, patches = torch.randn(1, 2, 12), torch.randn(1, 3, 12)

    grouped = block._attend_in_groups(torch.cat([head, patches], 1), 3, 2, None)

    alone = [block.attn(torch.cat([head, patches[:, i : i + 1]], 1))[:, :2] for i in range(3)]
    torch.testing.assert_close(grouped[:, :2], torch.stack(alone).mean(0))


@pytest.mark.parametrize("size", list(itertools.product([6, 8, 9], [8, 10], [8])))
def test_any_input_size_is_taken_and_counted(size):
    config = VisionConfig(size="tiny", width=48, heads=2, patch=(2, 4, 4))
    model = ViT3D.from_config(config, embed_dim=24).eval()

    _, grid = model.tokens(scan(*size))

    assert (
        grid == config.grid(size) == tuple(-(-n // p) for n, p in zip(size, (2, 4, 4), strict=True))
    )


def test_padding_a_scan_with_air_is_what_the_tower_does_itself():
    model, image = tower(), scan(7, 8, 8)

    padded = torch.nn.functional.pad(image, (0, 0, 0, 0, 0, 1), value=-1.0)

    assert torch.equal(model(image), model(padded))


def test_a_wider_field_of_view_keeps_positions():
    """Cropping about the centre leaves each remaining patch where it was."""
    wide, narrow = (SinCosPositions(48)(*(centred(n) for n in g)) for g in [(6, 4, 8), (2, 4, 4)])

    torch.testing.assert_close(wide[2:4, :, 2:6], narrow)


def test_finer_voxels_keep_positions_with_a_smaller_step():
    coarse = SinCosPositions(48)(centred(2), centred(2), centred(2))
    fine = SinCosPositions(48)(*(centred(4, step=0.5) for _ in range(3)))

    pairs = fine.reshape(2, 2, 2, 2, 2, 2, 48)[:, 0, :, 0, :, 0]
    assert torch.equal(centred(4, 0.5).reshape(2, 2).mean(1), centred(2))
    assert pairs.shape == coarse.shape


def test_rotary_attention_depends_on_relative_position_only():
    torch.manual_seed(0)
    attention, x = Attention(24, 2), torch.randn(1, 8, 24)
    rotary = RotaryPositions(12)
    here = [centred(2) for _ in range(3)]

    moved = attention(x, rotary(*(axis + 5.0 for axis in here)))

    torch.testing.assert_close(attention(x, rotary(*here)), moved, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(attention(x), moved, atol=1e-3)


def test_checkpointing_changes_no_gradient():
    grads = []
    for enable in (False, True):
        model = tower(registers=1, slice_group=2).train()
        model.set_grad_checkpointing(enable)
        model(scan(8, 8, 8)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])

    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_patch_dropout_keeps_the_same_number_in_every_plane():
    model = tower(patch_dropout=0.5).train()

    x, grid = model.tokens(scan(8, 16, 16))

    assert grid == (4, 4, 4)
    assert x.shape[1] == 4 * 8


def test_patch_dropout_is_off_in_eval_mode():
    assert torch.equal(tower(patch_dropout=0.5)(scan(8, 8, 8)), tower()(scan(8, 8, 8)))


@pytest.mark.parametrize(
    ("patch", "first", "later"),
    [
        ((10, 20, 20), (5, 5, 5), [(2, 2, 2), (1, 2, 2)]),
        ((8, 24, 24), (4, 3, 3), [(2, 2, 2), (1, 2, 2), (1, 2, 2)]),
        ((4, 4, 4), (4, 4, 4), []),
    ],
)
def test_conv_stem_splits_the_patch(patch, first, later):
    assert strides(patch, 4) == (first, later)


def test_conv_stem_looks_beyond_the_patch():
    """A voxel next to a patch's border changes the patch on the other side of it too."""
    model = tower(patch=(8, 8, 8), width=32).stem
    image = torch.zeros(1, 1, 16, 8, 8, requires_grad=True)

    model(image)[0, 1].square().sum().backward()

    assert image.grad[0, 0, 4:8].abs().sum() > 0


def test_runs_in_bfloat16():
    model, image = tower(positions="rotary", registers=1), scan(4, 8, 8)
    full = model(image)

    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(image)
    half = model.bfloat16()(image.bfloat16())

    assert half.dtype == torch.bfloat16
    for low in (mixed, half):
        assert torch.cosine_similarity(low.float(), full).min() > 0.99


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (8, 8, 8)])
def test_a_batch_without_its_axes_is_refused(shape):
    with pytest.raises(ValueError, match=r"batch of volumes \(B, C, D, H, W\), got shape"):
        tower()(torch.zeros(shape))


def test_the_wrong_number_of_windows_is_refused():
    with pytest.raises(ValueError, match=r"expected 1 channel.*got 3"):
        tower()(torch.zeros(1, 3, 8, 8, 8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patch": (0, 8, 8)}, "vision.patch must be at least 1"),
        ({"patch_dropout": 1.0}, r"vision.patch_dropout must be in \[0, 1\)"),
        ({"width": 50, "heads": 4}, "multiple of twice vision.heads"),
        ({"slice_group": -1}, "vision.slice_group"),
    ],
)
def test_impossible_configs_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        VisionConfig(**settings)
