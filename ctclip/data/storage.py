"""Files that are complete or absent: atomic writes, and the compressed form of one volume."""

import csv
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = (48, 96, 96)
"""Voxels per compressed chunk (0.9 MB): a crop reads the chunks it touches and nothing else."""


def write_bytes(folder: Path, name: str, data: bytes) -> None:
    """Write ``folder/name`` by way of ``folder/tmp``, so that no reader sees half a file."""
    temporary = folder / "tmp" / f"{os.getpid()}-{Path(name).name}"
    temporary.write_bytes(data)
    os.replace(temporary, folder / name)


def write_text(folder: Path, name: str, text: str) -> None:
    """As :func:`write_bytes`, in UTF-8."""
    write_bytes(folder, name, text.encode("utf-8"))


def write_csv(
    folder: Path, name: str, columns: Sequence[str], rows: Iterable[dict[str, Any]]
) -> None:
    """As :func:`write_bytes`, one row per mapping."""
    temporary = folder / "tmp" / f"{os.getpid()}-{name}"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, folder / name)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in ``folder/tmp``; the files of living ones are theirs."""
    for file in (folder / "tmp").iterdir():
        process = file.name.split("-", 1)[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            file.unlink(missing_ok=True)


def compress(voxels: np.ndarray) -> bytes:
    """One volume as a blosc2 frame: zstd level 1 after bit shuffling, in chunks of :data:`CHUNK`.

    Measured on 240 x 480 x 480 HU against .npy, zarr, HDF5 and lz4: 2.7-fold smaller than raw,
    read at 570 MB/s per core, and a crop needs 20 ms.
    """
    import blosc2

    array = blosc2.asarray(
        np.ascontiguousarray(voxels),
        chunks=tuple(min(n, m) for n, m in zip(CHUNK, voxels.shape, strict=True)),
        cparams={
            "codec": blosc2.Codec.ZSTD,
            "clevel": 1,
            "filters": [blosc2.Filter.BITSHUFFLE],
            "nthreads": 1,
        },
    )
    return array.to_cframe()


def decompress(frame: bytes) -> np.ndarray:
    """The whole volume in a frame from :func:`compress`."""
    import blosc2

    return blosc2.ndarray_from_cframe(frame)[...]


def checksum(data: bytes) -> int:
    """CRC-32, fast enough to be verified on every read."""
    return zlib.crc32(data)
