"""A stranger's upload → voxels, without trusting it.

Nothing of an upload's names is used: its kind is told by its first bytes, and an archive's members
are written under numbers. Parsing happens in a child process with its own memory and time limit,
so that a file that crashes a decoder or eats memory takes nobody else down.
"""

import fcntl
import json
import logging
import multiprocessing
import os
import resource
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ctclip.data.volume import VolumeConfig

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
MAX_RATIO = 100
"""Compression that no image data reaches; DICOM stays below 10."""

SCRATCH_PREFIX = "ctclip-uploads-"

PRELOAD = ["ctclip.data.checked"]
"""Imported once by the server that reading processes are forked from: it takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one upload may cost."""

    upload_mib: int = 1024
    unpacked_mib: int = 4096
    files: int = 5000
    memory_mib: int = 12_000
    """For reading and resampling one scan."""

    read_s: float = 300.0
    upload_s: float = 600.0
    waiting: int = 64
    """Uploads that may wait; more are told to come back."""


@dataclass(frozen=True, eq=False)
class Intake:
    """An uploaded scan that can be used."""

    hu: np.ndarray
    """``(D, H, W)`` HU, preprocessed."""

    warnings: tuple[dict[str, str], ...] = ()
    """``code`` and ``text`` of what its sender has to know: not a chest, a slab, rescaled …"""


class UploadError(ValueError):
    """An upload that can't be used; ``code`` is stable, the text is for its sender."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def prepare(upload: Path, folder: Path, config: "VolumeConfig", limits: Limits) -> Intake:
    """Read an uploaded file and preprocess it.

    Args:
        upload: The received bytes.
        folder: Empty scratch folder.
        config: The model's preprocessing.
        limits: Its cost.

    Raises:
        UploadError: If it is no usable scan.
    """
    head = _head(upload)
    if head.startswith(b"PK\x03\x04"):
        source = unpack(upload, folder / "unpacked", limits)
    elif head.startswith(b"\x1f\x8b"):
        source = upload.rename(folder / "scan.nii.gz")
    elif head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] == b"n+2\0":
        source = upload.rename(folder / "scan.nii")
    elif head[128:132] == b"DICM":
        (folder / "unpacked").mkdir()
        upload.rename(folder / "unpacked" / "000000.dcm")
        source = folder / "unpacked"
    else:
        raise UploadError(
            "not-a-scan", "neither NIfTI (.nii, .nii.gz) nor DICOM (a zip of one series)"
        )
    return _read_in_child(source, folder / "voxels.npy", config, limits)


def unpack(archive: Path, folder: Path, limits: Limits) -> Path:
    """Unpack a zip under our own file names.

    Returns:
        The folder, or the one NIfTI file inside.

    Raises:
        UploadError: If it is damaged, encrypted, holds links, or is more than the limits allow.
    """
    folder.mkdir(parents=True)
    left = limits.unpacked_mib << 20
    try:
        with zipfile.ZipFile(archive) as container:
            members = [member for member in container.infolist() if not member.is_dir()]
            if len(members) > limits.files:
                raise UploadError(
                    "too-many-files", f"{len(members)} files; at most {limits.files} are accepted"
                )
            for number, member in enumerate(members):
                _check_member(member)
                left -= _extract(container, member, folder / f"{number:06d}", left)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise UploadError("bad-archive", f"the zip file is damaged ({_plain(error)})") from None
    volumes = [path for path in folder.iterdir() if _nifti_suffix(path)]
    if len(volumes) == 1:
        return volumes[0].rename(folder / f"scan{_nifti_suffix(volumes[0])}")
    if not any(folder.iterdir()):
        raise UploadError("bad-archive", "the zip file is empty")
    return folder


def _check_member(member: zipfile.ZipInfo) -> None:
    kind = (member.external_attr >> 16) & 0o170000
    if kind not in (0, 0o100000):
        raise UploadError("bad-archive", "the zip file holds a link or a device, not only files")
    if member.flag_bits & 1:
        raise UploadError("bad-archive", "the zip file is encrypted; send it without a password")
    if member.file_size > CHUNK_BYTES and member.file_size > MAX_RATIO * member.compress_size:
        raise UploadError("bomb", "the zip file unpacks to far more than any scan does")


def _extract(container: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, left: int) -> int:
    """Write one member; counted while it unpacks, because a header may lie about its size."""
    written = 0
    with container.open(member) as source, path.open("wb") as target:
        while chunk := source.read(CHUNK_BYTES):
            written += len(chunk)
            if written > left:
                raise UploadError("bomb", "the zip file unpacks to more than is accepted")
            target.write(chunk)
    return written


def _nifti_suffix(path: Path) -> str:
    head = _head(path)
    if head.startswith(b"\x1f\x8b"):
        return ".nii.gz"
    return ".nii" if head[344:347] == b"n+1" else ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(352)


def _read_in_child(source: Path, out: Path, config: "VolumeConfig", limits: Limits) -> Intake:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    reason = out.with_suffix(".json")
    child = processes.Process(
        target=_read, args=(source, out, reason, config, limits.memory_mib), daemon=True
    )
    child.start()
    child.join(limits.read_s)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise UploadError("too-slow", f"reading the scan took more than {limits.read_s:g} s")
    said = json.loads(reason.read_text(encoding="utf-8")) if reason.is_file() else {}
    if "code" in said:
        raise UploadError(said["code"], said["detail"])
    if child.exitcode != 0 or not out.is_file():
        logger.warning("the reader of an upload ended with status %s", child.exitcode)
        raise UploadError("unreadable", "the scan could not be decoded; the file may be damaged")
    return Intake(np.load(out, allow_pickle=False), tuple(said["warnings"]))


def _read(source: Path, out: Path, reason: Path, config: "VolumeConfig", memory_mib: int) -> None:
    """In the child: leave voxels in ``out``, and in ``reason`` why not, or what is odd."""
    import psutil

    from ctclip.data import checked, volume

    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)  # decoders complain with file names
    ceiling = psutil.Process().memory_info().vms + (memory_mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    said: dict[str, Any]
    try:
        found = checked.look(source)
        if found.held:
            detail = f"{found.held[0].text}; the page reads scans in HU only"
            said = {"code": found.held[0].code, "detail": detail}
        else:
            notes = [
                {"code": note.code, "text": _without(source, note.text)} for note in found.warnings
            ]
            said = {"warnings": notes}
            np.save(out, volume.preprocess(found.volume, config))
    except volume.VolumeError as error:
        detail = error.detail.replace("name one with series=", "send a zip of one series")
        said = {"code": error.code, "detail": _without(source, detail)}
    except MemoryError:
        said = {"code": "too-large", "detail": "the scan needs more memory than is allowed"}
    reason.write_text(json.dumps(said), encoding="utf-8")


def _without(source: Path, text: str) -> str:
    """A text without the server's paths."""
    return text.replace(str(source), "").replace(str(source.parent), "")


def _plain(error: Exception) -> str:
    """An error's text without the server's paths."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)[:100]


def discard(folder: Path) -> None:
    """Delete an upload and all that was made of it."""
    shutil.rmtree(folder, ignore_errors=True)


class Scratch:
    """A folder for uploads, gone when closed; making one clears those that killed processes left.

    Its process holds a lock on it, which ends with the process however that ends: a process number
    may be another's by now, or one of another container that shares the folder for temporary files.
    """

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
            lock = _lock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is not None:
                discard(left)
                os.close(lock)
        while True:
            self._folder = tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-")
            self.path = Path(self._folder.name)
            self._held = _lock(self.path, fcntl.LOCK_EX)
            if self.path.is_dir():  # else another process cleared it before it was locked
                break
            self.close()

    def close(self) -> None:
        """Delete it with all that is in it."""
        self._folder.cleanup()
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _lock(folder: Path, how: int) -> int | None:
    """Lock a folder of ours; None where it is another's, locked or gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, how)
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
