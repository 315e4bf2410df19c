from pathlib import Path

import pytest
import torch
import toy_cohort

from ctclip.data.augment import AugmentConfig
from ctclip.data.cache import PreparedCohort
from ctclip.data.dataset import Batch, CohortDataset, collate
from ctclip.training.feed import StepVolumes

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def dataset_and_pieces(folder: Path, pin: bool) -> tuple[CohortDataset, list[Batch]]:
    cohort = PreparedCohort.open(toy_cohort.build(folder, num_studies=8))
    augment = AugmentConfig(probability=1.0, noise_hu=0.0)
    dataset = CohortDataset(cohort, cohort.split("train"), augment, finish_later=True)
    pieces = [collate([dataset[2 * i], dataset[2 * i + 1]]) for i in range(3)]
    return dataset, [piece.pin_memory() for piece in pieces] if pin else pieces


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [[1, 2, 0, 1, 2], [0, 1, 2], [2, 2, 0, 1, 0]])
def test_each_micro_batch_is_given_as_often_and_in_whatever_order_it_is_asked_for(
    tmp_path, device, order
):
    dataset, pieces = dataset_and_pieces(tmp_path, pin=device == "cuda")
    volumes = StepVolumes(pieces, dataset.finished, torch.device(device))
    expected = [dataset.finished(piece).volume for piece in pieces]

    for index in order:
        given = volumes.take(index)
        assert given.device.type == device
        torch.testing.assert_close(given.cpu(), expected[index], rtol=0, atol=2e-3)
    assert all(piece.volume.dtype == torch.int16 for piece in pieces)  # as they were read
