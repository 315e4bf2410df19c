"""Files that are complete or absent: atomic writes, and the compressed form of one volume."""

import csv
import itertools
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import blosc2

CHUNK = (48, 96, 96)
"""Voxels per compressed chunk (0.9 MB): a crop reads the chunks it touches and nothing else."""

CHUNK_CHECKSUMS = "crc32"
"""Metadata of a frame: the checksum of each of its compressed chunks, in order."""


STEPS_PER_HU = 32
"""Float HU are kept in steps of 1/32: as int16, up to ±1023 HU, at half the size of float32."""

FRACTIONS = "steps_per_hu"
"""Metadata of a frame whose voxels are not whole HU."""


class DamagedFrameError(ValueError):
    """A chunk of a compressed volume doesn't match its checksum, or can't be found."""


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

    Args:
        voxels: ``(D, H, W)`` integers, or float HU within ±1023, which are kept to 1/64 HU.

    Raises:
        ValueError: If float HU are beyond that.
    """
    import blosc2

    is_fractional = np.issubdtype(voxels.dtype, np.floating)
    if is_fractional:
        steps = np.rint(voxels * np.float32(STEPS_PER_HU))
        limits = np.iinfo(np.int16)
        if not ((steps >= limits.min) & (steps <= limits.max)).all():
            raise ValueError("float HU are kept within ±1023; round others to whole HU")
        voxels = steps.astype(np.int16)
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
    array.schunk.vlmeta[CHUNK_CHECKSUMS] = [
        checksum(array.schunk.get_chunk(number)) for number in range(array.schunk.nchunks)
    ]
    if is_fractional:
        array.schunk.vlmeta[FRACTIONS] = STEPS_PER_HU
    return array.to_cframe()


def decompress(frame: bytes) -> np.ndarray:
    """The whole volume in a frame from :func:`compress`, of the type that was given."""
    import blosc2

    return _in_hu(blosc2.ndarray_from_cframe(frame), ...)


def _in_hu(array: "blosc2.NDArray", box: Any) -> np.ndarray:
    voxels: np.ndarray = array[box]
    if FRACTIONS not in array.schunk.vlmeta:
        return voxels
    return voxels.astype(np.float32) / np.float32(array.schunk.vlmeta[FRACTIONS])


def read_box(source: Path | bytes, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """A box of one volume; only the chunks that it touches are read, verified and decompressed.

    Args:
        source: A file, or a frame whose bytes are verified already.
        start: First voxel (d, h, w).
        size: Voxels (d, h, w).

    Raises:
        DamagedFrameError: If the bytes are not those of :func:`compress`.
        OSError: If the file can't be read.
    """
    import blosc2

    box = tuple(slice(first, first + num) for first, num in zip(start, size, strict=True))
    if isinstance(source, bytes):
        return _in_hu(blosc2.ndarray_from_cframe(source), box)
    with source.open("rb"):  # blosc2 says "RuntimeError" of a missing file and of a damaged one
        pass
    try:
        array = blosc2.open(str(source), mode="r")
        expected = array.schunk.vlmeta[CHUNK_CHECKSUMS]
        for number in _touched(box, array.shape, array.chunks):
            if checksum(array.schunk.get_chunk(number)) != expected[number]:
                raise DamagedFrameError(f"{source}: chunk {number}")
        return _in_hu(array, box)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DamagedFrameError(f"{source}: {error}") from None


def _touched(box: Sequence[slice], shape: Sequence[int], chunks: Sequence[int]) -> Iterable[int]:
    """Numbers of the chunks that a box overlaps, in the frame's C order."""
    grid = [-(-num // chunk) for num, chunk in zip(shape, chunks, strict=True)]
    ranges = [
        range(side.start // chunk, -(-side.stop // chunk))
        for side, chunk in zip(box, chunks, strict=True)
    ]
    return (int(np.ravel_multi_index(place, grid)) for place in itertools.product(*ranges))


def checksum(data: bytes) -> int:
    """CRC-32, fast enough to be verified on every read."""
    return zlib.crc32(data)
