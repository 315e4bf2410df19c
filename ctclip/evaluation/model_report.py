"""``python eval/report.py a.parquet b.csv``: evaluate any number of models, whoever made them.

Models are grouped by protocol: numbers of different protocols never stand in one column.
"""

import hashlib
import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from ctclip.evaluation import (
    card,
    cautions,
    compare,
    importers,
    metrics,
    model_sections,
    protocols,
    report,
    thresholds,
    uncertain,
)
from ctclip.evaluation.report import Section
from ctclip.evaluation.scores import ScoreTable, ScoreTableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How score tables are evaluated."""

    protocol: str | None = None
    """Applied to tables that are under none yet (the others keep theirs, with a warning); ``None``
    leaves all as they are."""

    split: str | None = None
    """Cases to report on; ``None`` takes "test" where there is one, else "valid", else all."""

    development: str | None = None
    """Cases for thresholds and calibration; ``None`` takes "valid" where "test" is reported."""

    rule: thresholds.Rule = "youden"
    replicates: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in thresholds.RULES:
            raise ValueError(f"rule is {self.rule!r}, expected one of {thresholds.RULES}")
        if self.replicates < 0:
            raise ValueError(f"replicates must be >= 0, got {self.replicates}; 0: no intervals")


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """One score file under its protocol."""

    path: Path
    sha256: str
    test: ScoreTable
    development: ScoreTable | None
    evaluation: metrics.Evaluation
    cautions: Sequence[str]
    """What to know before believing it; see :mod:`ctclip.evaluation.cautions`."""

    @property
    def protocol(self) -> str:
        """Name and hash."""
        return str(self.test.header.get("protocol", protocols.NONE))


def run(
    paths: Sequence[str | Path],
    out: str | Path,
    config: ReportConfig | None = None,
    labels: str | Path | None = None,
    reports: str | Path | None = None,
    names: Sequence[str] | None = None,
) -> list[Model]:
    """The command.

    Writes ``report.html``, ``card.md``, ``results.json``, ``auc.csv``, ``comparisons.csv``,
    ``calibration.csv``, ``thresholds.csv``, ``subgroups.csv``, ``uncertain.csv`` and the figures
    into ``out``.

    Args:
        paths: Score files; see :mod:`ctclip.evaluation.importers`.
        out: Folder of the results.
        config: Protocol, splits, rule.
        labels: Labels of wide CSVs.
        reports: Manifest with report texts, for findings that are only suspected.
        names: What to call each model; by default what its file says, and where several say the
            same, what tells them apart.

    Raises:
        ValueError: If a file is no score table or doesn't fit the protocol.
    """
    config = config or ReportConfig()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    texts = None if reports is None else uncertain.read_reports(reports)
    protocol = protocols.load(config.protocol) if config.protocol else None
    tables = [_read(Path(path), labels, protocol) for path in paths]
    tables = _aligned(_named(tables, [Path(path) for path in paths], names))
    models = [
        _evaluated(Path(path), table, config) for path, table in zip(paths, tables, strict=True)
    ]
    groups: dict[str, list[Model]] = {}
    for model in models:
        groups.setdefault(model.protocol, []).append(model)

    sections: list[Section] = []
    frames: dict[str, list[pd.DataFrame]] = {}
    for name, members in groups.items():
        prefix = f"{name}: " if len(groups) > 1 else ""
        found = model_sections.build(members, config, folder, frames, texts)
        sections += [
            Section(**(vars(section) | {"title": prefix + section.title})) for section in found
        ]
    for stem, parts in frames.items():
        pd.concat(parts).to_csv(folder / f"{stem}.csv", index=False)
    results = [model.evaluation.to_json() | {"file_sha256": model.sha256} for model in models]
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    command = _command(paths, out, config, labels, reports, names)
    card.write(folder / "card.md", models, frames.get("comparisons", []), command)
    names = ", ".join(model.evaluation.model for model in models)
    report.Report(
        title=f"Evaluation of {names}",
        facts={"command": command, "protocol": ", ".join(groups)},
        sections=sections,
    ).write(folder / "report.html")
    for model in models:
        report.print_evaluation(model.evaluation)
        for caution in model.cautions:
            logger.warning("%s: %s", model.evaluation.model, caution)
    logger.info("report: %s", folder / "report.html")
    return models


def _read(path: Path, labels: str | Path | None, protocol: protocols.Protocol | None) -> ScoreTable:
    table = importers.load(path, labels, protocol)
    under = table.header.get("protocol")
    if protocol is None or under == protocol.label:
        return table
    if under is not None:
        return table.noting(f"it is already under {under}, so {protocol.label} was not applied.")
    try:
        return protocol.apply(table)
    except protocols.ProtocolError as error:
        raise protocols.ProtocolError(f"{path}: {error}") from None


def _aligned(tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """The tables with one order of findings per protocol: what is shown together is one column."""
    aligned = list(tables)
    groups = [table.header.get("protocol") for table in tables]
    for group in dict.fromkeys(groups):
        rows = [row for row, name in enumerate(groups) if name == group]
        same = compare.same_findings([tables[row] for row in rows])
        for row, table in zip(rows, same, strict=True):
            aligned[row] = table
    return aligned


def _evaluated(path: Path, table: ScoreTable, config: ReportConfig) -> Model:
    split = config.split
    if split is None:
        split = next((s for s in ("test", "valid") if (table.split == s).any()), None)
    try:
        test = table if split is None else table.of_split(split)
    except ScoreTableError as error:
        raise ScoreTableError(f"{path}: {error}") from None
    wanted = config.development or ("valid" if split == "test" else None)
    if wanted is not None and wanted in test.split:
        raise ValueError(
            f"{path}: split {wanted!r} is evaluated, so it can't be the development split that "
            "thresholds come from; name another for --development or leave it out"
        )
    has_development = wanted is not None and bool((table.split == wanted).any())
    development = table.of_split(wanted) if wanted and has_development else None
    if config.development and development is None:
        raise ValueError(
            f"{path}: no case of split {config.development!r} for thresholds; the table has "
            f"{table.split_name}"
        )
    source = path / "predicted_weights.npz" if path.is_dir() else path
    evaluation = metrics.evaluate(test, replicates=config.replicates, seed=config.seed)
    return Model(
        path=path,
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        test=test,
        development=development,
        evaluation=evaluation,
        cautions=cautions.of(test, development, evaluation),
    )


def _named(
    tables: Sequence[ScoreTable], paths: Sequence[Path], names: Sequence[str] | None
) -> list[ScoreTable]:
    """The tables, each with a name of its own in its header."""
    if names is None:
        names = _told_apart(tables, paths)
    elif len(names) != len(paths):
        raise ValueError(f"{len(names)} names for {len(paths)} score tables; give one for each")
    for row, name in enumerate(names):
        if name in names[:row]:
            raise ValueError(
                f"{paths[names.index(name)]} and {paths[row]} are both called {name!r}; give each "
                "a name: --names ours theirs"
            )
    return [
        replace(table, header=table.header | {"model": name})
        for table, name in zip(tables, names, strict=True)
    ]


def _told_apart(tables: Sequence[ScoreTable], paths: Sequence[Path]) -> list[str]:
    """The names of the tables; where two are equal, with what differs in brackets.

    Every zero-shot run of one checkpoint calls its model alike, and its file scores.parquet.
    """
    names = [table.name for table in tables]
    distinct = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        rows = [row for row, other in enumerate(names) if other == name]
        headers = [tables[row].header for row in rows]
        said = [
            [str(header.get("checkpoint", "no checkpoint"))[:8] for header in headers],
            [str(header.get("prompts", "no prompts")) for header in headers],
        ]
        found = [paths[row].resolve() for row in rows]
        places = [[path.parent.name for path in found], [path.name for path in found]]
        columns = [values for values in said if len(set(values)) > 1]
        for values in places:
            if len(set(zip(*columns, strict=True))) < len(rows) and len(set(values)) > 1:
                columns.append(values)
        for row, parts in zip(rows, zip(*columns, strict=True), strict=False):
            distinct[row] = f"{name} ({', '.join(parts)})"
    return distinct


def _command(
    paths: Sequence[str | Path],
    out: str | Path,
    config: ReportConfig,
    labels: str | Path | None,
    reports: str | Path | None,
    names: Sequence[str] | None,
) -> str:
    words = ["python", "eval/report.py", *map(str, paths), "--out", str(out)]
    for flag, value in (("--labels", labels), ("--reports", reports)):
        if value is not None:
            words += [flag, str(value)]
    if names is not None:
        words += ["--names", *names]
    defaults = ReportConfig()
    for key, value in vars(config).items():
        if value != getattr(defaults, key):
            words += [f"--{key}", str(value)]
    return shlex.join(words)
