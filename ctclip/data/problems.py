"""What can be wrong with an input: one vocabulary of reason codes for scans and tables.

A reader either raises (the input can't be used) or attaches notes to what it returns. Notes of
level ``info`` say what was done; ``note`` says that the scan is stored in an unusual but valid way;
``warn`` that something was repaired or looks odd; ``hold`` that the voxels are intact but can't be
trusted as HU, so that the scan stays out of a cohort until the user decides. Everything above
``info`` ends in the ledger.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["info", "note", "warn", "hold"]
Status = Literal["refused", "left-out", "corrected", "warned", "noted"]

COPY_AGAIN = "download or copy the file again"
"""What to do about a file that ends early or fails its checksum."""


@dataclass(frozen=True)
class Note:
    """One thing that a reader did or noticed."""

    code: str
    """Stable reason code, for example ``no-orientation``."""

    text: str
    """What was found and what was done about it, in one sentence."""

    level: Level = "info"
    advice: str = ""
    """Of a ``hold``: what the user can say to have the scan used."""


class VolumeError(ValueError):
    """A scan that can't be used, with a stable reason code."""

    def __init__(self, path: Path | str, code: str, detail: str) -> None:
        super().__init__(f"{path}: {detail} [{code}]")
        self.path = Path(path)
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[Path, str, str]]:
        """Let the error travel back from a worker process."""
        return type(self), (self.path, self.code, self.detail)


@dataclass(frozen=True)
class Problem:
    """A row of the ledger: one input that was not used, or was used with a correction."""

    path: str
    """The file, and for a table its line (``labels.csv:418``)."""

    status: Status
    """``refused`` and ``left-out`` never reach a batch; the others do. Nothing is wrong with what
    is left out: a rule preferred another. ``noted`` is for counts, not for worry."""

    code: str
    detail: str
    volume_id: str = ""


def some_of(files: Sequence[Path], folder: Path, num: int = 3) -> str:
    """The first few of some files, relative to a folder: ``a/1.dcm, a/2.dcm, … (17 in all)``."""
    names = [str(file.relative_to(folder)) for file in files[:num]]
    more = f", … ({len(files)} in all)" if len(files) > num else ""
    return ", ".join(names) + more


class ManifestError(ValueError):
    """A table that can't be used; names the file, the lines, and what was expected."""
