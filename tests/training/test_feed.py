import weakref
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
@pytest.mark.parametrize("order", [[1, 2, 0, 1, 2], [0, 1, 2], [2, 1, 2, 0, 1]])
def test_each_micro_batch_is_given_as_often_as_needed_in_whatever_order(tmp_path, device, order):
    dataset, pieces = dataset_and_pieces(tmp_path, pin=device == "cuda")
    stream = torch.cuda.Stream() if device == "cuda" else None
    volumes = StepVolumes(pieces, dataset.finished, torch.device(device), stream)
    expected = [dataset.finished(piece).volume for piece in pieces]

    for index in order:
        given = volumes.take(index)
        assert given.device.type == device
        torch.testing.assert_close(given.cpu(), expected[index], rtol=0, atol=2e-3)
    assert all(piece.volume.dtype == torch.int16 for piece in pieces)  # as they were read


def test_volumes_are_let_go_of_after_their_last_use(tmp_path):
    dataset, pieces = dataset_and_pieces(tmp_path, pin=False)
    held = [weakref.ref(piece.volume) for piece in pieces]
    volumes = StepVolumes(pieces, dataset.finished, torch.device("cpu"))
    del pieces

    left = []
    for index in [1, 2, 0, 1, 2]:
        volumes.take(index)
        left.append([ref() is not None for ref in held])
    assert left == [[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]
    with pytest.raises(KeyError):
        volumes.take(1)
