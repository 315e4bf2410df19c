"""Checkpoints that survive a kill at any moment.

A checkpoint is one folder. It is written under a temporary name, every file is checksummed, and
only then renamed: a folder called ``step_00000300`` is complete or its damage shows. The newest
intact one is where a run goes on.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ctclip import distributed

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
STATE = "state.json"

FULL_BYTES = 1 << 20
"""With less than this left, a write that failed has failed for want of space."""


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    *,
    keep: int,
    protect: frozenset[str] = frozenset(),
) -> Path:
    """Write one checkpoint atomically; every rank calls this.

    Args:
        folder: Holds all checkpoints of the run, on a file system that all ranks see.
        step: Optimiser steps done so far.
        write: Puts this rank's files into the folder that it is given.
        state: What else resuming needs, JSON-able and the same on every rank.
        keep: How many of the newest checkpoints stay.
        protect: Names of checkpoints that stay whatever their age.

    Returns:
        The checkpoint's final folder.

    Raises:
        OSError: If the disk is full or read-only, saying what to do. Earlier checkpoints are
            intact then.
    """
    final = folder / name_of(step)
    temporary = folder / f".writing-{final.name}"
    with explained_disk_errors(folder):
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".writing-*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
        distributed.barrier()
        write(temporary)
        distributed.barrier()
        if distributed.is_main():
            (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            sums = {str(p.relative_to(temporary)): _sha256(p) for p in _files(temporary)}
            (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
            _to_disk(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            _prune(folder, keep, protect)
    distributed.barrier()
    return final


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold; every rank gets the same answer.

    Damaged ones are named in a warning and set aside, as ``damaged_step_…``.

    Raises:
        ValueError: If there are checkpoints, all of them damaged.
    """
    found: str | None = None
    damaged: dict[Path, str] = {}
    if distributed.is_main():
        for candidate in sorted(folder.glob("step_*"), reverse=True):
            damage = damage_of(candidate)
            if damage is None:
                found = candidate.name
                break
            damaged[candidate] = damage
        if found is not None:
            _set_aside(damaged)
    found, reasons = distributed.gather_objects((found, [*damaged.values()]))[0]
    if found is None and reasons:
        raise ValueError(
            f"every checkpoint in {folder} is damaged ({reasons[0]}): put intact copies there, or "
            f"delete the run folder to train from the start"
        )
    return folder / found if found else None


def _set_aside(damaged: dict[Path, str]) -> None:
    for checkpoint, damage in damaged.items():
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        logger.warning(
            "checkpoint %s is damaged (%s); it is kept as %s, going on from the one before",
            checkpoint,
            damage,
            aside.name,
        )


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None when they are as they were written."""
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} can't be read: {error}"
    for relative, expected in sums.items():
        path = checkpoint / relative
        if not path.is_file():
            return f"{relative} is missing"
        if _sha256(path) != expected:
            return f"{relative} has changed since it was written"
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The ``state`` that :func:`save` was given."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def name_of(step: int) -> str:
    """Folder name of a step's checkpoint; sorts by step."""
    return f"step_{step:08d}"


class explained_disk_errors:
    """Turn the disk's refusals into a sentence that says what to do. A context manager.

    Args:
        folder: What is written to inside the block.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        code = self._code(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                code,
                f"no space left in {self.folder}: the newest complete checkpoint is intact; free "
                f"space or lower checkpoint.keep, then start the same command again",
            ) from error
        if code in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise OSError(
                code,
                f"{self.folder} can't be written to; choose another run folder with out=FOLDER",
            ) from error

    def _code(self, error: BaseException | None) -> int | None:
        if isinstance(error, OSError):
            return error.errno if self._is_here(error.filename) else None
        # torch and safetensors report a failed write in words of their own.
        if isinstance(error, RuntimeError | SafetensorError) and self._is_full():
            return errno.ENOSPC
        return None

    def _is_here(self, filename: str | None) -> bool:
        path = Path(filename) if filename else self.folder
        return path.is_relative_to(self.folder) or self.folder.is_relative_to(path)

    def _is_full(self) -> bool:
        return self.folder.exists() and shutil.disk_usage(self.folder).free < FULL_BYTES


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start a checkpoint that the disk can't hold.

    Raises:
        OSError: With ENOSPC, before a single byte is written.
    """
    with explained_disk_errors(folder):
        if shutil.disk_usage(folder).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _prune(folder: Path, keep: int, protect: frozenset[str]) -> None:
    old = sorted(folder.glob("step_*"))[:-keep]
    for checkpoint in old:
        if checkpoint.name not in protect:
            shutil.rmtree(checkpoint)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _to_disk(folder: Path) -> None:
    """Rename only after the bytes are safe from a power cut."""
    for path in (*_files(folder), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
