"""Which cases of an archive may be returned: one description, two readers (NumPy and Milvus)."""

import calendar
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ctclip.embeddings import EmbeddingError, EmbeddingTable
from ctclip.findings import FINDINGS

UNKNOWN_LABEL = -1
"""How the index stores a finding that nobody annotated."""

FILTER_FIELDS = ("sex", "age", "date", "hospital", "manufacturer")
"""The table's fields that can be filtered by."""

AGE_COLUMN = "age_years"
"""The index's numeric copy of the field ``age``; negative where it is unknown."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Conditions that all have to hold; an empty filter lets every case through.

    Cases where a field is empty never meet a condition on that field.
    """

    present: tuple[str, ...] = ()
    """Findings labelled present."""

    absent: tuple[str, ...] = ()
    """Findings labelled absent; not the same as unlabelled."""

    unknown: tuple[str, ...] = ()
    """Findings that nobody annotated."""

    sex: str | None = None
    age: tuple[float, float] | None = None
    """Years, both ends included."""

    date: tuple[str, str] | None = None
    """ISO dates, both ends included: 2024-01-31, or a whole month or year (2024-01, 2024)."""

    hospital: tuple[str, ...] = ()
    manufacturer: tuple[str, ...] = ()
    """Scanner makers."""

    split: str | None = None

    def __post_init__(self) -> None:
        for finding in (*self.present, *self.absent, *self.unknown):
            if finding not in FINDINGS:
                raise ValueError(f"unknown finding {finding!r}; known: {', '.join(FINDINGS)}")
        if self.age is not None and not all(map(math.isfinite, self.age)):
            raise ValueError(f"age must be two finite numbers of years, got {self.age}")
        if self.age is not None and not self.age[0] <= self.age[1]:
            raise ValueError(f"age must be (low, high) with low <= high, got {self.age}")
        if self.date is not None and not self._days[0] <= self._days[1]:
            raise ValueError(f"date must be (first, last) with first <= last, got {self.date}")
        for name in ("sex", "hospital", "manufacturer", "split"):
            try:
                "".join(getattr(self, name) or ()).encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name} holds half a character; type it anew") from None

    @property
    def fields(self) -> list[str]:
        """The table's fields that this filter reads."""
        return [name for name in FILTER_FIELDS if getattr(self, name)]

    @property
    def _days(self) -> tuple[str, str]:
        """The date's first and last day: text that sorts like what the archive carries."""
        assert self.date is not None
        return _bound(self.date[0], ""), _bound(self.date[1], "-99-99")

    def mask(self, table: EmbeddingTable) -> np.ndarray:
        """``(N,)`` bool: which rows pass.

        Raises:
            EmbeddingError: If the table doesn't carry a field that the filter reads.
        """
        require_fields(self.fields, list(table.fields))
        keep = np.ones(len(table), dtype=bool)
        for findings, value in ((self.present, 1.0), (self.absent, 0.0)):
            for finding in findings:
                keep &= table.labels[:, FINDINGS.index(finding)] == value
        for finding in self.unknown:
            keep &= np.isnan(table.labels[:, FINDINGS.index(finding)])
        if self.sex:
            keep &= np.array([value == self.sex for value in table.fields["sex"]], dtype=bool)
        if self.age:
            ages = np.array([number(value) for value in table.fields["age"]])
            keep &= (ages >= self.age[0]) & (ages <= self.age[1])
        if self.date:
            low, high = self._days
            dates = table.fields["date"]
            keep &= np.array([bool(day) and low <= day <= high for day in dates], dtype=bool)
        for name in ("hospital", "manufacturer"):
            if wanted := getattr(self, name):
                keep &= np.array([value in wanted for value in table.fields[name]], dtype=bool)
        if self.split:
            keep &= np.array([value == self.split for value in table.split], dtype=bool)
        return keep

    def expression(self) -> str:
        """The same conditions in Milvus's filter language; empty when nothing is filtered."""
        terms = []
        for findings, value in (
            (self.present, 1),
            (self.absent, 0),
            (self.unknown, UNKNOWN_LABEL),
        ):
            terms += [f"{label_column(finding)} == {value}" for finding in findings]
        if self.sex:
            terms.append(f"{field_column('sex')} == {quoted(self.sex)}")
        if self.age:
            low, high = (float(bound) for bound in self.age)
            terms.append(f"{AGE_COLUMN} >= {max(low, 0.0)} and {AGE_COLUMN} <= {high}")
        if self.date:
            column, (first, last) = field_column("date"), self._days
            terms.append(f'{column} != "" and {column} >= {quoted(first)}')
            terms.append(f"{column} <= {quoted(last)}")
        for name in ("hospital", "manufacturer"):
            if wanted := getattr(self, name):
                terms.append(f"{field_column(name)} in {quoted_list(wanted)}")
        if self.split:
            terms.append(f"split == {quoted(self.split)}")
        return " and ".join(terms)


def _bound(date: str, rest: str) -> str:
    """A date as text that sorts like the archive's; ``rest`` stands for what it lacks."""
    found = re.fullmatch(r"(\d{4})(?:-(\d\d)(?:-(\d\d))?|(\d\d)(\d\d))?", date, re.ASCII)
    parts = [part for part in found.groups() if part] if found else ["0", "0"]
    year, month, day = map(int, [*parts, "1", "1"][:3])
    if not (1 <= month <= 12 and 1 <= day <= calendar.monthrange(year, month)[1]):
        raise ValueError(
            f"date takes days (2024-01-31), months (2024-01) and years (2024), got {date!r}"
        )
    bound = "-".join(parts)
    return bound + rest[len(bound) - len("2024") :]


def label_column(finding: str) -> str:
    """The index's column of a finding's label: Milvus takes no blanks in a name."""
    return "label_" + finding.lower().replace(" ", "_")


def field_column(name: str) -> str:
    """The index's column of a field.

    Raises:
        EmbeddingError: If the field's name can't be a column's.
    """
    if not name.isidentifier() or not name.isascii():
        raise EmbeddingError(
            f"field {name!r} can't be indexed: rename the column to letters, digits and _"
        )
    return f"field_{name}"


def quoted_list(values: Iterable[str]) -> str:
    """A list literal of Milvus's filter language."""
    return f"[{', '.join(quoted(value) for value in values)}]"


def quoted(value: str) -> str:
    """A string literal of Milvus's filter language; nothing in the value can end it early."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    if any(ord(character) < 32 for character in escaped):
        raise ValueError(f"control characters can't be searched for: {value!r}")
    return f'"{escaped}"'


def number(value: str) -> float:
    """A field as a number; nan, which meets no condition, where it is empty or something else."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def require_fields(wanted: Sequence[str], available: Sequence[str]) -> None:
    """Check that an archive carries the fields that a filter reads.

    Raises:
        EmbeddingError: If it lacks one.
    """
    missing = [name for name in wanted if name not in available]
    if missing:
        raise EmbeddingError(
            f"the archive doesn't carry {', '.join(missing)} (it carries: "
            f"{', '.join(available) or 'no field'}); export again with "
            f"fields={','.join([*available, *missing])}"
        )
