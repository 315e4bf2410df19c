"""One job to a run folder: two would write over each other's checkpoints without a word."""

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ctclip import distributed
from ctclip.training.resume import explained_disk_errors

logger = logging.getLogger(__name__)

LOCK = ".lock"

WAIT_S = 10.0
"""How long a job that was killed a moment ago may take to let go."""


@contextlib.contextmanager
def sole_job(out: Path) -> Iterator[None]:
    """Hold the run folder for this job; every rank calls this.

    The lock belongs to the process of rank 0 and ends with it, however it ends, also on a network
    file system. A folder that holds nothing else afterwards is removed.

    Raises:
        ValueError: If another job holds the folder.
        OSError: If it can't be written to.
    """
    lock: int | None = None
    problem: Exception | None = None
    if distributed.is_main():
        try:
            lock = _locked(out)
        except (OSError, ValueError) as error:
            problem = error
    problem = distributed.gather_objects(problem)[0]
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
            _leave_no_empty_folder(out)


def _locked(out: Path) -> int:
    with explained_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    give_up = time.monotonic() + WAIT_S
    while True:
        try:
            # Of the process, not of the file's handle: readers that outlive a killed trainer for a
            # moment don't hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except (BlockingIOError, PermissionError):
            if time.monotonic() > give_up:
                os.close(lock)
                raise ValueError(
                    f"another job is training in {out}; wait for it, stop it, or choose another "
                    f"folder with out=FOLDER"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            logger.warning(
                "the file system of %s has no locks (%s): see to it that no other job trains there",
                out,
                error.strerror,
            )
            return lock


def _leave_no_empty_folder(out: Path) -> None:
    with contextlib.suppress(OSError):
        if [path.name for path in out.iterdir()] == [LOCK]:
            (out / LOCK).unlink()
            out.rmdir()
