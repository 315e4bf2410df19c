"""A protocol says what a number means: which findings, which cases, which prompts, thresholds.

It is data (YAML) with a hash that stands beside every number made under it. Numbers of different
protocols can't be compared, and the report never puts them into one column.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from ctclip.evaluation import prompts
from ctclip.evaluation.scores import ScoreTable
from ctclip.findings import FINDINGS

logger = logging.getLogger(__name__)

Unit = Literal["volume", "study", "patient"]
Pool = Literal["mean", "max", "first"]
Thresholds = Literal["development", "optimistic"]
NONE = "as-given"
"""Name of a table that no protocol was applied to."""


class ProtocolError(ValueError):
    """A protocol that can't be read, or a table that it doesn't fit."""


@dataclass(frozen=True, kw_only=True)
class ProtocolFinding:
    """One column of the result."""

    name: str
    scores: tuple[str, ...]
    """Findings of the score table; the highest of their scores counts."""

    labels: tuple[str, ...]
    """Columns of the cohort's own label table; positive if any of them is."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is scored and how."""

    name: str
    findings: tuple[ProtocolFinding, ...]
    unit: Unit = "volume"
    pool: Pool = "mean"
    """How the scores of a unit's volumes become one; without effect for ``unit: volume``."""

    prompts: str | None = None
    """The prompt set that scores have to be made with; ``None`` leaves each model its own."""

    thresholds: Thresholds = "development"
    about: str = ""

    @property
    def hash(self) -> str:
        """12 hex digits over everything but the description."""
        content = {key: value for key, value in asdict(self).items() if key != "about"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """Name and hash, as it stands beside every number."""
        return f"{self.name}@{self.hash}"

    def apply(self, table: ScoreTable) -> ScoreTable:
        """Bring a table of volumes under this protocol.

        Args:
            table: One row per volume, under no protocol yet.

        Returns:
            One row per unit, one column per finding of the protocol.

        Raises:
            ProtocolError: If the table is under another protocol, says that it was made with
                other prompts, or lacks a finding.
        """
        if table.header.get("protocol", self.label) != self.label:
            raise ProtocolError(
                f"{table.name} is already under {table.header['protocol']}; "
                f"apply {self.label} to the scores of volumes"
            )
        if "protocol" in table.header:
            return table
        self._require_prompts(table)
        for finding in self.findings:
            missing = [name for name in finding.scores if name not in table.findings]
            if missing:
                raise ProtocolError(
                    f"{self.label} wants scores of {missing[0]!r}; {table.name} has none"
                )
        labels, scores = [], []
        for finding in self.findings:
            columns = [table.findings.index(name) for name in finding.scores]
            scores.append(table.scores[:, columns].max(axis=1))
            labels.append(any_positive(table.labels[:, columns].T))
        merged = replace(
            table,
            findings=tuple(finding.name for finding in self.findings),
            labels=np.stack(labels, axis=1),
            scores=np.stack(scores, axis=1),
            header=table.header
            | {"protocol": self.label, "unit": self.unit, "thresholds": self.thresholds},
        )
        return merged if self.unit == "volume" else _pooled(merged, self.unit, self.pool)

    def _require_prompts(self, table: ScoreTable) -> None:
        """Refuse scores of other prompts; a table of foreign origin may say nothing about them."""
        stated = table.header.get("prompts")
        if self.prompts is None or stated is None:
            return
        wanted = prompts.load(self.prompts).label
        if stated != wanted:
            raise ProtocolError(
                f"{table.name} was scored with prompts {stated}, {self.label} is for {wanted}; "
                f"score again with prompts={self.prompts}, or take a protocol that leaves prompts "
                "open"
            )


def load(source: str | Path) -> Protocol:
    """Read a protocol by the name of one that ships with ctclip, or from a YAML file.

    Raises:
        FileNotFoundError: If there is neither such a name nor such a file.
        ProtocolError: If the file is malformed.
    """
    path = Path(source)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise FileNotFoundError(f"no protocol file {path}")
        text = path.read_text(encoding="utf-8")
    else:
        if str(source) not in shipped():
            raise FileNotFoundError(
                f"no protocol {str(source)!r}; ctclip ships {', '.join(shipped())}, "
                "or give the path of a .yaml file"
            )
        folder = resources.files("ctclip.evaluation") / "data"
        text = (folder / f"protocol-{source}.yaml").read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ProtocolError(f"{source}: not readable YAML: {error}") from None
    return _build(data, str(source))


def shipped() -> list[str]:
    """Names of the protocols that ship with ctclip."""
    return sorted(
        item.name.removeprefix("protocol-").removesuffix(".yaml")
        for item in (resources.files("ctclip.evaluation") / "data").iterdir()
        if item.name.startswith("protocol-")
    )


def any_positive(labels: np.ndarray) -> np.ndarray:
    """Merge labels ``(M, N)`` to ``(N,)``: 1 if any is, else 0 if all are known, else nan."""
    positive = (labels == 1.0).any(axis=0)
    unknown = np.isnan(labels).any(axis=0)
    merged: np.ndarray = np.where(positive, 1.0, np.where(unknown, np.nan, 0.0))
    return merged


def _build(data: Any, source: str) -> Protocol:
    known = set(Protocol.__dataclass_fields__)
    if not isinstance(data, dict) or set(data) - known or not {"name", "findings"} <= set(data):
        got = list(data) if isinstance(data, dict) else repr(data)
        raise ProtocolError(
            f"{source}: a protocol has name, findings and optionally "
            f"{', '.join(sorted(known - {'name', 'findings'}))}; got {got}"
        )
    for key, options in (("unit", Unit), ("pool", Pool), ("thresholds", Thresholds)):
        if data.get(key, get_args(options)[0]) not in get_args(options):
            raise ProtocolError(
                f"{source}: {key} is {data[key]!r}, expected one of {', '.join(get_args(options))}"
            )
    entries = FINDINGS if data["findings"] == "all" else data["findings"]
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ProtocolError(
            f"{source}: findings is {entries!r}, expected 'all' or a list of findings"
        )
    if data.get("prompts") is not None:
        prompts.load(str(data["prompts"]))  # says which there are
    findings = [_finding(entry, source) for entry in entries]
    names = [finding.name for finding in findings]
    again = [name for name in names if names.count(name) > 1]
    if again:
        raise ProtocolError(f"{source}: the finding {again[0]!r} comes twice")
    return Protocol(**{**data, "findings": tuple(findings)})


def _finding(entry: Any, source: str) -> ProtocolFinding:
    item = {"name": entry} if isinstance(entry, str) else entry
    if isinstance(item, dict) and {"name"} <= set(item) <= {"name", "scores", "labels"}:
        name = item["name"]
        scores, labels = (item.get(key, [name]) for key in ("scores", "labels"))
        if _are_names([name]) and _are_names(scores) and _are_names(labels):
            return ProtocolFinding(name=name, scores=tuple(scores), labels=tuple(labels))
    raise ProtocolError(
        f"{source}: a finding is a name, or has name and optionally scores and labels, both lists "
        f"of names; got {entry!r}"
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _pooled(table: ScoreTable, unit: Unit, pool: Pool) -> ScoreTable:
    owner = {"study": table.study_id, "patient": table.patient_id}[unit]
    if (owner == "").any():
        raise ProtocolError(f"{table.name}: a volume has no {unit}_id; {unit}s can't be pooled")
    order = np.lexsort((table.volume_id, owner))
    names, starts = np.unique(owner[order], return_index=True)
    groups: Sequence[np.ndarray] = np.split(order, starts[1:])
    reduce = {"mean": _mean, "max": lambda x: x.max(axis=0), "first": lambda x: x[0]}[pool]
    first = table.rows(np.array([group[0] for group in groups]))
    return replace(
        first,
        volume_id=names,
        labels=np.stack([_any_known(table.labels[group]) for group in groups]),
        scores=np.stack([reduce(table.scores[group]) for group in groups]),
    )


def _mean(scores: np.ndarray) -> np.ndarray:
    mean: np.ndarray = scores.mean(axis=0)
    return mean


def _any_known(labels: np.ndarray) -> np.ndarray:
    """Labels ``(V, K)`` of one unit to ``(K,)``: 1 if any is, else 0 if any is, else nan."""
    positive, negative = (labels == 1.0).any(axis=0), (labels == 0.0).any(axis=0)
    merged: np.ndarray = np.where(positive, 1.0, np.where(negative, 0.0, np.nan))
    return merged
