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


def test_a_damaged_volume_is_replaced_and_counted(tmp_path, caplog):
    records, _ = read_manifest(cohort(tmp_path, num=4))
    fresh = prepare(records, tmp_path / "out", SMALL)
    (fresh.path / "volumes/v1.b2nd").write_bytes(b"garbage")
    dataset = CohortDataset(fresh, fresh.records)
    assert dataset[1].record.volume_id == "v2"
    assert dataset.num_replaced == 1
    assert "v1.b2nd is damaged" in caplog.text
    for file in (fresh.path / "volumes").iterdir():
        file.write_bytes(b"garbage")
    with pytest.raises(CorruptVolumeError, match="every volume"):
        dataset[0]
