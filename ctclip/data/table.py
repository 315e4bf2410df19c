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
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctclip.data.problems import COPY_AGAIN, ManifestError, Problem

ClaimedSpacing = tuple[float | None, float | None, float | None]
"""Spacing (D, H, W) in mm as a table gives it, None where it doesn't say."""

MANIFEST_COLUMNS = ("patient_id", "study_id", "path")
"""Required of the project's own manifest, which is told by them."""

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".parquet", ".xlsx", ".xls")
"""What a table's name ends in; those of Excel are named in messages and not read."""

OWN_RESULTS = {
    *("ledger", "auc", "calibration", "comparisons", "curve", "few_shot", "noise", "planted"),
    *("prompts", "review", "similar", "styles", "subgroups", "thresholds", "uncertain"),
    "verdicts",
}
"""Tables of results, by the stems of their names, that a user may have written beside scans."""

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
        if missing:
            raise ManifestError(
                f"{self.path}: missing column {', '.join(missing)}; found {self.header()}"
            )

    def header(self) -> str:
        """The first columns for a message, with the separator's name if that is what is wrong."""
        shown = ", ".join(column[:80] for column in self.columns[:MAX_SHOWN])
        if len(self.columns) == 1 and any(mark in self.columns[0] for mark in ";\t|"):
            shown += "; the header is not separated by commas, save the table as a plain CSV"
        return shown


def tables_in(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The tables below a folder, sorted; hidden files and what ctclip itself wrote are left out.

    A user may prepare into the folder of the scans and write results there: prepared cohorts,
    tables of embeddings and scores, and results are not a description of the scans.
    """
    found = (
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(suffixes) and not path.name.startswith(".")
    )
    return sorted(path for path in found if path.is_file() and not _is_own(path, folder))


def in_prepared_cohort(path: Path, folder: Path) -> bool:
    """Whether a file below ``folder`` belongs to a cohort that was prepared into it."""
    inner = path.relative_to(folder).parents
    return any((folder / parent / "recipe.yaml").is_file() for parent in inner if parent.name)


def _is_own(path: Path, folder: Path) -> bool:
    if in_prepared_cohort(path, folder):
        return True
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            metadata = parquet.read_schema(path).metadata or {}
        except (OSError, ValueError, pyarrow.ArrowException):
            return False
        return any(key.startswith(b"ctclip.") for key in metadata)
    if path.suffix != ".csv":
        return False
    with path.open("rb") as file:
        return path.stem in OWN_RESULTS or file.read(16).startswith(b"# ctclip-scores")


def read_table(path: Path) -> Table:
    """Read a ``.csv``, ``.csv.gz`` or ``.parquet`` file.

    Raises:
        ManifestError: If the file is empty, not UTF-8, has unbalanced quotes, repeated columns,
            or no rows.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no table at {path}")
    if path.suffix.lower() in (".xlsx", ".xls"):
        raise ManifestError(f"{path}: an Excel file; save the table as CSV (UTF-8, commas)")
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


def not_used(table: Table, meant: str, columns: Iterable[str], expected: str) -> Problem:
    """The ledger's entry for a table that a data set's reader has no use for.

    Args:
        table: The table.
        meant: A pattern of names that promise something, such as ``labels?``.
        columns: Columns of which two promise it too, however the header is separated.
        expected: What the reader knows, for the message.

    Raises:
        ManifestError: If its name or its header says that it was meant to be used.
    """
    header = " ".join(table.columns).lower()
    is_own = set(MANIFEST_COLUMNS) <= set(table.columns)
    is_named_so = re.search(meant, table.path.name, re.IGNORECASE) is not None
    num_promising = sum(column.lower() in header for column in columns)
    if (is_named_so or num_promising > 1) and not is_own:
        raise ManifestError(
            f"{table.path}: header not recognised; found {table.header()}; expected {expected}; "
            "correct it, or move the file out of this folder"
        )
    return Problem(str(table.path), "noted", "not-used", f"a table of {table.header()}; not used")


def raise_all(path: Path, errors: list[str]) -> None:
    """Report every bad value at once, so that a table is repaired in one go.

    Raises:
        ManifestError: If there are any errors.
    """
    if errors:
        more = f"\n  and {len(errors) - MAX_SHOWN} more" if len(errors) > MAX_SHOWN else ""
        shown = "\n  ".join(errors[:MAX_SHOWN])
        raise ManifestError(f"{path}: {len(errors)} bad value(s)\n  {shown}{more}")
