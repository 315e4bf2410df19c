import collections
import json

import numpy as np
import pytest
import toy_cohort

from ctclip.data.cohort import PreparedCohort
from ctclip.data.dataset import CohortDataset
from ctclip.data.manifest import VolumeRecord
from ctclip.training.stream import StreamDataset, StudyStream, stream_loader


def records(num_studies: int, volumes: int = 1) -> list[VolumeRecord]:
    return [
        VolumeRecord(
            volume_id=f"{study}_{volume}",
            study_id=f"{study}",
            patient_id=f"{study}",
            split="train",
            path=None,
        )
        for study in range(num_studies)
        for volume in range(volumes)
    ]


def whole(world_size: int = 1, start: int = 0, **changes) -> list[list[tuple[int, int]]]:
    """Global batches, put together from all ranks."""
    settings = {"batch_size": 4, "seed": 3, "start": start, "stop": 10} | changes
    studies = settings.pop("records", records(11))
    ranks = [
        list(StudyStream(studies, **settings, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    return [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)]


def test_every_study_comes_once_per_epoch():
    seen = [key for batch in whole(stop=11) for key in batch]  # 44 samples: exactly 4 epochs

    by_epoch = collections.defaultdict(list)
    for epoch, index in seen:
        by_epoch[epoch].append(index)
    assert {epoch: sorted(found) for epoch, found in by_epoch.items()} == {
        epoch: list(range(11)) for epoch in range(4)
    }
    assert by_epoch[0] != by_epoch[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes(world_size):
    assert whole(world_size) == whole(1)


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 4), (3, [3, 1]), (4, [4]), (9, [4])])
def test_micro_batches_put_together_are_the_process_share_of_each_step(size, sizes):
    settings = {"batch_size": 8, "seed": 3, "start": 2, "stop": 5, "rank": 1, "world_size": 2}
    shares = list(StudyStream(records(11), **settings))
    cut = StudyStream(records(11), micro_batch_size=size, **settings)

    assert [len(keys) for keys in cut] == sizes * 3
    assert [key for keys in cut for key in keys] == [key for share in shares for key in share]
    assert len(cut) == 3 * cut.pieces == len(list(cut))


def test_starting_later_gives_the_rest_of_the_same_stream():
    assert whole(start=6) == whole()[6:]


def test_one_reconstruction_of_a_study_per_epoch_and_all_of_them_in_the_end():
    studies = records(5, volumes=3)
    seen = [key for batch in whole(records=studies, batch_size=5, stop=40) for key in batch]

    by_epoch = collections.defaultdict(list)
    for epoch, index in seen:
        by_epoch[epoch].append(studies[index].study_id)
    assert all(
        sorted(found) == sorted({r.study_id for r in studies}) for found in by_epoch.values()
    )
    assert {index for _, index in seen} == set(range(15))


def test_workers_do_not_change_what_is_read(tmp_path):
    cohort = PreparedCohort.open(toy_cohort.build(tmp_path, num_studies=8))
    studies = cohort.split("train")

    def read(workers: int) -> list[np.ndarray]:
        dataset = StreamDataset(CohortDataset(cohort, studies), tmp_path)
        stream = StudyStream(studies, batch_size=3, seed=0, start=0, stop=4)
        return [
            batch.volume.numpy()
            for batch, _ in stream_loader(dataset, stream, workers=workers, pin_memory=False)
        ]

    for alone, helped in zip(read(0), read(2), strict=True):
        assert np.array_equal(alone, helped)


def test_a_volume_that_became_unreadable_is_noted_and_replaced_the_same_way_everywhere(tmp_path):
    cohort = PreparedCohort.open(toy_cohort.build(tmp_path / "cohort", num_studies=8))
    studies = cohort.split("train")
    broken, missing = (cohort.path / "volumes" / f"{studies[i].volume_id}.b2nd" for i in (1, 2))
    broken.write_bytes(b"0" * 100)
    missing.unlink()
    dataset = StreamDataset(CohortDataset(cohort, studies), tmp_path)

    assert dataset[0, 1].record.volume_id == studies[3].volume_id
    assert dataset[7, 1].record.volume_id == studies[3].volume_id
    noted = [json.loads(line) for line in (tmp_path / "unreadable_volumes.jsonl").open()]
    assert {(row["volume_id"], row["status"], row["code"]) for row in noted} == {
        (studies[1].volume_id, "refused", "damaged-cache"),
        (studies[2].volume_id, "refused", "missing-cache"),
    }
    assert len(noted) == 2
