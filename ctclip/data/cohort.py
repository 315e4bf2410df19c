"""A prepared cohort on disk: its records, and fast access to their voxels."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ctclip import config as configs
from ctclip.data import storage
from ctclip.data.manifest import VolumeRecord
from ctclip.data.problems import Problem, VolumeError
from ctclip.data.table import read_table
from ctclip.data.volume import VolumeConfig
from ctclip.findings import FINDINGS

COLUMNS = ("patient_id", "study_id", "volume_id", "split", "path", "findings", "impression")


class CorruptVolumeError(VolumeError):
    """A prepared volume that was damaged or lost afterwards.

    ``code`` is ``damaged-cache`` where its bytes don't match their checksum, ``missing-cache``
    where its file is gone, and ``unreadable-cache`` where the storage fails.
    """


UNREADABLE = "unreadable_volumes.jsonl"
"""In the folder of a run: the prepared volumes that it could not read."""


def note_unreadable(folder: Path, volume_id: str, error: CorruptVolumeError) -> None:
    """Add a volume to ``unreadable_volumes.jsonl``, in the ledger's columns."""
    folder.mkdir(parents=True, exist_ok=True)
    problem = Problem(str(error.path), "refused", error.code, error.detail, volume_id)
    with (folder / UNREADABLE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(problem)) + "\n")


class FrameStore(Protocol):
    """Anything that can fetch a volume's compressed bytes."""

    def frame(self, volume_id: str) -> bytes:
        """The frame that was written for this volume."""
        ...


@dataclass(frozen=True)
class PreparedCohort:
    """A prepared cohort: only volumes that may reach a batch."""

    path: Path
    volume_config: VolumeConfig
    records: list[VolumeRecord]
    """Usable volumes in the manifest's order."""

    checksums: dict[str, int]
    """CRC-32 of each volume's compressed frame."""

    store: "FrameStore | None" = None
    """Where frames lie, if not in files under ``path``."""

    @classmethod
    def open(cls, path: str | Path) -> "PreparedCohort":
        """Open what ``prepare`` or ``pack`` wrote.

        Args:
            path: ``<out>/<fingerprint>``, or ``<out>`` if it holds one cohort only, or the URL of
                a packed one.

        Raises:
            FileNotFoundError: If there is no finished cohort.
            ValueError: If ``path`` holds several, or volumes of another preprocessing.
        """
        url = _url(path)
        if url is not None:
            from ctclip.data.shards import open_packed

            return open_packed(url)
        path = find_cohort(Path(path))
        config = configs.load(VolumeConfig, path / "recipe.yaml")
        if config.fingerprint() != path.name:
            raise ValueError(
                f"{path} was prepared by another version of the preprocessing (now "
                f"{config.fingerprint()}); run ctclip-prepare again"
            )
        table = read_table(path / "manifest.csv")
        if table.malformed:
            raise ValueError(f"{table.malformed[0].path} is damaged; run ctclip-prepare again")
        records = [_from_row(row.cells) for row in table.rows]
        checksums = {row.cells["volume_id"]: int(row.cells["crc32"]) for row in table.rows}
        return cls(path, config, records, checksums)

    @property
    def fingerprint(self) -> str:
        """Of the preprocessing; volumes under equal fingerprints are interchangeable."""
        return self.path.name

    @cached_property
    def study_index(self) -> dict[str, int]:
        """A number per study, unique in the cohort."""
        return {name: i for i, name in enumerate(sorted({r.study_id for r in self.records}))}

    def split(self, name: str) -> list[VolumeRecord]:
        """The records of one split.

        Raises:
            ValueError: If the cohort has no volume in that split.
        """
        chosen = [record for record in self.records if record.split == name]
        if not chosen:
            known = ", ".join(sorted({record.split for record in self.records}))
            raise ValueError(f"{self.path} has no volume in split {name!r}; it has {known}")
        return chosen

    def read(self, volume_id: str) -> np.ndarray:
        """One whole volume, checksum verified.

        Returns:
            ``volume_config.size`` HU: int16, with CT-CLIP's recipes float32.

        Raises:
            FileNotFoundError: If the cohort has no such volume.
            CorruptVolumeError: If it was damaged or lost since it was written.
        """
        return storage.decompress(self.frame(volume_id))

    def frame(self, volume_id: str) -> bytes:
        """One volume as compressed bytes, checksum verified; raises as :meth:`read` does."""
        with self._explained(volume_id) as where:
            frame = where.read_bytes() if self.store is None else self.store.frame(volume_id)
        if storage.checksum(frame) != self.checksums[volume_id]:
            raise self._damaged(where)
        return frame

    def stored_in(self, store: "FrameStore", path: Path) -> "PreparedCohort":
        """The same cohort with its frames elsewhere; ``path`` is what messages call it."""
        return replace(self, store=store, path=path)

    def read_crop(self, volume_id: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """A box of one volume; only the chunks that it touches are read and decompressed.

        Args:
            volume_id: Which volume.
            start: First voxel (d, h, w).
            size: Voxels (d, h, w).

        Returns:
            HU, as :meth:`read`.

        Raises:
            FileNotFoundError: If the cohort has no such volume.
            CorruptVolumeError: If it was damaged or lost; of a file, the chunks that are read are
                verified, of a shard the whole frame.
        """
        if self.store is not None:
            return storage.read_box(self.frame(volume_id), start, size)
        with self._explained(volume_id) as where:
            try:
                return storage.read_box(where, start, size)
            except storage.DamagedFrameError:
                raise self._damaged(where) from None

    @contextmanager
    def _explained(self, volume_id: str) -> Iterator[Path]:
        """Where a volume's bytes lie; what the storage can't give becomes a stated reason."""
        if volume_id not in self.checksums:
            raise FileNotFoundError(
                f"no prepared volume for {volume_id!r} in {self.path}; its ledger.csv tells why, "
                "or run ctclip-prepare"
            )
        where = self.path / "volumes" / f"{volume_id}.b2nd"
        try:
            yield where
        except FileNotFoundError:
            detail = "the prepared volume is gone; run ctclip-prepare again"
            raise CorruptVolumeError(where, "missing-cache", detail) from None
        except OSError as error:
            raise CorruptVolumeError(where, "unreadable-cache", str(error)) from None

    @staticmethod
    def _damaged(where: Path) -> CorruptVolumeError:
        return CorruptVolumeError(
            where,
            "damaged-cache",
            "the prepared volume is damaged, its checksum differs; delete it and run "
            "ctclip-prepare again",
        )


def write_cohort_manifest(
    folder: Path, records: Sequence[VolumeRecord], outcomes: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the table that :meth:`PreparedCohort.open` reads."""
    meta = sorted({key for record in records for key in record.meta})
    rows = []
    for record in records:
        row: dict[str, Any] = {column: getattr(record, column) or "" for column in COLUMNS}
        row["path"] = os.path.abspath(record.path) if record.path else ""
        row["crc32"] = outcomes[record.volume_id]["crc32"]
        row |= {
            name: "" if math.isnan(value) else int(value)
            for name, value in zip(FINDINGS, record.label_row(), strict=True)
        }
        row |= {f"meta_{key}": record.meta.get(key, "") for key in meta}
        rows.append(row)
    columns = [*COLUMNS, "crc32", *FINDINGS, *(f"meta_{key}" for key in meta)]
    storage.write_csv(folder, "manifest.csv", columns, rows)


def _from_row(cells: dict[str, str]) -> VolumeRecord:
    return VolumeRecord(
        volume_id=cells["volume_id"],
        study_id=cells["study_id"],
        patient_id=cells["patient_id"],
        split=cells["split"],  # type: ignore[arg-type]
        path=Path(cells["path"]) if cells["path"] else None,
        findings=cells["findings"] or None,
        impression=cells["impression"] or None,
        labels={name: float(cells[name]) if cells[name] else math.nan for name in FINDINGS},
        meta={
            column.removeprefix("meta_"): value
            for column, value in cells.items()
            if column.startswith("meta_") and value
        },
    )


def _url(path: str | Path) -> str | None:
    """The fsspec URL that a path is, also where a ``Path`` has swallowed its slashes."""
    match = re.fullmatch(r"([a-z][a-z0-9+.-]+):/+(.*)", str(path))
    if match is None:
        return None
    scheme, rest = match.groups()
    return f"{scheme}:///{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"


def find_cohort(path: Path) -> Path:
    """The folder of a prepared cohort: this one, or the only one in it.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    if (path / "recipe.yaml").exists() and (path / "manifest.csv").exists():
        return path.resolve()
    found = sorted(file.parent for file in path.glob("*/manifest.csv"))
    found = [folder for folder in found if (folder / "recipe.yaml").exists()]
    if len(found) == 1:
        return found[0].resolve()
    if found:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(f"{path} holds several prepared cohorts ({names}); name one")
    raise FileNotFoundError(f"no prepared cohort in {path}; run ctclip-prepare")
