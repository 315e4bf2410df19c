"""ScoreTable: the one input of every analysis, whoever's model made the scores.

In memory it is wide (``N`` cases x ``K`` findings); on disk it is long, one row per case and
finding, so that it can be read without this package. Its header says which model, which
preprocessing, which prompts and which protocol stand behind the numbers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

FORMAT_VERSION = 1
HEADER_KEY = b"ctclip.scores"
CSV_MARK = "# ctclip-scores "
META_PREFIX = "meta_"
KEY_COLUMNS = ("volume_id", "study_id", "patient_id", "split")
NOTES = "notes"
"""Key of the header: sentences on what reading or a protocol did to the table."""

SAY_WHOSE = (
    "intervals resample patients, so say whose volume it is; if all patients are different, repeat "
    "the volume_id"
)
COLUMNS = (*KEY_COLUMNS, "finding", "label", "score")


class ScoreTableError(ValueError):
    """A score table that can't be used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreTable:
    """Scores and labels of ``N`` cases for ``K`` findings.

    A case is a volume until a protocol pools reconstructions into studies or patients; then
    ``volume_id`` holds the pooled unit's name.
    """

    volume_id: np.ndarray
    """``(N,)`` strings, unique."""

    study_id: np.ndarray
    patient_id: np.ndarray
    split: np.ndarray
    findings: tuple[str, ...]
    labels: np.ndarray
    """``(N, K)`` float: 1, 0 or nan for unknown."""

    scores: np.ndarray
    """``(N, K)`` float, higher = more likely present; nan = not scored."""

    header: dict[str, Any] = field(default_factory=dict)
    """``model, checkpoint, fingerprint, prompts, score, protocol`` as far as they are known."""

    meta: dict[str, np.ndarray] = field(default_factory=dict)
    """Columns for subgroups (sex, age, kernel ...): ``(N,)`` strings, empty = unknown."""

    def __post_init__(self) -> None:
        shape = (len(self.volume_id), len(self.findings))
        for name in ("labels", "scores"):
            if getattr(self, name).shape != shape:
                raise ScoreTableError(f"{name} are {getattr(self, name).shape}, expected {shape}")
        for name, column in {**{k: getattr(self, k) for k in KEY_COLUMNS}, **self.meta}.items():
            if len(column) != shape[0]:
                raise ScoreTableError(f"{name} has {len(column)} rows, expected {shape[0]}")
        if len(set(self.findings)) != shape[1]:
            raise ScoreTableError(f"a finding comes twice in {list(self.findings)}")
        unique, counts = np.unique(self.volume_id, return_counts=True)
        if len(unique) != shape[0]:
            raise ScoreTableError(f"volume {str(unique[counts > 1][0])!r} comes more than once")
        wrong_label = ~np.isnan(self.labels) & ~np.isin(self.labels, (0.0, 1.0))
        for name, wrong, expected in (
            ("label", wrong_label, "1, 0 or empty (unknown)"),
            ("score", np.isinf(self.scores), "a finite number or empty"),
        ):
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                raise ScoreTableError(
                    f"volume {str(self.volume_id[row])!r}, {self.findings[column]}: {name} is "
                    f"{getattr(self, name + 's')[row, column]:g}, expected {expected}"
                )

    def __len__(self) -> int:
        return len(self.volume_id)

    @property
    def name(self) -> str:
        """What to call this model in a figure or a column."""
        return str(self.header.get("model", "model"))

    @property
    def split_name(self) -> str:
        """The split or splits of its rows, in words."""
        names = sorted(set(self.split.tolist()))
        return ", ".join(name or "not stated" for name in names)

    def noting(self, *notes: str) -> "ScoreTable":
        """The same table with sentences added to its header's notes."""
        if not notes:
            return self
        return replace(self, header=self.header | {NOTES: [*self.header.get(NOTES, []), *notes]})

    def rows(self, index: np.ndarray) -> "ScoreTable":
        """The given rows (indices or boolean mask), in the given order."""
        return replace(
            self,
            **{name: getattr(self, name)[index] for name in (*KEY_COLUMNS, "labels", "scores")},
            meta={name: column[index] for name, column in self.meta.items()},
        )

    def of_split(self, split: str) -> "ScoreTable":
        """The rows of one split.

        Raises:
            ScoreTableError: If there is none.
        """
        mask = self.split == split
        if not mask.any():
            raise ScoreTableError(
                f"no row of split {split!r}; the table has {sorted(set(self.split.tolist()))}"
            )
        return self.rows(mask)

    def of_findings(self, findings: Sequence[str]) -> "ScoreTable":
        """The columns of some findings, in the given order.

        Raises:
            ScoreTableError: If one isn't there.
        """
        missing = [finding for finding in findings if finding not in self.findings]
        if missing:
            raise ScoreTableError(f"no scores for {missing}; the table has {list(self.findings)}")
        columns = [self.findings.index(finding) for finding in findings]
        return replace(
            self,
            findings=tuple(findings),
            labels=self.labels[:, columns],
            scores=self.scores[:, columns],
        )

    def to_long(self) -> pd.DataFrame:
        """One row per case and finding, in the column order of the file format."""
        n, k = self.scores.shape
        columns = {name: np.repeat(getattr(self, name), k) for name in KEY_COLUMNS}
        columns["finding"] = np.tile(np.asarray(self.findings), n)
        columns["label"] = self.labels.reshape(-1)
        columns["score"] = self.scores.reshape(-1)
        columns.update({META_PREFIX + m: np.repeat(c, k) for m, c in self.meta.items()})
        return pd.DataFrame(columns)

    def save(self, path: str | Path) -> None:
        """Write ``.parquet`` or ``.csv``, atomically; the header travels inside the file.

        Raises:
            ScoreTableError: If the suffix is another.
        """
        path = Path(path)
        header = json.dumps({"version": FORMAT_VERSION, **self.header}, sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if path.suffix == ".parquet":
                import pyarrow as pa
                import pyarrow.parquet as pq

                table = pa.Table.from_pandas(self.to_long(), preserve_index=False)
                pq.write_table(
                    table.replace_schema_metadata({HEADER_KEY: header.encode()}),
                    temporary,
                    compression="zstd",
                )
            elif path.suffix == ".csv":
                with temporary.open("w", encoding="utf-8", newline="") as file:
                    file.write(CSV_MARK + header + "\n")
                    self.to_long().to_csv(file, index=False)
            else:
                raise ScoreTableError(f"{path}: a score table ends in .parquet or .csv")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "ScoreTable":
        """Read a table written by :meth:`save`, or a long table of that form without a header.

        Raises:
            FileNotFoundError: If there is no such file.
            ScoreTableError: If it isn't a score table.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no score table {path}; write one with: ctclip-zero-shot --ckpt <model> ..."
            )
        header: dict[str, Any] = {}
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                table = pq.read_table(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise ScoreTableError(f"{path} is not readable Parquet: {error}") from None
            if table.schema.metadata and HEADER_KEY in table.schema.metadata:
                header = _header(table.schema.metadata[HEADER_KEY].decode(), path)
            frame = table.replace_schema_metadata(None).to_pandas()
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", errors="replace") as file:
                first = file.readline()
            if first.startswith(CSV_MARK):
                header = _header(first.removeprefix(CSV_MARK), path)
            frame = read_csv(
                path,
                skiprows=1 if header else 0,
                dtype=dict.fromkeys((*KEY_COLUMNS, "finding"), str),
                keep_default_na=False,
                na_values={"label": [""], "score": [""]},
            )
        else:
            raise ScoreTableError(f"{path}: a score table ends in .parquet or .csv")
        version = header.pop("version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise ScoreTableError(
                f"{path} has format version {version}, this ctclip reads up to {FORMAT_VERSION}; "
                "update ctclip"
            )
        header.setdefault("model", path.stem)
        return from_long(frame, header, source=str(path))


def from_long(frame: pd.DataFrame, header: Mapping[str, Any], source: str = "table") -> ScoreTable:
    """Pivot a long table.

    Raises:
        ScoreTableError: If a column is missing, a row has no volume or no patient, a pair of case
            and finding comes twice, or a volume belongs to two patients.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise ScoreTableError(
            f"{source}: column {', '.join(map(repr, missing))} is missing; a score table has "
            f"{', '.join(COLUMNS)}"
        )
    if frame.empty:
        raise ScoreTableError(f"{source}: the table has no rows")
    for name, advice in (("volume_id", "name each volume"), ("patient_id", SAY_WHOSE)):
        empty = frame[name].isna() | (frame[name].astype(str).str.strip() == "")
        if empty.any():
            raise ScoreTableError(
                f"{source}: {name} is empty in {int(empty.sum())} of {len(frame)} rows, first in "
                f"row {int(np.flatnonzero(empty)[0]) + 1}; {advice}"
            )
    row, volumes = pd.factorize(frame["volume_id"].astype(str))
    column, findings = pd.factorize(frame["finding"].astype(str))
    cell = row * len(findings) + column
    if len(np.unique(cell)) != len(cell):
        again = frame.iloc[int(np.flatnonzero(pd.Series(cell).duplicated())[0])]
        raise ScoreTableError(
            f"{source}: volume {again['volume_id']!r} has two rows for {again['finding']!r}"
        )
    values = {}
    for name in ("label", "score"):
        numbers = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64)
        bad = np.isnan(numbers) & frame[name].notna().to_numpy()
        if bad.any():
            raise ScoreTableError(
                f"{source} row {int(np.flatnonzero(bad)[0]) + 1}: {name} is "
                f"{frame[name].iloc[int(np.flatnonzero(bad)[0])]!r}, expected a number or empty"
            )
        matrix = np.full((len(volumes), len(findings)), np.nan)
        matrix[row, column] = numbers
        values[name] = matrix
    first = np.unique(row, return_index=True)[1]
    keys = {}
    meta_columns = [name for name in frame.columns if str(name).startswith(META_PREFIX)]
    for name in (*KEY_COLUMNS[1:], *meta_columns):
        text = frame[name].fillna("").astype(str).to_numpy().astype(str)
        keys[name] = text[first]
        changed = text != keys[name][row]
        if changed.any():
            raise ScoreTableError(
                f"{source}: volume {volumes[row[changed][0]]!r} has two values of {name}: "
                f"{str(keys[name][row[changed][0]])!r} and {str(text[changed][0])!r}"
            )
    try:
        return ScoreTable(
            volume_id=np.asarray(volumes, dtype=str),
            study_id=keys["study_id"],
            patient_id=keys["patient_id"],
            split=keys["split"],
            findings=tuple(str(finding) for finding in findings),
            labels=values["label"],
            scores=values["score"],
            header=dict(header),
            meta={str(name).removeprefix(META_PREFIX): keys[name] for name in meta_columns},
        )
    except ScoreTableError as error:
        raise ScoreTableError(f"{source}: {error}") from None


def read_csv(path: str | Path, **options: Any) -> pd.DataFrame:
    """:func:`pandas.read_csv`, whose complaints name the file.

    Raises:
        ScoreTableError: If the file is empty, not UTF-8 or no table.
    """
    try:
        return pd.read_csv(path, encoding="utf-8-sig", **options)
    except pd.errors.EmptyDataError:
        raise ScoreTableError(f"{path} is empty; expected a line of column names") from None
    except UnicodeError:
        raise ScoreTableError(f"{path} is not text in UTF-8; save it as CSV UTF-8") from None
    except pd.errors.ParserError as error:
        raise ScoreTableError(f"{path} is no readable CSV: {str(error).strip()}") from None


def _header(text: str, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        header = error
    if not isinstance(header, dict):
        raise ScoreTableError(
            f"{path}: the header is no JSON object ({header}); write the table again, or delete "
            f"the line that starts with {CSV_MARK.strip()!r}"
        )
    return header
