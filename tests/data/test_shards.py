from pathlib import Path

import fsspec
import numpy as np
import pytest
from scans import cohort

from ctclip.data.cache import prepare
from ctclip.data.cohort import CorruptVolumeError, PreparedCohort
from ctclip.data.dataset import CohortDataset
from ctclip.data.manifest import read_manifest
from ctclip.data.shards import open_packed, pack
from ctclip.data.volume import VolumeConfig

SMALL = VolumeConfig(spacing_mm=(12.0, 10.0, 10.0), size=(24, 24, 32))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    records, problems = read_manifest(cohort(folder, num=7))
    return prepare(records, folder / "out", SMALL, problems=problems)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_packed_cohort_reads_like_the_prepared_one(prepared, tmp_path, scheme):
    url = "memory://bucket/cohort" if scheme == "memory" else f"file://{tmp_path}/packed"
    packed = PreparedCohort.open(Path(pack(prepared, url, shard_bytes=40_000)))
    assert packed.fingerprint == prepared.fingerprint
    assert packed.records == prepared.records
    for record in prepared.records:
        name = record.volume_id
        assert np.array_equal(packed.read(name), prepared.read(name))
    crop = packed.read_crop("v3", (2, 3, 4), (5, 6, 7))
    assert np.array_equal(crop, prepared.read("v3")[2:7, 3:9, 4:11])
    sample = CohortDataset(packed, packed.split("train"))[0]
    assert sample.volume.shape == (1, 24, 24, 32)
    with pytest.raises(FileNotFoundError, match="no prepared volume"):
        packed.read("gone")


def test_volumes_share_shards_up_to_their_size(prepared):
    url = pack(prepared, "memory://sizes", shard_bytes=40_000)
    filesystem, root = fsspec.core.url_to_fs(url)
    sizes = [filesystem.size(file) for file in sorted(filesystem.glob(f"{root}/*.shard"))]
    assert 1 < len(sizes) < 7
    total = sum(len(prepared.frame(record.volume_id)) for record in prepared.records)
    assert sum(sizes) == total


def test_a_damaged_shard_is_noticed_and_packing_again_repairs_it(prepared):
    url = pack(prepared, "memory://damage", shard_bytes=40_000)
    filesystem, root = fsspec.core.url_to_fs(url)
    shard = sorted(filesystem.glob(f"{root}/*.shard"))[0]
    data = bytearray(filesystem.cat_file(shard))
    data[100] ^= 1
    filesystem.pipe_file(shard, bytes(data))
    for read in (
        open_packed(url).read,
        lambda name: open_packed(url).read_crop(name, *[[1] * 3] * 2),
    ):
        with pytest.raises(CorruptVolumeError, match=r"v0\.b2nd.*damaged-cache"):
            read("v0")
    filesystem.rm(shard)
    with pytest.raises(CorruptVolumeError, match="missing-cache"):
        open_packed(url).read("v0")
    pack(prepared, "memory://damage", shard_bytes=40_000)
    assert np.array_equal(open_packed(url).read("v0"), prepared.read("v0"))


def test_an_unfinished_pack_is_not_opened(prepared):
    url = pack(prepared, "memory://unfinished")
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.rm(f"{root}/shards.csv")
    with pytest.raises(FileNotFoundError, match=r"shards\.csv is missing"):
        open_packed(url)
