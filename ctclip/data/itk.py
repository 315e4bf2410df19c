"""NRRD and MetaImage files to stored voxels, through SimpleITK, whose gaps are covered first.

ITK fills what a truncated file lacks with made-up voxels, so the header's promise is compared with
the file before anything is decoded.
"""

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from ctclip.data.geometry import handedness
from ctclip.data.nifti import BOMB_BYTES, MAX_INFLATION, MAX_VOXELS, StoredVolume
from ctclip.data.problems import COPY_AGAIN, Note, VolumeError

SUFFIXES = (".nrrd", ".mha")


def read(path: Path, *, max_voxels: int = MAX_VOXELS) -> StoredVolume:
    """Read one ``.nrrd`` or ``.mha`` file.

    Raises:
        VolumeError: If the file is damaged, or is no 3-D scalar volume.
    """
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        kind = path.suffix.removeprefix(".").upper()
        raise VolumeError(path, f"not-{path.suffix[1:]}", f"not a readable {kind} file") from None
    size = reader.GetSize()
    if reader.GetDimension() != 3:
        raise VolumeError(path, "not-3d", f"expected one 3-D volume, got {size}")
    if reader.GetNumberOfComponents() != 1:
        raise VolumeError(path, "not-scalar", "several values per voxel are not a CT")
    num_voxels = size[0] * size[1] * size[2]
    if num_voxels > max_voxels:
        raise VolumeError(
            path, "too-large", f"header asks for {num_voxels:.3g} voxels, limit {max_voxels:.3g}"
        )
    _check_payload(path, num_voxels, _bytes_per_voxel(reader.GetPixelID()))
    try:
        image = reader.Execute()
    except (RuntimeError, MemoryError):
        detail = f"the voxels can't be read; damaged? {COPY_AGAIN}"
        raise VolumeError(path, "truncated", detail) from None
    directions = np.array(image.GetDirection()).reshape(3, 3)
    lps = np.eye(4)
    lps[:3, :3] = directions * np.array(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    notes = []
    if not _names_a_space(path):
        text = "no orientation in the header; assumed LPS"
        notes.append(Note("no-orientation", text, "warn"))
    voxels = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
    return StoredVolume(voxels, affine, notes=notes + handedness(affine))


def _bytes_per_voxel(pixel_id: int) -> int:
    import SimpleITK

    empty = SimpleITK.Image([1, 1, 1], pixel_id)
    return SimpleITK.GetArrayViewFromImage(empty).dtype.itemsize


def _header_text(path: Path) -> tuple[str, int]:
    """The text header and where the voxels begin."""
    head = path.read_bytes()[: 2**16] if path.stat().st_size < 2**16 else _head(path)
    if path.suffix == ".nrrd":
        end = re.search(rb"\r?\n\r?\n", head)
    else:
        end = re.search(rb"ElementDataFile *= *LOCAL\r?\n", head)
    if end is None:
        raise VolumeError(path, "detached", "voxels lie in another file; convert to one file")
    return head[: end.end()].decode("latin-1"), end.end()


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(2**16)


def _names_a_space(path: Path) -> bool:
    text = _header_text(path)[0].lower()
    return "space directions" in text or "transformmatrix" in text


def _check_payload(path: Path, num_voxels: int, itemsize: int) -> None:
    """Count the bytes behind the header, inflating where they are compressed."""
    text, offset = _header_text(path)
    expected = num_voxels * itemsize
    on_disk = path.stat().st_size - offset
    packed = re.search(r"encoding: *gz|CompressedData *= *True", text, re.IGNORECASE)
    if packed and expected > BOMB_BYTES and expected > MAX_INFLATION * max(1, on_disk):
        raise VolumeError(path, "inflation", f"would inflate {expected / max(1, on_disk):.0f}-fold")
    found = _inflated_size(path, offset, expected) if packed else on_disk
    if found < expected:
        detail = f"voxels: expected {expected} bytes, got {found}; {COPY_AGAIN}"
        raise VolumeError(path, "truncated", detail)


def _inflated_size(path: Path, offset: int, limit: int) -> int:
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    total = 0
    with path.open("rb") as stream:
        stream.seek(offset)
        try:
            while total < limit and (piece := stream.read(2**20)):
                total += len(inflater.decompress(piece))
        except (zlib.error, gzip.BadGzipFile) as error:
            detail = f"damaged stream: {error}; {COPY_AGAIN}"
            raise VolumeError(path, "corrupt-gzip", detail) from None
    return total
