import pytest

from ctclip.data.sampler import EpochSampler


def test_ranks_share_a_global_batch_that_does_not_depend_on_their_number():
    alone = list(EpochSampler(50, seed=1, batch_size=8))
    ranks = [
        list(EpochSampler(50, seed=1, rank=rank, world_size=4, batch_size=2)) for rank in range(4)
    ]
    together = [[index for part in parts for index in part] for parts in zip(*ranks, strict=True)]
    assert together == alone


def test_every_rank_gets_the_same_number_of_batches_and_nobody_a_sample_twice():
    ranks = [
        list(EpochSampler(51, seed=1, rank=rank, world_size=3, batch_size=4)) for rank in range(3)
    ]
    assert [len(batches) for batches in ranks] == [4, 4, 4]
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) == 48


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        return list(EpochSampler(20, seed=seed, epoch=epoch, batch_size=5))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0)


def test_starting_late_skips_exactly_the_done_batches():
    whole = EpochSampler(20, seed=0, batch_size=2)
    late = EpochSampler(20, seed=0, batch_size=2, start=7)
    assert list(late) == list(whole)[7:]
    assert len(late) == 3
    assert late.num_batches == whole.num_batches == 10


def test_too_few_volumes_and_an_impossible_rank_are_errors():
    with pytest.raises(ValueError, match="lower the batch size"):
        EpochSampler(7, seed=0, batch_size=4, world_size=2)
    with pytest.raises(ValueError, match="rank"):
        EpochSampler(7, seed=0, rank=2, world_size=2)
