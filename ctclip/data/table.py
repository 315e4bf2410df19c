"""Strict reading of CSV and Parquet tables: every cell is text, every row knows its line.

pandas guesses: "NaN" becomes a float, a stray quote swallows a row, a Latin-1 byte kills the file
without naming it. Reports and labels deserve better, so tables are read as they are written.

A bad *table* raises: what is wrong with it (its encoding, its quotes, its columns, the values that
its labels use) puts every row in doubt. A bad *row* does not: it is kept apart with its line, ends
in the ledger, and takes its volume out of the cohort.
"""

import csv
import gzip
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctclip.data.problems import COPY_AGAIN, ManifestError, Problem

ClaimedSpacing = tuple[float | None, float | None, float | None]
"""Spacing (D, H, W) in mm as a table gives it, None where it doesn't say."""

MAX_SHOWN = 10
"""Errors listed in one message; the rest are counted."""


@dataclass(frozen=True)
class Row:
    """One row: its line in the file and its cells by column name, stripped."""

    line: int
    cells: dict[str, str]

    def get(self, column: str) -> str:
        """The cell, or the empty string where the table has no such column."""
        return self.cells.get(column, "")


@dataclass(frozen=True)
class Table:
    """A table as it stands in its file."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    malformed: tuple[Problem, ...] = ()
    """Rows whose cells can't be told apart, for the ledger."""

    def refused(self, row: Row, code: str, detail: str, volume_id: str = "") -> Problem:
        """The ledger's entry for a row that can't be used."""
        return Problem(f"{self.path}:{row.line}", "refused", code, detail, volume_id)

    def require(self, columns: Iterable[str]) -> None:
        """Check that columns exist.

        Raises:
            ManifestError: Naming what is missing, and the separator if that is the cause.
        """
        missing = [column for column in columns if column not in self.columns]
        if not missing:
            return
        hint = ""
        if len(self.columns) == 1 and any(mark in self.columns[0] for mark in ";\t|"):
            hint = "; the header is not separated by commas, save the table as a plain CSV"
        raise ManifestError(
            f"{self.path}: missing column {', '.join(missing)}; found "
            f"{', '.join(self.columns[:MAX_SHOWN])}{hint}"
        )


def read_table(path: Path) -> Table:
    """Read a ``.csv``, ``.csv.gz`` or ``.parquet`` file.

    Raises:
        ManifestError: If the file is empty, not UTF-8, has unbalanced quotes, repeated columns,
            or no rows.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no table at {path}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    data = path.read_bytes()
    if not data:
        raise ManifestError(f"{path}: the file is empty")
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise ManifestError(f"{path}: damaged gzip file: {error}; {COPY_AGAIN}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ManifestError(
            f"{path} line {line}: byte {data[error.start]:#x} is not UTF-8; save the table as UTF-8"
        ) from None
    if "\0" in text:
        raise ManifestError(f"{path}: holds zero bytes; not a text table")
    return _parse(path, text)


def _parse(path: Path, text: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        rows: list[Row] = []
        malformed: list[Problem] = []
        before = reader.line_num
        for cells in reader:
            line, before = before + 1, reader.line_num
            if not any(cells):
                continue
            if len(cells) == len(header):
                values = (cell.strip() for cell in cells)
                rows.append(Row(line, dict(zip(header, values, strict=True))))
                continue
            counted = f"{len(cells)} cells, the header has {len(header)}"
            if reader.line_num > line:
                raise ManifestError(
                    f"{path} line {line}: {counted}, up to line {reader.line_num}; an unbalanced "
                    "quote joins these lines"
                )
            detail = f"{counted}; an unquoted comma?"
            malformed.append(Problem(f"{path}:{line}", "refused", "malformed-row", detail))
    except csv.Error as error:
        raise ManifestError(
            f"{path} line {reader.line_num}: {error}; an unbalanced quote? Write a quote inside "
            'a cell as ""'
        ) from None
    if len(malformed) > len(rows):
        raise ManifestError(
            f"{malformed[0].path}: {malformed[0].detail} In all {len(malformed)} of "
            f"{len(malformed) + len(rows)} rows do not fit the header"
        )
    return _checked(path, header, rows, malformed)


def _read_parquet(path: Path) -> Table:
    import pandas
    import pyarrow

    try:
        frame = pandas.read_parquet(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ManifestError(f"{path}: not a readable Parquet file: {error}") from None
    columns = [str(column) for column in frame.columns]
    rows = [
        Row(number, dict(zip(columns, map(_cell, values), strict=True)))
        for number, values in enumerate(frame.itertuples(index=False), start=1)
    ]
    return _checked(path, columns, rows)


def _cell(value: object) -> str:
    """A Parquet cell as a CSV would spell it: missing is empty, 1.0 is 1."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _checked(
    path: Path, header: list[str], rows: list[Row], malformed: Sequence[Problem] = ()
) -> Table:
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise ManifestError(f"{path}: column {', '.join(repeated)} appears more than once")
    if not rows:
        raise ManifestError(f"{path}: a header without rows")
    return Table(path, tuple(header), tuple(rows), tuple(malformed))


def raise_all(path: Path, errors: list[str]) -> None:
    """Report every bad value at once, so that a table is repaired in one go.

    Raises:
        ManifestError: If there are any errors.
    """
    if errors:
        more = f"\n  and {len(errors) - MAX_SHOWN} more" if len(errors) > MAX_SHOWN else ""
        shown = "\n  ".join(errors[:MAX_SHOWN])
        raise ManifestError(f"{path}: {len(errors)} bad value(s)\n  {shown}{more}")
