"""NIfTI files that are damaged, mislabelled or unusual in one known way each."""

import gzip
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scans import SPACING_MM, affine_spl, chest_hu, image

Reaction = str
"""``error`` (refused), ``warn`` (used or held back, and said so) or ``tolerate`` (used)."""

HU = chest_hu()
SHAPE = HU.shape[::-1]


def nifti(array: np.ndarray | None = None, kind: type = nib.Nifti1Image, **fields: Any) -> bytes:
    """An uncompressed NIfTI of ``array`` (i, j, k), header fields overwritten as given."""
    base = image(HU)
    stored = np.asarray(base.dataobj) if array is None else array
    made = kind(stored, base.affine)
    made.set_sform(base.affine, 1)
    made.set_qform(base.affine, 1)
    made.header.set_xyzt_units("mm")
    header = made.header
    header["vox_offset"] = 352 if kind is nib.Nifti1Image else 544
    header["scl_slope"], header["scl_inter"] = np.nan, np.nan
    header["magic"] = b"n+1\0" if kind is nib.Nifti1Image else header["magic"]
    for name, value in fields.items():
        if "__" in name:
            field, index = name.split("__")
            header[field][int(index)] = value
        else:
            header[name] = value
    return header.binaryblock + b"\0" * 4 + np.asfortranarray(stored).tobytes(order="F")


def zipped(data: bytes) -> bytes:
    """Gzip with a fixed time, so that the bytes are always the same."""
    return gzip.compress(data, mtime=0)


def _float(mutate: Callable[[np.ndarray], None]) -> bytes:
    array = np.asarray(image(HU).dataobj).astype(np.float32)
    mutate(array)
    return nifti(array)


def _set_nan(array: np.ndarray) -> None:
    array[::10, ::10] = np.nan


def _set_inf(array: np.ndarray) -> None:
    array[0, 0, 0], array[1, 0, 0] = np.inf, -np.inf


def _no_forms(**fields: Any) -> bytes:
    return nifti(qform_code=0, sform_code=0, **fields)


def _sheared() -> bytes:
    made = image(HU)
    affine = made.affine.copy()
    affine[1, 2] = 2.5
    made.set_qform(None, 0)
    made.set_sform(affine, 1)
    return made.to_bytes()


def _oblique() -> bytes:
    made = image(HU)
    angle = np.radians(12)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turned = turn @ made.affine
    made.set_sform(turned, 1)
    made.set_qform(turned, 1)
    return made.to_bytes()


def _flipped_sform() -> bytes:
    made = image(HU)
    flipped = made.affine.copy()
    flipped[0] *= -1
    made.set_sform(flipped, 1)
    return made.to_bytes()


def _metres() -> bytes:
    spacing = tuple(mm / 1000 for mm in SPACING_MM)
    made = nib.Nifti1Image(np.asarray(image(HU).dataobj), _lps(spacing))
    made.header.set_xyzt_units("meter")
    return made.to_bytes()


def _lps(spacing_dhw: tuple[float, ...]) -> np.ndarray:
    return affine_spl(spacing_dhw)[:, [2, 1, 0, 3]]  # type: ignore[arg-type]


def _spacing(mm: float) -> bytes:
    return nib.Nifti1Image(np.asarray(image(HU).dataobj), _lps((mm,) * 3)).to_bytes()


def _zip_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("scan.nii", nifti())
    return buffer.getvalue()


def _stored(change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    return nifti(np.ascontiguousarray(change(np.asarray(image(HU).dataobj))))


def _bad_crc(data: bytes) -> bytes:
    packed = bytearray(zipped(data))
    packed[-8] ^= 0xFF
    return bytes(packed)


def _zeroed_middle(data: bytes) -> bytes:
    packed = bytearray(zipped(data))
    middle = len(packed) // 2
    packed[middle : middle + 64] = bytes(64)
    return bytes(packed)


GOOD = nifti()

CASES: dict[str, tuple[str, Callable[[], bytes], Reaction, str]] = {
    # name: (file name, bytes, reaction, reason code or "")
    "good": ("a.nii.gz", lambda: zipped(GOOD), "tolerate", ""),
    "truncated gzip": ("a.nii.gz", lambda: zipped(GOOD)[:-9000], "error", "corrupt-gzip"),
    "truncated plain": ("a.nii", lambda: GOOD[: len(GOOD) // 2], "error", "truncated"),
    "zeroed bytes in gzip": ("a.nii.gz", lambda: _zeroed_middle(GOOD), "error", "corrupt-gzip"),
    "wrong checksum": ("a.nii.gz", lambda: _bad_crc(GOOD), "error", "corrupt-gzip"),
    "too many slices claimed": (
        "a.nii.gz",
        lambda: zipped(nifti(dim__3=99)),
        "error",
        "truncated",
    ),
    "too few slices claimed": (
        "a.nii.gz",
        lambda: zipped(nifti(dim__3=20)),
        "warn",
        "trailing-data",
    ),
    "empty dimension": ("a.nii.gz", lambda: zipped(nifti(dim__2=0)), "error", "bad-dimensions"),
    "negative dimension": ("a.nii", lambda: nifti(dim__1=-5), "error", "bad-dimensions"),
    "70 TB claimed": (
        "a.nii.gz",
        lambda: zipped(nifti(dim__1=32767, dim__2=32767, dim__3=32767)),
        "error",
        "too-large",
    ),
    "inflates a thousandfold": (
        "a.nii.gz",
        lambda: zipped(nifti(dim__1=512, dim__2=512, dim__3=150)[:352] + bytes(2**26 + 2**24)),
        "error",
        "inflation",
    ),
    "zeros behind the voxels": (
        "a.nii.gz",
        lambda: zipped(GOOD + bytes(2**24)),
        "warn",
        "trailing-data",
    ),
    "NaN": ("a.nii.gz", lambda: zipped(_float(_set_nan)), "warn", "not-finite"),
    "infinity": ("a.nii.gz", lambda: zipped(_float(_set_inf)), "warn", "not-finite"),
    "all NaN": (
        "a.nii.gz",
        lambda: zipped(_float(lambda a: a.fill(np.nan))),
        "error",
        "no-finite-voxel",
    ),
    "constant": ("a.nii.gz", lambda: zipped(_stored(lambda a: a * 0 - 1024)), "error", "constant"),
    "no forms": ("a.nii", _no_forms, "warn", "no-orientation"),
    "no forms, negative pixdim": (
        "a.nii",
        lambda: _no_forms(pixdim__1=-5.0),
        "warn",
        "no-orientation",
    ),
    "no forms, zero pixdim": ("a.nii", lambda: _no_forms(pixdim__3=0.0), "error", "bad-spacing"),
    "zero pixdim, good sform": ("a.nii", lambda: nifti(pixdim__3=0.0), "warn", "bad-pixdim"),
    "singular sform": ("a.nii", lambda: nifti(srow_x=[0] * 4), "warn", "bad-sform"),
    "NaN in sform": ("a.nii", lambda: nifti(srow_x=[np.nan] * 4), "warn", "bad-sform"),
    "sform only, singular": (
        "a.nii",
        lambda: nifti(qform_code=0, srow_x=[0] * 4),
        "error",
        "bad-affine",
    ),
    "q and s forms disagree": ("a.nii", _flipped_sform, "warn", "form-conflict"),
    "two time points": (
        "a.nii",
        lambda: _stored(lambda a: np.stack([a, a], -1)),
        "error",
        "not-3d",
    ),
    "one time point": ("a.nii", lambda: _stored(lambda a: a[..., None]), "tolerate", ""),
    "2-D": ("a.nii", lambda: _stored(lambda a: a[:, :, 10]), "error", "not-3d"),
    "one slice": ("a.nii", lambda: _stored(lambda a: a[:, :, 10:11]), "error", "too-small"),
    "3 x 3 x 3": ("a.nii", lambda: _stored(lambda a: a[:3, :3, :3]), "error", "too-small"),
    "oblique": ("a.nii", _oblique, "tolerate", ""),
    "sheared": ("a.nii", _sheared, "warn", "tilt"),
    "8-bit windowed": (
        "a.nii",
        lambda: _stored(lambda a: np.clip((a + 1000) / 8, 0, 255).astype(np.uint8)),
        "warn",
        "8-bit",
    ),
    "normalised": (
        "a.nii",
        lambda: _stored(lambda a: ((a + 1000) / 2000).astype(np.float32)),
        "warn",
        "normalised",
    ),
    "offset by 1024": ("a.nii", lambda: _stored(lambda a: a + np.int16(1024)), "warn", "hu-offset"),
    "offset by 8192": ("a.nii", lambda: _stored(lambda a: a + np.int16(8192)), "warn", "hu-offset"),
    "label mask": (
        "a.nii",
        lambda: _stored(lambda a: (a > 0).astype(np.uint8)),
        "error",
        "label-mask",
    ),
    "float64": ("a.nii", lambda: _stored(lambda a: a.astype(np.float64)), "tolerate", ""),
    "int32": ("a.nii", lambda: _stored(lambda a: a.astype(np.int32)), "tolerate", ""),
    "complex": ("a.nii", lambda: _stored(lambda a: a.astype(np.complex64)), "error", "not-scalar"),
    "colour": (
        "a.nii",
        lambda: _stored(lambda a: np.zeros(a.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "error",
        "not-scalar",
    ),
    "big-endian": (
        "a.nii",
        lambda: nib.Nifti1Image(
            np.asarray(image(HU).dataobj), image(HU).affine, image(HU).header.as_byteswapped()
        ).to_bytes(),
        "tolerate",
        "",
    ),
    "slope 0 with intercept": (
        "a.nii",
        lambda: nifti(scl_slope=0, scl_inter=-1024),
        "tolerate",
        "",
    ),
    "slope infinite": ("a.nii", lambda: nifti(scl_slope=np.inf), "error", "bad-scaling"),
    "header scaling": (
        "a.nii",
        lambda: nifti(np.asarray(image(HU).dataobj) + np.int16(1024), scl_slope=1, scl_inter=-1024),
        "tolerate",
        "",
    ),
    "plain file named .gz": ("a.nii.gz", lambda: GOOD, "warn", "wrong-name"),
    "gzip named .nii": ("a.nii", lambda: zipped(GOOD), "warn", "wrong-name"),
    "ZIP named .nii.gz": ("a.nii.gz", _zip_archive, "error", "zip"),
    "HTML page": ("a.nii.gz", lambda: b"<!DOCTYPE html><html>404</html>", "error", "html"),
    "git-LFS pointer": (
        "a.nii.gz",
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "error",
        "git-lfs",
    ),
    "empty file": ("a.nii.gz", lambda: b"", "error", "empty-file"),
    "empty gzip": ("a.nii.gz", lambda: zipped(b""), "error", "truncated"),
    "header only": ("a.nii.gz", lambda: zipped(GOOD[:348]), "error", "truncated"),
    "bad magic": ("a.nii", lambda: nifti(magic=b"xxx\0"), "error", "bad-magic"),
    "bad header size": ("a.nii", lambda: b"\xe7\x03\0\0" + GOOD[4:], "error", "not-nifti"),
    "unknown datatype": ("a.nii", lambda: nifti(datatype=9999), "error", "bad-datatype"),
    "wrong voxel offset": ("a.nii", lambda: nifti(vox_offset=4000), "error", "truncated"),
    "pair without image": (
        "a.hdr",
        lambda: nifti(magic=b"ni1\0", vox_offset=0)[:348],
        "error",
        "missing-image",
    ),
    "NIfTI-2": ("a.nii", lambda: nifti(kind=nib.Nifti2Image), "tolerate", ""),
    "padding of -8192": (
        "a.nii",
        lambda: _stored(lambda a: np.where(np.indices(a.shape)[0] < 4, -8192, a).astype(np.int16)),
        "tolerate",
        "",
    ),
    "voxels at int16 limits": (
        "a.nii",
        lambda: _stored(
            lambda a: np.where(np.indices(a.shape).sum(0) % 211 == 9, 32767, a).astype(np.int16)
        ),
        "tolerate",
        "",
    ),
    "metres": ("a.nii", _metres, "warn", "units"),
    "100 mm voxels": ("a.nii", lambda: _spacing(100.0), "error", "bad-spacing"),
    "1 um voxels": ("a.nii", lambda: _spacing(0.001), "error", "bad-spacing"),
    "odd file name": ("ä b & c.nii.gz", lambda: zipped(GOOD), "tolerate", ""),
    "random bytes": (
        "a.nii.gz",
        lambda: np.random.default_rng(0).bytes(20_000),
        "error",
        "not-nifti",
    ),
    "gzip of text": ("a.nii.gz", lambda: zipped(b"hello " * 100), "error", "not-nifti"),
    "two gzip members": (
        "a.nii.gz",
        lambda: zipped(GOOD[:20_000]) + zipped(GOOD[20_000:]),
        "tolerate",
        "",
    ),
}


def write(folder: Path, name: str) -> Path:
    """Write one case and return its file."""
    file_name, make, _, _ = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name
    path.write_bytes(make())
    return path
