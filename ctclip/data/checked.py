"""One scan, read and judged: what stands between a file and a cohort, a score or a search.

``ctclip-prepare``, ``ctclip-inspect`` and everything that takes a single scan read it here, so that
none of them believes what another holds back.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ctclip.data import chest
from ctclip.data.problems import Note, VolumeError
from ctclip.data.table import ClaimedSpacing
from ctclip.data.volume import Volume
from ctclip.data.volume import read as read_volume

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """A scan that could be read, and whether it may be used."""

    volume: Volume
    held: tuple[Note, ...]
    """Why it is held back; empty where it may be used."""

    chest: chest.ChestCheck | None
    """None where it is held back: lungs are found by their HU."""

    @property
    def notes(self) -> list[Note]:
        """What was applied or noticed, by the reader and by the look for a chest."""
        return self.volume.notes + list(self.chest.notes if self.chest else ())

    @property
    def warnings(self) -> list[Note]:
        """What a user who goes on with the scan has to know."""
        return [note for note in self.notes if note.level in ("warn", "hold")]


def look(
    path: str | Path,
    *,
    accept: Iterable[str] = (),
    rescale: tuple[float, float] | None = None,
    spacing_mm: ClaimedSpacing | None = None,
    series: str | None = None,
) -> Checked:
    """Read a scan and judge it; whether it is used is the caller's decision.

    Args:
        path: As :func:`ctclip.data.volume.read` takes it; ``rescale``, ``spacing_mm`` and
            ``series`` too.
        accept: Codes of notes that hold a scan back ("8-bit", "hu-offset", …) and that the user
            accepts.
        rescale: Slope and intercept, applied only if the file does not hold HU.
        spacing_mm: Spacing (D, H, W) that a table claims, None where it doesn't say.
        series: SeriesInstanceUID to take from a DICOM folder.

    Raises:
        VolumeError: If the scan can't be read; ``code`` is a stable reason.
        FileNotFoundError: If there is nothing at ``path``.
    """
    accepted = {accept} if isinstance(accept, str) else set(accept)
    found = read_volume(path, rescale=rescale, spacing_mm=spacing_mm, series=series)
    held = tuple(n for n in found.notes if n.level == "hold" and n.code not in accepted)
    return Checked(found, held, None if held else chest.check(found))


def read(
    path: str | Path,
    *,
    accept: Iterable[str] = (),
    rescale: tuple[float, float] | None = None,
) -> Volume:
    """Read a scan that is to be used, and log what is odd about it as warnings.

    Args:
        path: As :func:`ctclip.data.volume.read` takes it.
        accept: Codes of notes that would hold the scan back and that the user accepts.
        rescale: Slope and intercept, applied only if the file does not hold HU.

    Raises:
        VolumeError: If the scan can't be read, or is held back: its values are not HU. ``code``
            is the reason, and the message says how to go on.
        FileNotFoundError: If there is nothing at ``path``.
    """
    found = look(path, accept=accept, rescale=rescale)
    for note in found.held:
        how = f"{note.text}; {note.advice} (in Python rescale=, accept=)"
        raise VolumeError(path, note.code, how)
    for note in found.warnings:
        logger.warning("%s: %s [%s]", path, note.text, note.code)
    return found.volume
