"""A prepared cohort packed into shards, for 50,000 volumes on one file system or an object store.

A shard is volumes' compressed frames end to end, about a gigabyte; the manifest says where each
begins. One volume is one ranged read, so any order of access works, on a disk as over a network,
and a file system holds fifty files instead of fifty thousand. URLs are fsspec's: ``s3://…``,
``gs://…``, ``file:///…``, ``memory://…``.
"""

import csv
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctclip.data.cohort import PreparedCohort
from ctclip.data.storage import checksum
from ctclip.progress import track

SHARD_BYTES = 2**30
"""Large enough to stream at full speed, small enough to copy again."""

INDEX = "shards.csv"


@dataclass(frozen=True)
class ShardStore:
    """Frames of volumes in shards behind a URL."""

    filesystem: Any
    root: str
    ranges: Mapping[str, tuple[str, int, int]]
    """Shard, offset and length in bytes, by volume id."""

    def frame(self, volume_id: str) -> bytes:
        """The compressed bytes of one volume, in one ranged read."""
        shard, offset, length = self.ranges[volume_id]
        return self.filesystem.cat_file(f"{self.root}/{shard}", start=offset, end=offset + length)


def pack(cohort: PreparedCohort, url: str, *, shard_bytes: int = SHARD_BYTES) -> str:
    """Write a prepared cohort as shards; whole shards that exist already are kept.

    Args:
        cohort: From ``prepare``.
        url: Where the folder named after the fingerprint goes.
        shard_bytes: No shard grows beyond this size, unless one volume does.

    Returns:
        The URL of the packed cohort, for ``PreparedCohort.open``.
    """
    import fsspec

    filesystem, base = fsspec.core.url_to_fs(url)
    root = f"{base.rstrip('/')}/{cohort.fingerprint}"
    filesystem.makedirs(root, exist_ok=True)
    rows: list[tuple[str, str, int, int]] = []
    shard = bytearray()
    number = 0
    for record in track(cohort.records, len(cohort.records), "pack", "volume"):
        frame = cohort.frame(record.volume_id)
        if shard and len(shard) + len(frame) > shard_bytes:
            _write_shard(filesystem, f"{root}/{number:05d}.shard", shard)
            shard = bytearray()
            number += 1
        rows.append((record.volume_id, f"{number:05d}.shard", len(shard), len(frame)))
        shard += frame
    _write_shard(filesystem, f"{root}/{number:05d}.shard", shard)
    for name in ("recipe.yaml", "manifest.csv", "ledger.csv", "summary.json"):
        if (cohort.path / name).exists():
            filesystem.pipe_file(f"{root}/{name}", (cohort.path / name).read_bytes())
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(
        [("volume_id", "shard", "offset", "length"), *rows]
    )
    # Last, so that a packed cohort with an index is complete.
    filesystem.pipe_file(f"{root}/{INDEX}", buffer.getvalue().encode())
    return f"{url.rstrip('/')}/{cohort.fingerprint}"


def _write_shard(filesystem: Any, path: str, data: bytearray) -> None:
    """Write a shard unless the very same one is there."""
    if (
        filesystem.exists(path)
        and filesystem.size(path) == len(data)
        and checksum(filesystem.cat_file(path)) == checksum(bytes(data))
    ):
        return
    filesystem.pipe_file(path, bytes(data))


def open_packed(url: str) -> PreparedCohort:
    """Open a packed cohort; it reads like a prepared one, whole volumes at a time.

    Args:
        url: What :func:`pack` returned.

    Raises:
        FileNotFoundError: If there is no complete packed cohort.
        ValueError: If it was prepared by another version of the preprocessing.
    """
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(url)
    root = root.rstrip("/")
    if not filesystem.exists(f"{root}/{INDEX}"):
        raise FileNotFoundError(f"no packed cohort at {url}: {INDEX} is missing")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / root.rsplit("/", 1)[-1]
        folder.mkdir()
        for name in ("recipe.yaml", "manifest.csv"):
            (folder / name).write_bytes(filesystem.cat_file(f"{root}/{name}"))
        cohort = PreparedCohort.open(folder)
    text = filesystem.cat_file(f"{root}/{INDEX}").decode()
    ranges = {
        row["volume_id"]: (row["shard"], int(row["offset"]), int(row["length"]))
        for row in csv.DictReader(io.StringIO(text))
    }
    return cohort.stored_in(ShardStore(filesystem, root, ranges), Path(root))
