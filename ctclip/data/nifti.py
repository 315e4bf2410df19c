"""NIfTI-1 and NIfTI-2 files to stored voxels, affine and scaling.

The header is judged before any voxel memory is taken, the stream is read to its end so that a
truncated or corrupted file can't pass (most readers skip the checksum), and nothing beyond what the
header asks for is kept. nibabel interprets the header; the bytes are read here.
"""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib  # twice as fast as the standard library, same interface
from nibabel.spatialimages import HeaderDataError

from ctclip.data.geometry import handedness
from ctclip.data.problems import COPY_AGAIN, Note, VolumeError

MAX_VOXELS = 2**31
"""Refused above; CT-RATE's largest volume (1024 x 1024 x 1617) has 1.7e9 voxels."""

MAX_INFLATION = 200.0
"""Bytes out per byte in. CT noise keeps real scans below 20; gzip itself ends near 1030."""

BOMB_BYTES = 2**26
"""Below this size even an absurd compression ratio does no harm (empty test volumes)."""

MAX_TRAILING_BYTES = 2**26
"""How far the stream is followed behind the last voxel to verify its checksum."""

CHUNK = 2**20

DAMAGED: tuple[type[Exception], ...] = (EOFError, igzip.BadGzipFile, isal_zlib.IsalError)  # type: ignore[assignment]

MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}


@dataclass
class StoredVolume:
    """Voxels as stored, before any scaling, with what the header says about them."""

    voxels: np.ndarray
    """``(i, j, k)`` in the file's own order."""

    affine: np.ndarray
    """``(4, 4)`` index to RAS mm."""

    slope: float = 1.0
    intercept: float = 0.0
    notes: list[Note] = field(default_factory=list)


def read(path: Path, *, max_voxels: int = MAX_VOXELS) -> StoredVolume:
    """Read one NIfTI file, gzipped or not, whatever its name claims.

    Args:
        path: ``.nii``, ``.nii.gz``, or the ``.hdr`` of a pair.
        max_voxels: Refuse a header that asks for more, before memory is taken.

    Returns:
        Voxels in the file's own order and type, with affine and scaling.

    Raises:
        VolumeError: If the file is not a NIfTI, is damaged, or is no 3-D scalar volume.
    """
    notes: list[Note] = []
    with path.open("rb") as raw:
        stream, data_stream = _open(path, raw, notes)
        header = _header(path, stream)
        shape, dtype = _layout(path, header, max_voxels)
        slope, intercept = _scaling(path, header)
        affine = _affine(path, header, notes)
        if bytes(header["magic"]).rstrip(b"\0") in (b"ni1", b"ni2"):
            data_stream = _companion(path)
            offset = int(header["vox_offset"])
        else:
            offset = int(header["vox_offset"]) - stream.tell()
            if offset < 0:
                raise VolumeError(path, "bad-header", "vox_offset lies inside the header")
        num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        ratio = num_bytes / max(1, path.stat().st_size)
        if num_bytes > BOMB_BYTES and ratio > MAX_INFLATION and data_stream is stream:
            raise VolumeError(
                path,
                "inflation",
                f"would inflate {ratio:.0f}-fold to {num_bytes / 2**30:.1f} GiB; a CT's noise "
                f"keeps this below {MAX_INFLATION:.0f}",
            )
        voxels = _voxels(path, data_stream, offset, shape, dtype)
        _check_tail(path, data_stream, notes)
    if voxels.ndim == 4:
        voxels = voxels[..., 0]
    return StoredVolume(voxels, affine, slope, intercept, notes + handedness(affine))


def _open(path: Path, raw: BinaryIO, notes: list[Note]) -> tuple[BinaryIO, BinaryIO]:
    """Choose by content, not by name, and recognise what is commonly mistaken for a scan."""
    head = raw.read(64)
    raw.seek(0)
    if not head:
        raise VolumeError(path, "empty-file", f"the file has 0 bytes; {COPY_AGAIN}")
    if head.startswith(b"\x1f\x8b"):
        if path.suffix != ".gz":
            notes.append(Note("wrong-name", "gzip data in a file not named .gz; read it", "warn"))
        stream: BinaryIO = igzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[assignment]
        return stream, stream
    if head.startswith(b"version https://git-lfs"):
        raise VolumeError(path, "git-lfs", "a git-LFS pointer, not data; run: git lfs pull")
    if head.startswith(b"PK\x03\x04"):
        raise VolumeError(path, "zip", "a ZIP archive; unpack it first")
    if head.lstrip()[:1] == b"<":
        raise VolumeError(path, "html", "looks like an HTML page; the download failed, do it again")
    if path.suffix == ".gz":
        if int.from_bytes(head[:4], "little") not in (348, 540) and (
            int.from_bytes(head[:4], "big") not in (348, 540)
        ):
            raise VolumeError(path, "not-nifti", "neither gzip data nor a NIfTI header")
        notes.append(Note("wrong-name", "not gzipped although named .gz; read it", "warn"))
    return raw, raw


def _companion(path: Path) -> BinaryIO:
    """The ``.img`` beside a ``.hdr``."""
    image = path.with_suffix(".img")
    if not image.exists():
        raise VolumeError(path, "missing-image", f"its voxel file {image.name} is missing")
    return io.BytesIO(image.read_bytes())


def _read_exactly(path: Path, stream: BinaryIO, num_bytes: int, what: str) -> bytes:
    try:
        data = stream.read(num_bytes)
    except DAMAGED as error:
        detail = f"damaged gzip stream: {error}; {COPY_AGAIN}"
        raise VolumeError(path, "corrupt-gzip", detail) from None
    if len(data) < num_bytes:
        raise VolumeError(
            path,
            "truncated",
            f"{what}: expected {num_bytes} bytes, the file holds {len(data)}; {COPY_AGAIN}",
        )
    return data


def _header(path: Path, stream: BinaryIO) -> nib.Nifti1Header:
    first = _read_exactly(path, stream, 4, "header")
    for order in ("little", "big"):
        size = int.from_bytes(first, order)  # type: ignore[arg-type]
        if size in (348, 540):
            break
    else:
        raise VolumeError(path, "not-nifti", f"not a NIfTI file (first bytes {first!r})")
    block = first + _read_exactly(path, stream, size - 4, "header")
    kind = nib.Nifti1Header if size == 348 else nib.Nifti2Header
    header = kind(block, endianness="<" if order == "little" else ">", check=False)
    magic = bytes(header["magic"]).rstrip(b"\0\r\n\x1a")
    if magic not in (b"n+1", b"ni1", b"n+2", b"ni2"):
        raise VolumeError(path, "bad-magic", f"not a NIfTI file (magic {magic!r})")
    return header


def _layout(
    path: Path, header: nib.Nifti1Header, max_voxels: int
) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and voxel type, both judged before anything is allocated."""
    rank = int(header["dim"][0])
    shape = tuple(int(size) for size in header["dim"][1 : max(rank, 0) + 1])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if any(size <= 0 for size in shape):
        raise VolumeError(path, "bad-dimensions", f"dimensions {shape} are not all positive")
    if len(shape) != 3:
        raise VolumeError(
            path,
            "not-3d",
            f"expected one 3-D volume, got {len(shape)}-D {shape}"
            + ("; save the time point to be used as its own file" if len(shape) > 3 else ""),
        )
    num_voxels = shape[0] * shape[1] * shape[2]
    if num_voxels > max_voxels:
        raise VolumeError(
            path,
            "too-large",
            f"the header asks for {num_voxels:.3g} voxels, limit {max_voxels:.3g}",
        )
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        code = int(header["datatype"])
        raise VolumeError(path, "bad-datatype", f"unsupported datatype code {code}") from None
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise VolumeError(path, "not-scalar", f"{dtype} voxels are not a CT (colour or complex)")
    return shape, dtype


def _scaling(path: Path, header: nib.Nifti1Header) -> tuple[float, float]:
    """Slope and intercept; by the standard a slope of 0 or NaN means that there is no scaling."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not np.isfinite(slope) or not np.isfinite(intercept):
        raise VolumeError(
            path, "bad-scaling", f"scl_slope {slope}, scl_inter {intercept} are not finite"
        )
    return slope, intercept


def _affine(path: Path, header: nib.Nifti1Header, notes: list[Note]) -> np.ndarray:
    """The sform, else the qform, else spacing alone with an assumed orientation."""
    unit = header.get_xyzt_units()[0] if int(header["xyzt_units"]) & 7 in (0, 1, 2, 3) else "mm"
    mm = MM_PER_UNIT[unit]
    if mm != 1.0:
        notes.append(Note("units", f"coordinates are in {unit}; converted to mm", "warn"))
    sform, qform = _sform(header), _qform(header)
    pixdim = np.array(header["pixdim"][1:4], dtype=float)
    if sform is not None and not _usable(sform):
        text = "the sform is singular or not finite; used the qform"
        notes.append(Note("bad-sform", text, "warn"))
        sform = None
        if qform is None:
            raise VolumeError(path, "bad-affine", "the sform is singular and there is no qform")
    if sform is not None and qform is not None and _usable(qform) and _differ(sform, qform):
        text = "sform and qform disagree; used the sform (laterality may be wrong)"
        notes.append(Note("form-conflict", text, "warn"))
    if sform is not None:
        if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
            text = f"pixdim {pixdim.tolist()} is invalid; took the spacing from the sform"
            notes.append(Note("bad-pixdim", text, "warn"))
        return _scaled(sform, mm)
    if qform is not None and _usable(qform):
        return _scaled(qform, mm)
    if not np.isfinite(pixdim).all() or (pixdim == 0).any():
        raise VolumeError(
            path, "bad-spacing", f"spacing {pixdim.tolist()} and no usable affine; can't resample"
        )
    text = "no orientation in the header; assumed LPS, the order of DICOM slices and of CT-RATE"
    notes.append(Note("no-orientation", text, "warn"))
    return _scaled(np.diag([-abs(pixdim[0]), -abs(pixdim[1]), abs(pixdim[2]), 1.0]), mm)


def _sform(header: nib.Nifti1Header) -> np.ndarray | None:
    return header.get_sform() if int(header["sform_code"]) > 0 else None


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    if int(header["qform_code"]) <= 0:
        return None
    try:
        return header.get_qform()
    except (HeaderDataError, ValueError):
        return None


def _usable(affine: np.ndarray) -> bool:
    linear = affine[:3, :3]
    if not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(linear, axis=0)
    # Judged on unit columns: a singular affine is one whose axes do not span space, at any scale.
    return bool((lengths > 0).all() and abs(np.linalg.det(linear / lengths)) > 1e-3)


def _differ(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two affines put the volume's axes more than 1 % of a voxel apart in direction."""
    scale = np.linalg.norm(first[:3, :3], axis=0)
    return bool((np.abs(first[:3, :3] - second[:3, :3]) > 0.01 * scale).any())


def _scaled(affine: np.ndarray, mm: float) -> np.ndarray:
    scaled = np.array(affine, dtype=float)
    scaled[:3] *= mm
    return scaled


def _voxels(
    path: Path, stream: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Read straight into the array: no second copy of a volume is ever held."""
    _read_exactly(path, stream, offset, "bytes before the voxels")
    num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    buffer = np.empty(num_bytes, dtype=np.uint8)
    position = _fill(path, stream, memoryview(buffer))  # type: ignore[arg-type]
    if position < num_bytes:
        raise VolumeError(
            path,
            "truncated",
            f"voxels: expected {num_bytes} bytes for {shape} {dtype}, the file holds {position}; "
            f"{COPY_AGAIN}",
        )
    voxels = buffer.view(dtype).reshape(shape, order="F")
    return voxels if dtype.isnative else voxels.astype(dtype.newbyteorder("="), order="F")


def _fill(path: Path, stream: BinaryIO, view: memoryview) -> int:
    """Read until ``view`` is full or the stream ends; the number of bytes read."""
    position = 0
    try:
        while position < len(view) and (
            num := stream.readinto(view[position : position + CHUNK])  # type: ignore[attr-defined]
        ):
            position += num
    except DAMAGED as error:
        detail = f"damaged gzip stream: {error}; {COPY_AGAIN}"
        raise VolumeError(path, "corrupt-gzip", detail) from None
    return position


def _check_tail(path: Path, stream: BinaryIO, notes: list[Note]) -> None:
    """Read to the end: only there does gzip compare its checksum."""
    scratch = memoryview(bytearray(CHUNK))
    trailing = 0
    while trailing < MAX_TRAILING_BYTES and (num := _fill(path, stream, scratch)):
        trailing += num
    if trailing:
        text = f"{trailing} bytes or more behind the last voxel; ignored, the header may be wrong"
        notes.append(Note("trailing-data", text, "warn"))
