"""A prepared cohort on disk: its records, and fast access to their voxels."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ctclip import config as configs
from ctclip.data import storage
from ctclip.data.manifest import VolumeRecord
from ctclip.data.table import read_table
from ctclip.data.volume import VolumeConfig
from ctclip.findings import FINDINGS

COLUMNS = ("patient_id", "study_id", "volume_id", "split", "path", "findings", "impression")


class CorruptVolumeError(ValueError):
    """A cached volume whose bytes do not match their checksum."""


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
        """Open what ``prepare`` wrote.

        Args:
            path: ``<out>/<fingerprint>``, or ``<out>`` if it holds one cohort only.

        Raises:
            FileNotFoundError: If there is no finished cohort.
            ValueError: If ``path`` holds several, or volumes of another preprocessing.
        """
        path = _find(Path(path))
        config = configs.load(VolumeConfig, path / "recipe.yaml")
        if config.fingerprint() != path.name:
            raise ValueError(
                f"{path} was prepared by another version of the preprocessing (now "
                f"{config.fingerprint()}); run ctclip-prepare again"
            )
        table = read_table(path / "manifest.csv")
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
            ``volume_config.size`` int16 HU.

        Raises:
            FileNotFoundError: If the cohort has no such volume.
            CorruptVolumeError: If its bytes have changed since they were written.
        """
        return storage.decompress(self.frame(volume_id))

    def frame(self, volume_id: str) -> bytes:
        """One volume as compressed bytes, checksum verified; raises as :meth:`read` does."""
        if self.store is None:
            where = str(self._file(volume_id))
            frame = self._file(volume_id).read_bytes()
        else:
            self._check_known(volume_id)
            where = volume_id
            frame = self.store.frame(volume_id)
        if storage.checksum(frame) != self.checksums[volume_id]:
            raise CorruptVolumeError(
                f"{where} is damaged: its checksum differs; delete it and run ctclip-prepare"
            )
        return frame

    def stored_in(self, store: "FrameStore") -> "PreparedCohort":
        """The same cohort with its frames elsewhere."""
        return replace(self, store=store)

    def read_crop(self, volume_id: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """A box of one volume; only the chunks that it touches are read and decompressed.

        Args:
            volume_id: Which volume.
            start: First voxel (d, h, w).
            size: Voxels (d, h, w).

        Returns:
            int16 HU; the checksum is not verified, which would need the whole file.
        """
        import blosc2

        if self.store is None:
            array = blosc2.open(str(self._file(volume_id)), mode="r")
        else:
            array = blosc2.ndarray_from_cframe(self.frame(volume_id))
        return array[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]

    def _file(self, volume_id: str) -> Path:
        self._check_known(volume_id)
        return self.path / "volumes" / f"{volume_id}.b2nd"

    def _check_known(self, volume_id: str) -> None:
        if volume_id not in self.checksums:
            raise FileNotFoundError(
                f"no prepared volume for {volume_id!r} in {self.path}; its ledger.csv tells why, "
                "or run ctclip-prepare"
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


def _find(path: Path) -> Path:
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
