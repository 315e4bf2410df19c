import pytest
import torch

from ctclip.models.ctvit import Codebook, CTViT, OffsetBias
from ctclip.models.text import freeze

LITTLE = {
    "embed_dim": 12,
    "image_size": (12, 8),
    "patch": (2, 4, 2),
    "width": 24,
    "spatial_depth": 2,
    "temporal_depth": 1,
    "heads": 2,
    "head_dim": 4,
    "codes": 32,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CTViT(**LITTLE)


IMAGE = torch.rand(2, 1, 6, 12, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_bias_from_distinct_offsets_equals_bias_of_every_pair():
    torch.manual_seed(0)
    bias, (h, w) = OffsetBias(16, 3), (4, 3)
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
    places = places.reshape(-1, 2).float()
    offsets = places[:, None] - places[None]

    pairs = bias.net(offsets.sign() * torch.log(1 + offsets.abs())).permute(2, 0, 1)

    torch.testing.assert_close(bias(h, w), pairs, rtol=0, atol=1e-6)


def test_patch_embeddings_average_to_the_embedding(model):
    model.eval()

    patches = model.patches(IMAGE)

    assert patches.shape == (2, 3, 3, 4, 12)
    torch.testing.assert_close(patches.mean(dim=(1, 2, 3)), model(IMAGE), rtol=1e-4, atol=1e-6)


def test_a_token_becomes_the_stored_code_of_nearest_direction():
    torch.manual_seed(0)
    codebook = Codebook(8, 4).eval()
    codebook.embed *= 0.5

    assert torch.equal(codebook(3.0 * codebook.embed + 1e-4), codebook.embed)


def test_searching_in_slices_finds_the_same_codes(monkeypatch):
    codebook, tokens = Codebook(64, 8), torch.randn(5, 7, 8)
    whole = codebook.nearest(tokens)
    monkeypatch.setattr("ctclip.models.ctvit.TOKENS_AT_ONCE", {"cpu": 3})

    assert torch.equal(codebook.nearest(tokens), whole)


def test_codes_and_offsets_are_those_of_float32_under_autocast_too():
    torch.manual_seed(0)
    codebook, tokens, bias = Codebook(512, 64), torch.randn(512, 64), OffsetBias(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        codes, offsets = codebook.nearest(tokens), bias(3, 5)

    assert torch.equal(codes, codebook.nearest(tokens))
    assert torch.equal(offsets, bias(3, 5))


def test_inference_in_slices_gives_the_same_numbers(model, monkeypatch):
    model.eval()
    whole = model(IMAGE)
    monkeypatch.setattr("ctclip.models.ctvit.TOKENS_AT_ONCE", {"cpu": 5})

    with torch.no_grad():
        torch.testing.assert_close(model(IMAGE), whole)


def test_gradients_pass_the_codebook_unchanged():
    tokens = torch.randn(3, 8, requires_grad=True)

    (Codebook(16, 8).train()(tokens) * 2).sum().backward()

    assert torch.equal(tokens.grad, torch.full_like(tokens, 2.0))


def test_codes_follow_their_tokens_in_training_only():
    torch.manual_seed(0)
    codebook, tokens = Codebook(4, 8), torch.randn(50, 8)
    before, distance = codebook.embed.clone(), []

    codebook.eval()(tokens)
    assert torch.equal(codebook.embed, before)

    for _ in range(20):
        ids = codebook.nearest(tokens)
        distance.append(torch.nn.functional.cosine_similarity(tokens, before[ids]).mean())
        codebook.train()(tokens)
        before = codebook.embed.clone()
    assert distance[-1] > distance[0]


def test_a_frozen_codebook_stays_even_in_training_mode(model):
    freeze(model)
    before = model.codebook.embed.clone()

    model.train()(IMAGE)

    assert torch.equal(model.codebook.embed, before)


def test_checkpointing_changes_no_gradient_and_moves_codes_once(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for enable in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model.train()(IMAGE).square().sum().backward()
        results.append(
            [p.grad.clone() for p in model.parameters()] + [model.codebook.embed.clone()]
        )

    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_every_parameter_learns(model):
    model(IMAGE).square().sum().backward()

    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_depth_is_free_and_height_and_width_are_not(model):
    assert model.eval()(IMAGE[:, :, :4]).shape == (2, 12)
    for wrong in (IMAGE[..., :4], IMAGE[:, :, :5]):
        with pytest.raises(ValueError, match="CT-ViT takes volumes of 12 x 8 voxels"):
            model(wrong)


def test_compiles_without_a_graph_break():
    model = CTViT(**(LITTLE | {"spatial_depth": 1})).eval()

    compiled = torch.compile(model, fullgraph=True, backend="eager")

    torch.testing.assert_close(compiled(IMAGE), model(IMAGE))
