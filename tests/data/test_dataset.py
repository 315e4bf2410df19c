import math
from dataclasses import replace

import pytest
import torch
from scans import cohort

from ctclip.data.augment import AugmentConfig
from ctclip.data.cache import prepare
from ctclip.data.cohort import CorruptVolumeError
from ctclip.data.dataset import CohortDataset, EpochSampler, collate, loader
from ctclip.data.manifest import read_manifest
from ctclip.data.volume import VolumeConfig

SMALL = VolumeConfig(spacing_mm=(12.0, 10.0, 10.0), size=(24, 24, 32))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    records, problems = read_manifest(cohort(folder, num=10))
    return prepare(records, folder / "out", SMALL, problems=problems)


def batches(prepared, workers=0, start=0, **kwargs):
    dataset = CohortDataset(prepared, prepared.records, **kwargs)
    sampler = EpochSampler(len(dataset), seed=3, batch_size=2, start=start)
    return list(loader(dataset, sampler, workers=workers))


def test_a_batch_has_volumes_records_studies_and_labels(prepared):
    batch = batches(prepared, windows_hu=((-1000.0, 1000.0), (-160.0, 240.0)))[0]
    assert batch.volume.shape == (2, 2, 24, 24, 32)
    assert batch.volume.dtype == torch.float32
    assert batch.volume.min() >= -1
    assert batch.volume.max() <= 1
    assert batch.labels.shape == (2, 18)
    number = int(batch.records[0].volume_id[1:])
    assert batch.labels[0].tolist() == [(number >> bit) & 1 for bit in range(18)]
    assert batch.study.tolist() == [prepared.study_index[r.study_id] for r in batch.records]


def test_unknown_labels_are_nan(prepared):
    record = prepared.records[0]
    unknown = replace(record, labels={**record.labels, "Emphysema": math.nan})
    batch = collate([CohortDataset(prepared, [unknown])[0]])
    assert torch.isnan(batch.labels[0]).nonzero().flatten().tolist() == [7]


def test_workers_change_nothing(prepared):
    alone = batches(prepared, augment=AugmentConfig())
    helped = batches(prepared, augment=AugmentConfig(), workers=2)
    assert len(alone) == 5
    for first, second in zip(alone, helped, strict=True):
        assert torch.equal(first.volume, second.volume)
        assert [r.volume_id for r in first.records] == [r.volume_id for r in second.records]


def test_resuming_goes_on_with_the_very_next_batch(prepared):
    whole, rest = batches(prepared), batches(prepared, start=2)
    assert len(rest) == 3
    for first, second in zip(whole[2:], rest, strict=True):
        assert torch.equal(first.volume, second.volume)


def test_augmentation_differs_between_epochs_and_repeats_within_one(prepared):
    config = AugmentConfig(probability=1.0)
    first = CohortDataset(prepared, prepared.records, config, epoch=0)
    second = CohortDataset(prepared, prepared.records, config, epoch=1)
    assert torch.equal(first[0].volume, first[0].volume)
    assert not torch.equal(first[0].volume, second[0].volume)


def test_a_volume_that_was_damaged_later_is_never_data(tmp_path):
    records, _ = read_manifest(cohort(tmp_path, num=2))
    fresh = prepare(records, tmp_path / "out", SMALL)
    (fresh.path / "volumes/v1.b2nd").write_bytes(b"garbage")
    dataset = CohortDataset(fresh, fresh.records)

    assert dataset[0].record.volume_id == "v0"
    with pytest.raises(CorruptVolumeError, match=r"v1\.b2nd.*damaged-cache"):
        dataset[1]


def test_a_random_crop_is_a_box_of_the_volume_and_reaches_every_border(prepared):
    still = AugmentConfig(probability=0.0, crop_voxels=(20, 24, 24))
    whole = CohortDataset(prepared, prepared.records)[0].volume
    starts = set()
    for epoch in range(60):
        dataset = CohortDataset(prepared, prepared.records, still, epoch=epoch)
        box = dataset[0].volume
        assert torch.equal(box, dataset[0].volume)
        assert box.shape == (1, 20, 24, 24)
        (start,) = [
            (d, w)
            for d in range(5)
            for w in range(9)
            if torch.equal(box, whole[:, d : d + 20, :, w : w + 24])
        ]
        starts.add(start)
    assert {d for d, _ in starts} == set(range(5))
    assert {w for _, w in starts} >= {0, 8}
    with pytest.raises(ValueError, match="does not fit"):
        CohortDataset(prepared, prepared.records, AugmentConfig(crop_voxels=(25, 24, 24)))


WINDOWS = ((-1000.0, 1000.0), (-160.0, 240.0))


def finished_later(prepared):
    dataset = CohortDataset(
        prepared, prepared.records, AugmentConfig(probability=1.0), WINDOWS, finish_later=True
    )
    sampler = EpochSampler(len(dataset), seed=3, batch_size=2)
    for batch in loader(dataset, sampler, workers=2):
        assert batch.volume.dtype == torch.int16
        assert batch.volume.shape == (2, *SMALL.size)
        yield dataset.finished(batch)


def test_augmenting_a_batch_after_it_was_read_changes_nothing(prepared):
    early = batches(prepared, augment=AugmentConfig(probability=1.0), windows_hu=WINDOWS)
    for first, second in zip(early, finished_later(prepared), strict=True):
        assert torch.equal(first.volume, second.volume)
        assert torch.equal(first.study, second.study)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_augments_as_a_worker_does_except_for_the_noise(prepared):
    quiet = AugmentConfig(probability=1.0, noise_hu=0.0)
    early = batches(prepared, augment=quiet, windows_hu=WINDOWS)
    dataset = CohortDataset(prepared, prepared.records, quiet, WINDOWS, finish_later=True)
    sampler = EpochSampler(len(dataset), seed=3, batch_size=2)
    for first, raw in zip(early, loader(dataset, sampler), strict=True):
        second = dataset.finished(raw.with_volume(raw.volume.cuda()))
        assert second.volume.device.type == "cuda"
        torch.testing.assert_close(second.volume.cpu(), first.volume, rtol=0, atol=2e-3)
