import torch
from ranks import on_ranks

from ctclip import distributed


def gather_ranks():
    return distributed.gather_objects(distributed.rank())


def gather_and_differentiate():
    rank = distributed.rank()
    local = torch.full((2, 3), float(rank + 1), dtype=torch.float64, requires_grad=True)
    everything = distributed.gather_with_grad(local)
    # Rank r weighs row i with (r + 1) * i, so that each rank's loss asks something else.
    weight = (rank + 1) * torch.arange(len(everything), dtype=torch.float64)
    (everything * weight[:, None]).sum().backward()
    return everything.detach().tolist(), local.grad.tolist()


def test_gather_returns_every_ranks_rows_and_sums_their_gradients():
    results = on_ranks(2, gather_and_differentiate)

    for rank, (everything, gradient) in enumerate(results):
        assert everything == [[1.0] * 3] * 2 + [[2.0] * 3] * 2
        assert gradient == [[3.0 * (2 * rank + row)] * 3 for row in range(2)]


def test_gather_objects_keeps_rank_order():
    assert on_ranks(2, gather_ranks) == [[0, 1]] * 2


def test_one_process_needs_no_group():
    local = torch.ones(2, 3, requires_grad=True)

    assert distributed.world_size() == 1
    assert distributed.gather_with_grad(local) is local
    assert distributed.gather_objects("a") == ["a"]
