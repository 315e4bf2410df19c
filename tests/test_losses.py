import math

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor

from ctclip import distributed, losses


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


SCALE = torch.tensor([10.0])


def test_identical_embeddings_cost_log_batch():
    same = unit(1, 4).expand(8, 4)

    loss = losses.info_nce(same, same, SCALE, torch.arange(8))

    assert float(loss) == pytest.approx(math.log(8))


def test_info_nce_is_the_textbook_formula():
    image, text = unit(6, 5), unit(6, 5, seed=1)

    loss = losses.info_nce(image, text, SCALE, torch.arange(6))

    share = torch.exp(10.0 * image.double() @ text.double().T)
    expected = -(
        torch.log(share.diagonal() / share.sum(1)) + torch.log(share.diagonal() / share.sum(0))
    )
    assert float(loss) == pytest.approx(float(expected.mean() / 2), rel=1e-6)


def test_pairs_of_one_study_or_one_report_leave_each_other_alone():
    """Deleting the twin from the batch changes nothing in the other row's loss."""
    image, text = unit(4, 5), unit(4, 5, seed=1)
    study, report = torch.tensor([0, 0, 1, 2]), torch.tensor([7, 7, 8, 8])

    with_twins = losses.info_nce(image, text, SCALE, torch.stack([study, report], 1))

    def one(row: int, others: list[int]) -> Tensor:
        keep = torch.tensor([row, *others])
        logits = 10.0 * image[row] @ text[keep].T
        back = 10.0 * text[row] @ image[keep].T
        return -(logits.log_softmax(0)[0] + back.log_softmax(0)[0]) / 2

    expected = (one(0, [2, 3]) + one(1, [2, 3]) + one(2, [0, 1]) + one(3, [0, 1])) / 4
    assert float(with_twins) == pytest.approx(float(expected), rel=1e-6)


def test_negative_identities_agree_with_nothing():
    image, text = unit(4, 5), unit(4, 5, seed=1)
    unknown = torch.full((4, 1), -1)

    assert losses.info_nce(image, text, SCALE, unknown) == losses.info_nce(
        image, text, SCALE, torch.arange(4)
    )


def test_soft_targets_do_not_push_equal_reports_apart():
    """Two studies whose reports say the same: one-hot targets pull them apart, soft ones don't."""
    text = unit(3, 5)[[0, 0, 2]]

    def pull(soft_targets: float) -> float:
        image = text.clone().requires_grad_()
        losses.info_nce(image, text, SCALE, torch.arange(3), soft_targets=soft_targets).backward()
        return float(image.grad.norm())

    assert pull(1.0) < 1e-5
    assert pull(0.0) > 1e-2


def test_a_large_temperature_does_not_overflow():
    image = unit(4, 5)
    loss = losses.info_nce(image, -image, torch.tensor(100.0), torch.arange(4))

    assert torch.isfinite(loss)


def test_siglip_is_the_textbook_formula():
    image, text = unit(4, 5), unit(4, 5, seed=1)
    bias = torch.tensor([-3.0])

    loss = losses.siglip(image, text, SCALE, bias, torch.arange(4))

    logits = 10.0 * image @ text.T - 3.0
    sign = 2 * torch.eye(4) - 1
    expected = -torch.log(torch.sigmoid(sign * logits)).sum() / 4
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_opposite_sentence_counts_only_what_is_mentioned():
    image, present, absent = unit(2, 5), unit(3, 5, seed=1), unit(3, 5, seed=2)
    nan = float("nan")
    target = torch.tensor([[1.0, nan, nan], [nan, 0.0, nan]])

    loss = losses.opposite_sentence(image, present, absent, target, SCALE)

    logits = 10.0 * image @ (present - absent).T
    expected = -(F.logsigmoid(logits[0, 0]) + F.logsigmoid(-logits[1, 1])) / 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


def test_no_mention_at_all_costs_nothing_and_has_a_gradient():
    image = unit(2, 5).requires_grad_()
    target = torch.full((2, 3), float("nan"))

    loss = losses.opposite_sentence(image, unit(3, 5), unit(3, 5, seed=1), target, SCALE)
    loss.backward()

    assert loss.item() == 0.0
    assert torch.count_nonzero(image.grad) == 0


def test_directions_on_one_axis_overlap_fully_and_orthogonal_ones_not_at_all():
    one_axis = F.normalize(torch.tensor([[1.0, 0, 0], [0.5, 0, 0], [2.0, 0, 0]]), dim=1)
    apart = torch.eye(3)

    assert losses.direction_spread(one_axis, -one_axis) == pytest.approx(1.0)
    assert float(losses.direction_overlap(one_axis, -one_axis)) == pytest.approx(1.0)
    assert losses.direction_spread(apart, -apart) == pytest.approx(0.0)
    assert float(losses.direction_overlap(apart, -apart)) == pytest.approx(0.0)


def test_sentence_classes_is_small_only_when_meanings_are_apart():
    group = torch.tensor([0, 0, 1, 1])
    apart = torch.eye(2)[group]
    mixed = torch.eye(2)[1 - group // 2 ^ torch.tensor([0, 1, 0, 1])]

    assert float(losses.sentence_classes(apart, group, 20.0)) < 1e-3
    assert float(losses.sentence_classes(mixed, group, 20.0)) > 5.0


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (losses.info_nce, (unit(2, 3), unit(3, 3), SCALE, torch.arange(2))),
        (losses.info_nce, (unit(2, 3), unit(2, 3), SCALE, torch.arange(3))),
        (
            losses.opposite_sentence,
            (unit(2, 3), unit(4, 3), unit(4, 3), torch.zeros(2, 3), SCALE),
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(function, arguments):
    with pytest.raises(ValueError, match=r"\(b, |rows"):
        function(*arguments)


def all_losses_and_gradients(rows: slice):
    image, text = unit(8, 6).double(), unit(8, 6, seed=1).double()
    present, absent = unit(3, 6, seed=2).double(), unit(3, 6, seed=3).double()
    target = torch.tensor([[1.0, 0.0, float("nan")]] * 5 + [[float("nan")] * 2 + [1.0]] * 3)
    identity = torch.tensor([0, 0, 1, 2, 3, 1, 4, 5])
    results = []
    for loss in ("info_nce", "soft", "siglip", "opposite"):
        leaves = [image[rows].clone().requires_grad_(), text[rows].clone().requires_grad_()]
        scale = torch.tensor([10.0], dtype=torch.float64, requires_grad=True)
        if loss == "siglip":
            value = losses.siglip(*leaves, scale, torch.tensor(-2.0), identity[rows])
        elif loss == "opposite":
            value = (
                losses.opposite_sentence(leaves[0], present, absent, target[rows], scale)
                + 0.0 * leaves[1].sum()
            )
        else:
            soft = 0.3 if loss == "soft" else 0.0
            value = losses.info_nce(*leaves, scale, identity[rows], soft_targets=soft)
        value.backward()
        results.append([value.item(), scale.grad.item(), *(leaf.grad.tolist() for leaf in leaves)])
    return results


def one_rank_of_two():
    rank = distributed.rank()
    return all_losses_and_gradients(slice(4 * rank, 4 * rank + 4))


def test_two_ranks_give_the_loss_and_gradients_of_the_global_batch():
    whole = all_losses_and_gradients(slice(0, 8))
    parts = on_ranks(2, one_rank_of_two)

    for index, (value, scale_grad, *leaf_grads) in enumerate(whole):
        shares = [part[index] for part in parts]
        assert sum(share[0] for share in shares) / 2 == pytest.approx(value, rel=1e-6)
        assert sum(share[1] for share in shares) / 2 == pytest.approx(scale_grad, rel=1e-5)
        for leaf in (0, 1):
            joined = torch.tensor(shares[0][2 + leaf] + shares[1][2 + leaf]) / 2
            torch.testing.assert_close(joined, torch.tensor(leaf_grads[leaf]), rtol=1e-5, atol=1e-8)
