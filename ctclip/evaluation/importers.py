"""Other people's score files become score tables.

* ctclip's own tables (``.parquet``, long ``.csv``);
* CT-CLIP's ``predicted_weights.npz`` with ``labels_weights.npz`` and ``accessions.txt``;
* wide CSVs: one row per volume, one column per finding, labels in a second file of that shape.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from ctclip.evaluation.protocols import Protocol, any_positive
from ctclip.evaluation.scores import (
    COLUMNS,
    KEY_COLUMNS,
    SAY_WHOSE,
    ScoreTable,
    ScoreTableError,
    read_csv,
)
from ctclip.findings import FINDINGS

CT_RATE_NAME = re.compile(r"(?P<patient>(?P<split>train|valid)_\d+)_(?P<scan>[a-z]+)_\d+")
"""split_patient_scan_reconstruction, for example ``valid_53_a_1``."""

ID_COLUMNS = ("volume_id", "VolumeName", "volume", "accession", "recon", "NoteAcc_DEID", "id")


def load(
    path: str | Path, labels: str | Path | None = None, protocol: Protocol | None = None
) -> ScoreTable:
    """Read a score file of any supported kind.

    Args:
        path: ``.parquet``, ``.csv``, CT-CLIP's ``predicted_weights.npz`` or its folder.
        labels: Wide CSV of labels, for a wide CSV of scores.
        protocol: Whose label columns to read; without one, the findings' own names.

    Raises:
        FileNotFoundError: If a file is missing.
        ScoreTableError: If the file is none of these.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".npz":
        return ct_clip(path if path.is_dir() else path.parent)
    if path.suffix == ".csv" and path.is_file():
        head = read_csv(path, nrows=0, comment="#").columns
        if not {"finding", "label", "score"} & set(head):
            if labels is None:
                raise ScoreTableError(
                    f"{path} is no long score table ({', '.join(COLUMNS)}), its columns are "
                    f"{', '.join(map(str, head[:4]))} ...; for a wide one (a column per finding) "
                    "give its labels too: --labels labels.csv"
                )
            return wide(path, labels, protocol)
    return ScoreTable.load(path)


def ct_clip(folder: str | Path) -> ScoreTable:
    """CT-CLIP's inference output: three files with the rows in the same order.

    ``accessions.txt`` names the volumes. Without it the patients are unknown; every row then
    counts as a patient of its own, which makes intervals too narrow, and a warning says so.

    Raises:
        FileNotFoundError: If the scores or labels are missing.
        ScoreTableError: If the files disagree.
    """
    folder = Path(folder)
    arrays = {}
    for name in ("predicted_weights", "labels_weights"):
        path = folder / f"{name}.npz"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; CT-CLIP's inference writes it into its results")
        with np.load(path) as archive:
            arrays[name] = np.asarray(archive["data"], dtype=np.float64)
    scores, labels = arrays["predicted_weights"], arrays["labels_weights"]
    if scores.shape != labels.shape or scores.shape[1:] != (len(FINDINGS),):
        raise ScoreTableError(
            f"{folder}: scores are {scores.shape}, labels {labels.shape}; "
            f"expected (N, {len(FINDINGS)}) for both"
        )
    notes: list[str] = []
    listing = folder / "accessions.txt"
    if listing.is_file():
        names = [line.strip() for line in listing.read_text("utf-8").splitlines() if line.strip()]
        if len(names) != len(scores):
            raise ScoreTableError(f"{listing} has {len(names)} names for {len(scores)} rows")
    else:
        notes.append(f"{folder} has no accessions.txt: every row counts as a patient of its own.")
        names = [f"row-{row:05d}" for row in range(len(scores))]
    header = {"model": folder.name, "source": "CT-CLIP"}
    return _table(names, FINDINGS, labels, scores, header).noting(*notes)


def wide(scores: str | Path, labels: str | Path, protocol: Protocol | None = None) -> ScoreTable:
    """A wide CSV of scores beside a wide CSV of labels, matched by volume.

    Args:
        scores: An id column and one column per finding, by its CT-RATE name.
        labels: An id column and label columns (1, 0, empty); volumes without scores are dropped.
        protocol: Gives the label columns of each finding where a cohort names them differently;
            its findings are then scored finding by finding.

    Raises:
        FileNotFoundError: If a file is missing.
        ScoreTableError: If columns are missing or no volume is in both.
    """
    score_frame, label_frame = _wide_frame(scores), _wide_frame(labels)
    findings = [finding for finding in FINDINGS if finding in score_frame.columns]
    if not findings:
        raise ScoreTableError(f"{scores}: none of the findings' names is a column")
    common = [volume for volume in score_frame.index if volume in label_frame.index]
    if not common:
        raise ScoreTableError(
            f"{scores} and {labels} have no volume in common; they start with "
            f"{score_frame.index[0]!r} and {label_frame.index[0]!r}"
        )
    notes = []
    known = {*FINDINGS, *ID_COLUMNS, *KEY_COLUMNS}
    strangers = [name for name in score_frame.columns if name not in known]
    if strangers:
        notes.append(f"{scores}: {_listed(strangers, FINDINGS)} name no finding and are left out.")
    for kept, dropped, path in (("scores", "labels", labels), ("labels", "scores", scores)):
        frame = score_frame if kept == "scores" else label_frame
        if len(common) < len(frame):
            notes.append(
                f"{len(frame) - len(common)} of {len(frame)} volumes with {kept} have no {dropped} "
                f"in {path} and are left out."
            )
    sources: dict[str, tuple[str, ...]] = {finding: (finding,) for finding in FINDINGS}
    if protocol is not None:
        for entry in protocol.findings:
            sources |= dict.fromkeys(entry.scores, entry.labels)
            sources.setdefault(entry.name, entry.labels)
    matrix = []
    for finding in findings:
        columns = [column for column in sources[finding] if column in label_frame.columns]
        if len(columns) < len(sources[finding]):
            missing = sorted(set(sources[finding]) - set(columns))
            named = _listed(missing, label_frame.columns)
            notes.append(f"{labels}: no label column {named}; {finding} stays unknown.")
            matrix.append(np.full(len(common), np.nan))
            continue
        values = _numbers(label_frame.loc[common, columns], labels, "label")
        matrix.append(any_positive(values.T))
    numbers = _numbers(score_frame.loc[common, findings], scores, "score")
    header = {"model": Path(scores).stem, "source": str(scores), "labels": str(labels)}
    return _table(
        common, findings, np.stack(matrix, axis=1), numbers, header,
        label_frame.loc[common],
    ).noting(*notes)  # fmt: skip


def ct_rate_ids(volume_id: str) -> tuple[str, str, str]:
    """Study, patient and split of a CT-RATE volume; any other name is its own patient."""
    match = CT_RATE_NAME.fullmatch(volume_id)
    if match is None:
        return volume_id, volume_id, ""
    return f"{match['patient']}_{match['scan']}", match["patient"], match["split"]


def _wide_frame(path: str | Path) -> pd.DataFrame:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    frame = read_csv(path, dtype=dict.fromkeys((*ID_COLUMNS, *KEY_COLUMNS), str))
    names = [name for name in ID_COLUMNS if name in frame.columns]
    if not names:
        raise ScoreTableError(
            f"{path}: no column names the volume; expected one of {', '.join(ID_COLUMNS)}"
        )
    if frame[names[0]].isna().any():
        row = int(np.flatnonzero(frame[names[0]].isna())[0]) + 1
        raise ScoreTableError(f"{path} row {row}: {names[0]} is empty; name each volume")
    ids = frame[names[0]].str.replace(r"\.nii(\.gz)?$", "", regex=True)
    again = ids[ids.duplicated()]
    if len(again):
        raise ScoreTableError(f"{path}: volume {again.iloc[0]!r} comes more than once")
    return frame.set_index(ids)


def _listed(names: Sequence[str], known: Iterable[str]) -> str:
    """Column names in quotes, each with the known one that may be meant."""
    lower = {str(name).lower(): str(name) for name in known}
    words = []
    for name in names:
        key = str(name).lower()
        near = [
            lower[k] for k in (*get_close_matches(key, lower, 1), *lower) if key in k or k in key
        ]
        words.append(f"{str(name)!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return ", ".join(words)


def _numbers(frame: pd.DataFrame, path: str | Path, kind: Literal["label", "score"]) -> np.ndarray:
    """The cells of a wide table; what is no label or no score is refused by file, column, volume.

    Labels are checked here, before they are merged: -1 (uncertain) or 2 isn't "absent".
    """
    numbers = frame.apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    wrong = np.isinf(numbers) | (np.isnan(numbers) & frame.notna().to_numpy())
    if kind == "label":
        wrong |= ~np.isnan(numbers) & ~np.isin(numbers, (0.0, 1.0))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        expected = "1, 0 or empty (unknown)" if kind == "label" else "a finite number or empty"
        raise ScoreTableError(
            f"{path}: column {str(frame.columns[column])!r} of volume {str(frame.index[row])!r} is "
            f"{str(frame.iloc[row, column])!r}; a {kind} is {expected}"
        )
    return numbers


def _table(
    names: Sequence[str],
    findings: Sequence[str],
    labels: np.ndarray,
    scores: np.ndarray,
    header: dict[str, str],
    frame: pd.DataFrame | None = None,
) -> ScoreTable:
    ids = np.array([ct_rate_ids(name) for name in names], dtype=str).reshape(len(names), 3)
    keys = {"study_id": ids[:, 0], "patient_id": ids[:, 1], "split": ids[:, 2]}
    if frame is not None:  # the label file may say what the name doesn't
        for key in keys:
            if key in frame.columns:
                keys[key] = frame[key].fillna("").astype(str).to_numpy().astype(str)
    orphans = np.flatnonzero(np.char.strip(keys["patient_id"]) == "")
    if len(orphans):
        raise ScoreTableError(
            f"{header.get('labels', header['source'])}: patient_id is empty for {len(orphans)} of "
            f"{len(names)} volumes, first {str(names[orphans[0]])!r}; {SAY_WHOSE}"
        )
    return ScoreTable(
        volume_id=np.asarray(names, dtype=str),
        findings=tuple(findings),
        labels=labels,
        scores=scores,
        header=dict(header),
        study_id=keys["study_id"],
        patient_id=keys["patient_id"],
        split=keys["split"],
    )
