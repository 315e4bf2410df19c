import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ctclip.training.dropout import SampleDropout, make_reproducible


def network(p: float = 0.25) -> tuple[nn.Module, object]:
    model = nn.Sequential(nn.Dropout(p), nn.Identity(), nn.Dropout(p))
    return model, make_reproducible(model)


def test_a_row_gets_its_own_mask_wherever_it_stands_in_the_batch():
    model, state = network()
    x = torch.ones(4, 7, 16)

    state.keys = torch.tensor([11, 12, 13, 14])
    together = model(x)
    state.keys = torch.tensor([13])
    alone = model(x[:1])

    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[1], together[2])


def test_padding_a_text_further_does_not_change_its_mask():
    model, state = network()
    state.keys = torch.tensor([5])

    assert torch.equal(model(torch.ones(1, 9, 16))[:, :6], model(torch.ones(1, 6, 16)))


def test_the_share_of_zeros_and_the_mean_are_those_of_dropout():
    model = SampleDropout(0.25, 3, network()[1])
    model.sample_keys.keys = torch.arange(64)

    out = model(torch.ones(64, 4096))

    assert abs((out == 0).float().mean().item() - 0.25) < 0.005
    assert abs(out.mean().item() - 1.0) < 0.01
    per_column = (out == 0).float().mean(dim=0)
    assert per_column.max() < 0.6


def test_layers_draw_different_masks_and_eval_draws_none():
    model, state = network()
    state.keys = torch.tensor([5])
    x = torch.ones(1, 256)

    assert not torch.equal(model[0](x), model[2](x))
    assert torch.equal(model.eval()(x), x)


def test_without_keys_it_is_torchs_dropout():
    model, _ = network()
    torch.manual_seed(0)
    out = model[0](torch.ones(1000))

    assert 0.15 < (out == 0).float().mean() < 0.35


def test_activation_checkpointing_repeats_the_masks_of_the_forward():
    """The keys have moved on to the next text by the time that backward recomputes."""
    layers, state = network(p=0.5)
    x = torch.ones(2, 64, requires_grad=True)
    state.keys = torch.tensor([5, 6])
    out = checkpoint(layers, x, use_reentrant=False, context_fn=state.kept_for_backward)
    state.keys = torch.tensor([7, 8])

    out.sum().backward()

    assert torch.equal(x.grad, out.detach())
    assert torch.equal(state.keys, torch.tensor([7, 8]))
