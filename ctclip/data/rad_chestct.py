"""RAD-ChestCT: its ``.npz`` volumes, and its label tables mapped to the findings by data.

A volume is int16 HU under the key ``ct``, resampled to 0.8 mm by its authors; the file says nothing
of orientation. The bounding-box table of the release names axis 0 superior to inferior, axis 1
anterior to posterior and axis 2 right to left. Which of its abnormalities make up which finding is
in ``data/rad_chestct.yaml``, in three variants.
"""

import zipfile
import zlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import yaml

from ctclip.data.manifest import Split, VolumeRecord, volume_stem
from ctclip.data.nifti import BOMB_BYTES, CHUNK, MAX_INFLATION, MAX_VOXELS, StoredVolume
from ctclip.data.problems import COPY_AGAIN, ManifestError, Note, Problem, VolumeError
from ctclip.data.table import Row, Table, not_used, raise_all, read_table, tables_in

Variant = Literal["located", "16", "15"]

SPACING_MM = 0.8
"""Isotropic; Draelos et al. 2021."""

SPLITS: dict[str, Split] = {"trn": "train", "val": "valid", "tst": "test"}
"""First letters of a volume's name."""

KEY = "ct"

PROMISING = ("NoteAcc_DEID", "MRN_DEID", "nodule*", "opacity*", "calcification*")
"""A table with two such columns was meant to be used."""

EXPECTED = "a CSV with NoteAcc_DEID and columns like nodule*lung"


def read(path: Path, *, max_voxels: int = MAX_VOXELS) -> StoredVolume:
    """Read one ``.npz`` volume, judging its header before memory is taken.

    Raises:
        VolumeError: If the file is damaged or holds no 3-D array named ``ct``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{KEY}.npy" not in archive.namelist():
                names = ", ".join(archive.namelist()[:5])
                raise VolumeError(path, "no-array", f"expected an array {KEY!r}, found {names}")
            with archive.open(f"{KEY}.npy") as stream:
                version = np.lib.format.read_magic(stream)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = header(stream)
                _check(path, shape, dtype, max_voxels)
                data = np.empty(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
                filled = 0
                view = memoryview(data)  # type: ignore[arg-type]
                while filled < len(data) and (piece := stream.read(CHUNK)):
                    view[filled : filled + len(piece)] = piece[: len(data) - filled]
                    filled += len(piece)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        if isinstance(error, VolumeError):
            raise
        detail = f"damaged .npz file: {error}; {COPY_AGAIN}"
        raise VolumeError(path, "corrupt-npz", detail) from None
    if filled < len(data):
        detail = f"voxels: expected {len(data)} bytes, got {filled}; {COPY_AGAIN}"
        raise VolumeError(path, "truncated", detail)
    voxels = data.view(dtype).reshape(shape, order="F" if fortran else "C")
    affine = np.array(
        [
            [0.0, 0.0, -SPACING_MM, 0.0],
            [0.0, -SPACING_MM, 0.0, 0.0],
            [-SPACING_MM, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 1.0],
        ]
    )
    note = Note("assumed-grid", "no header: taken as RAD-ChestCT's IPL axes at 0.8 mm")
    return StoredVolume(voxels, affine, notes=[note])


def _check(path: Path, shape: tuple[int, ...], dtype: np.dtype, max_voxels: int) -> None:
    if len(shape) != 3:
        raise VolumeError(path, "not-3d", f"expected one 3-D volume, got {shape}")
    if min(shape) <= 0:
        raise VolumeError(path, "bad-dimensions", f"dimensions {shape} are not all positive")
    if dtype.kind not in "iuf":
        raise VolumeError(path, "not-scalar", f"{dtype} voxels are not a CT")
    num_voxels = shape[0] * shape[1] * shape[2]
    if num_voxels > max_voxels:
        raise VolumeError(
            path, "too-large", f"header asks for {num_voxels:.3g} voxels, limit {max_voxels:.3g}"
        )
    num_bytes = num_voxels * dtype.itemsize
    if num_bytes > BOMB_BYTES and num_bytes > MAX_INFLATION * path.stat().st_size:
        raise VolumeError(path, "inflation", "inflates more than a CT's noise allows")


def read_rad_chestct(
    root: str | Path, variant: Variant = "located"
) -> tuple[list[VolumeRecord], list[Problem]]:
    """Read a folder with RAD-ChestCT's volumes and tables, at any depth.

    Args:
        root: Searched for ``*.npz`` and for CSVs with a column ``NoteAcc_DEID``.
        variant: How abnormalities are mapped to findings: ``located`` (all 18, calcifications told
            apart by location), ``16`` and ``15`` (as published elsewhere).

    Returns:
        One record per volume on disk, without reports (the release has none), and problems.

    Raises:
        ManifestError: If there are no volumes or no label table, or a table is malformed.
    """
    if variant not in get_args(Variant):
        raise ManifestError(f"variant {variant!r}; expected {', '.join(get_args(Variant))}")
    root = Path(root)
    labels: dict[str, dict[str, float]] = {}
    patients: dict[str, str] = {}
    problems: list[Problem] = []
    for path in tables_in(root, (".csv", ".csv.gz")):
        table = read_table(path)
        if "NoteAcc_DEID" not in table.columns:
            problems.append(not_used(table, "label", PROMISING, EXPECTED))
            continue
        problems += table.malformed
        if "MRN_DEID" in table.columns:
            patients |= {row.cells["NoteAcc_DEID"]: row.cells["MRN_DEID"] for row in table.rows}
        elif any("*" in column for column in table.columns):
            labels |= _labels(table, variant)
        else:
            problems.append(not_used(table, "label", (), EXPECTED))
    volumes = {volume_stem(path.name): path for path in sorted(root.rglob("*.npz"))}
    if not volumes or not labels:
        raise ManifestError(
            f"{root}: found {len(volumes)} volumes and {len(labels)} label rows; expected files "
            f"like trn00001.npz, and {EXPECTED}"
        )
    records = []
    for name in sorted(labels.keys() - volumes.keys()):
        detail = "in the label table, but there is no such volume"
        problems.append(Problem(str(root), "refused", "missing-file", detail, name))
    for name, path in volumes.items():
        split = SPLITS.get(name[:3])
        if split is None:
            detail = "not named like a RAD-ChestCT volume (trn00001)"
            problems.append(Problem(str(path), "refused", "unknown-name", detail, name))
            continue
        if name not in labels:
            detail = "no row in the label table"
            problems.append(Problem(str(path), "warned", "no-labels", detail, name))
        records.append(
            VolumeRecord(
                volume_id=name,
                study_id=name,
                patient_id=patients.get(name, name),
                split=split,
                path=path,
                labels=labels.get(name, {}),
            )
        )
    return records, problems


def _labels(table: Table, variant: Variant) -> dict[str, dict[str, float]]:
    columns = {finding: _columns(table, rule) for finding, rule in _mapping()[variant].items()}
    errors: list[str] = []
    labels = {}
    for row in table.rows:
        labels[row.cells["NoteAcc_DEID"]] = {
            finding: float(any(_is_one(row, column, errors) for column in members))
            for finding, members in columns.items()
        }
    raise_all(table.path, errors)
    return labels


def _columns(table: Table, rule: dict[str, list[str]]) -> list[str]:
    """The table's columns that make up one finding."""
    found = []
    for location, abnormalities in rule.items():
        for abnormality in abnormalities:
            members = [
                column
                for column in table.columns
                if column.startswith(f"{abnormality}*")
                and location in ("any", column.split("*", 1)[1])
            ]
            if not members:
                raise ManifestError(
                    f"{table.path}: no column {abnormality}*{location}; is this the original table?"
                )
            found += members
    return found


def _is_one(row: Row, column: str, errors: list[str]) -> bool:
    cell = row.cells[column]
    if cell not in ("0", "1", "0.0", "1.0"):
        errors.append(f"line {row.line}: {column} is {cell!r}; expected 0 or 1")
    return cell in ("1", "1.0")


@cache
def _mapping() -> dict[str, dict[str, dict[str, list[str]]]]:
    text = resources.files("ctclip.data").joinpath("data/rad_chestct.yaml").read_text("utf-8")
    return yaml.safe_load(text)["variants"]
