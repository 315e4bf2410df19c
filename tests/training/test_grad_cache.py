import pytest
import torch
from torch import Tensor, nn

from ctclip import losses
from ctclip.training.dropout import make_reproducible
from ctclip.training.grad_cache import accumulate


class PlainEngine:
    """What GradCache asks of DeepSpeed, without DeepSpeed."""

    def __init__(self) -> None:
        self.boundaries: list[bool] = []

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class TwoSmallTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 4))
        self.text = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 4))
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.keys = make_reproducible(self)
        self.forwards = 0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.forwards += 1
        self.keys.keys = batch["key"]
        features = {"image": self.image(batch["image"]), "text": self.text(batch["text"])}
        if "last" in batch:
            features["scale"] = self.scale.exp()
        return features


def batch_of(rows: slice) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    text = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return {"image": image[rows], "text": text[rows], "key": torch.arange(8)[rows]}


def objective(features: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    image, text = (nn.functional.normalize(features[n], dim=1) for n in ("image", "text"))
    loss = losses.info_nce(image, text, features["scale"], torch.arange(len(image)))
    return loss, {"loss": loss.item()}


def gradients(size: int) -> tuple[float, dict[str, Tensor], PlainEngine]:
    towers, engine = TwoSmallTowers().double(), PlainEngine()
    micro_batches = [batch_of(slice(start, start + size)) for start in range(0, 8, size)]
    micro_batches[-1]["last"] = torch.ones(())
    done = accumulate(engine, micro_batches, towers, objective, lambda loss, leaves: True)
    assert done.usable
    assert towers.forwards == 2 * len(micro_batches) - 1
    return (
        done.loss.item(),
        {name: parameter.grad for name, parameter in towers.named_parameters()},
        engine,
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_give_the_gradients_of_the_whole_batch_with_dropout_on(size):
    loss, whole, _ = gradients(8)
    split_loss, split, engine = gradients(size)

    assert split_loss == pytest.approx(loss, rel=1e-6)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-5, atol=1e-7)
    assert engine.boundaries == [False] * (8 // size - 1) + [True]


def test_dropout_is_on_in_that_test():
    towers = TwoSmallTowers().double()
    batch = batch_of(slice(0, 8)) | {"last": torch.ones(())}
    with_dropout = towers(batch)["image"]

    assert not torch.allclose(with_dropout, towers.eval()(batch)["image"])


def test_an_unusable_loss_leaves_no_gradient():
    towers = TwoSmallTowers().double()
    batch = batch_of(slice(0, 8)) | {"last": torch.ones(())}

    done = accumulate(PlainEngine(), [batch], towers, objective, lambda loss, leaves: False)

    assert not done.usable
    assert all(parameter.grad is None for parameter in towers.parameters())
