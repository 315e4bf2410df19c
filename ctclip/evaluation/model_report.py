"""``python eval/report.py a.parquet b.csv``: evaluate any number of models, whoever made them.

Models are grouped by protocol: numbers of different protocols never stand in one column.
"""

import hashlib
import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.evaluation import (
    calibration,
    card,
    compare,
    importers,
    metrics,
    plots,
    protocols,
    report,
    subgroups,
    thresholds,
)
from ctclip.evaluation.report import Picture, Section
from ctclip.evaluation.scores import ScoreTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How score tables are evaluated."""

    protocol: str | None = None
    """Applied to tables that are under none yet; ``None`` leaves them as they are."""

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """One score file under its protocol."""

    path: Path
    sha256: str
    test: ScoreTable
    development: ScoreTable | None
    evaluation: metrics.Evaluation

    @property
    def protocol(self) -> str:
        """Name and hash."""
        return str(self.test.header.get("protocol", protocols.NONE))


def run(
    paths: Sequence[str | Path],
    out: str | Path,
    config: ReportConfig | None = None,
    labels: str | Path | None = None,
) -> list[Model]:
    """The command.

    Writes ``report.html``, ``card.md``, ``results.json``, ``auc.csv``, ``comparisons.csv``,
    ``subgroups.csv``, ``thresholds.csv`` and the figures into ``out``.

    Args:
        paths: Score files; see :mod:`ctclip.evaluation.importers`.
        out: Folder of the results.
        config: Protocol, splits, rule.
        labels: Labels of wide CSVs.

    Raises:
        ValueError: If a file is no score table or doesn't fit the protocol.
    """
    config = config or ReportConfig()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    protocol = protocols.load(config.protocol) if config.protocol else None
    models = [_load(Path(path), labels, protocol, config) for path in paths]
    _unique_names(models)
    groups: dict[str, list[Model]] = {}
    for model in models:
        groups.setdefault(model.protocol, []).append(model)

    sections: list[Section] = []
    tables: dict[str, list[pd.DataFrame]] = {}
    for name, members in groups.items():
        prefix = f"{name}: " if len(groups) > 1 else ""
        found = _sections(members, config, folder, tables)
        sections += [
            Section(**(vars(section) | {"title": prefix + section.title})) for section in found
        ]
    for stem, frames in tables.items():
        pd.concat(frames).to_csv(folder / f"{stem}.csv", index=False)
    results = [model.evaluation.to_json() | {"file_sha256": model.sha256} for model in models]
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    command = _command(paths, out, config, labels)
    card.write(folder / "card.md", models, tables.get("comparisons", []), command)
    names = ", ".join(model.evaluation.model for model in models)
    report.Report(
        title=f"Evaluation of {names}",
        facts={"command": command, "protocol": ", ".join(groups)},
        sections=sections,
    ).write(folder / "report.html")
    for model in models:
        report.print_evaluation(model.evaluation)
    logger.info("report: %s", folder / "report.html")
    return models


def _load(
    path: Path,
    labels: str | Path | None,
    protocol: protocols.Protocol | None,
    config: ReportConfig,
) -> Model:
    raw = importers.load(path, labels, protocol)
    table = raw if protocol is None or "protocol" in raw.header else protocol.apply(raw)
    if config.split is None:
        split = next((s for s in ("test", "valid") if (table.split == s).any()), None)
    else:
        split = config.split
    test = table if split is None else table.of_split(split)
    wanted = config.development or ("valid" if split == "test" else None)
    has_development = wanted is not None and bool((table.split == wanted).any())
    development = table.of_split(wanted) if wanted and has_development else None
    if config.development and development is None:
        raise ValueError(f"{path}: no case of split {config.development!r} for thresholds")
    source = path / "predicted_weights.npz" if path.is_dir() else path
    return Model(
        path=path,
        sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
        test=test,
        development=development,
        evaluation=metrics.evaluate(test, replicates=config.replicates, seed=config.seed),
    )


def _unique_names(models: Sequence[Model]) -> None:
    names = [model.evaluation.model for model in models]
    for name in names:
        if names.count(name) > 1:
            paths = [str(model.path) for model in models if model.evaluation.model == name]
            raise ValueError(
                f"{', '.join(paths)} are all called {name!r}; give each score table's header "
                "its own model name, or name the files differently"
            )


def _sections(
    models: list[Model], config: ReportConfig, folder: Path, tables: dict[str, list[pd.DataFrame]]
) -> list[Section]:
    evaluations = [model.evaluation for model in models]
    scores = [model.test for model in models]
    protocol = models[0].protocol
    stem = protocol.split("@")[0]
    bars, grid = plots.auc_bars(evaluations), plots.roc_grid(scores, evaluations)
    plots.save(bars, folder / f"auc-{stem}")
    plots.save(grid, folder / f"roc-{stem}")
    for evaluation in evaluations:
        frame = evaluation.frame()
        frame.insert(0, "protocol", protocol)
        frame.insert(0, "model", evaluation.model)
        tables.setdefault("auc", []).append(frame)
    sections = [
        Section(
            title="Summary",
            paragraphs=[f"Protocol {protocol}. Patients were resampled {config.replicates} times."],
            warnings=_warnings(models),
            frames=[_summary(evaluations)],
            figures=[Picture(image=bars, caption="AUROC with 95 % intervals.")],
        ),
        Section(
            title="ROC curves",
            figures=[Picture(image=grid, caption="ROC of each finding.")],
        ),
        Section(
            title="Per finding",
            paragraphs=[evaluation.model for evaluation in evaluations] if len(models) > 1 else [],
            frames=[report.results_frame(evaluation) for evaluation in evaluations],
        ),
    ]
    if len(models) > 1:
        sections.append(_comparison(models, config, tables))
    sections.append(_calibration(models, folder, stem, tables))
    sections.append(_thresholds(models, config, tables))
    found = [(model, subgroups.gaps(model.test, min(config.replicates, 1000))) for model in models]
    if any(gaps for _, gaps in found):
        sections.append(_subgroups(found, tables))
    return sections


def _warnings(models: Sequence[Model]) -> list[str]:
    warnings = []
    for model in models:
        header, name = model.test.header, model.evaluation.model
        if header.get("label_informed"):
            warnings.append(
                f"{name} saw labels of these findings in training: not a zero-shot number."
            )
        if header.get("prompt_direction_spread", 0) > 0.8:
            warnings.append(
                f"{name}: prompts of different findings point the same way (mean |cosine| "
                f"{header['prompt_direction_spread']:.2f}); they share one 'present' axis."
            )
        unmeasured = [r.finding for r in model.evaluation.findings if np.isnan(r.auroc)]
        if unmeasured:
            warnings.append(f"{name}: not measured, not in the macro: {', '.join(unmeasured)}.")
        if (model.test.patient_id == model.test.volume_id).all() and len(model.test) > 1:
            warnings.append(
                f"{name}: every case is its own patient; if patients have several, the intervals "
                "are too narrow."
            )
    return warnings


def _summary(evaluations: Sequence[metrics.Evaluation]) -> pd.DataFrame:
    rows = []
    for evaluation in evaluations:
        macro = evaluation.macro
        rows.append(
            {
                "model": evaluation.model,
                "findings": int(macro["num_findings"]),
                "cases": evaluation.cases,
                "patients": evaluation.patients,
                "macro AUROC": report.with_interval(
                    macro["auroc"], macro["auroc_low"], macro["auroc_high"]
                ),
                "macro average precision": report.with_interval(
                    macro["average_precision"],
                    macro["average_precision_low"],
                    macro["average_precision_high"],
                ),
            }
        )
    return pd.DataFrame(rows)


def _comparison(
    models: list[Model], config: ReportConfig, tables: dict[str, list[pd.DataFrame]]
) -> Section:
    frames, figures, paragraphs = [], [], []
    for other in models[1:]:
        found = compare.compare(models[0].test, other.test, config.replicates, config.seed)
        frame = found.frame()
        frame.insert(0, "b", found.b)
        frame.insert(0, "a", found.a)
        tables.setdefault("comparisons", []).append(frame)
        rows = [*found.findings, found.macro]
        figures.append(
            Picture(
                image=plots.differences(rows, f"{found.b} minus {found.a}"),
                caption="Filled where the 95 % interval of the paired difference leaves zero out.",
            )
        )
        better = [r.finding for r in found.findings if r.p_holm < 0.05 and r.difference > 0]
        worse = [r.finding for r in found.findings if r.p_holm < 0.05 and r.difference < 0]
        paragraphs.append(
            f"{found.b} minus {found.a} on {found.cases} cases of {found.patients} patients: macro "
            f"{found.macro.difference:+.4f} [{found.macro.low:+.4f}, {found.macro.high:+.4f}], "
            f"p = {found.macro.p:.2g}. A true macro difference of {found.macro.detectable:.4f} "
            "would be seen in 80 % of samples like this one. After Holm's correction "
            f"better in {', '.join(better) or 'none'}; worse in {', '.join(worse) or 'none'}."
        )
        frames.append(
            pd.DataFrame(
                {
                    "finding": [r.finding for r in rows],
                    found.a: [report.with_interval(r.auroc_a) for r in rows],
                    found.b: [report.with_interval(r.auroc_b) for r in rows],
                    "difference": [f"{r.difference:+.3f} [{r.low:+.3f}, {r.high:+.3f}]"
                                   if not np.isnan(r.low) else "–" for r in rows],
                    "p (DeLong)": [_p(r.p) for r in rows],
                    "p (Holm)": [_p(r.p_holm) for r in rows],
                    "detectable": [report.with_interval(r.detectable) for r in rows],
                }
            )
        )  # fmt: skip
    return Section(title="Paired comparison", paragraphs=paragraphs, figures=figures, frames=frames)


def _calibration(
    models: Sequence[Model], folder: Path, stem: str, tables: dict[str, list[pd.DataFrame]]
) -> Section:
    plain = [m for m in models if np.nanmin(m.test.scores) >= 0 and np.nanmax(m.test.scores) <= 1]
    warnings = [
        f"{m.evaluation.model}: scores are no probabilities; calibration isn't shown."
        for m in models
        if m not in plain
    ]
    frames = []
    for model in plain:
        rows = []
        for k, finding in enumerate(model.test.findings):
            labels, scores = model.test.labels[:, k], model.test.scores[:, k]
            label, _ = metrics.known(labels, scores)
            if not len(label):
                continue
            raw = calibration.reliability(labels, scores)
            row = {
                "finding": finding,
                "ECE": raw.ece,
                "Brier": raw.brier,
                "Brier of prevalence": raw.brier_of_prevalence,
            }
            if model.development is not None:
                past, known_past = model.development.labels[:, k], model.development.scores[:, k]
                known_label, _ = metrics.known(past, known_past)
                if known_label.any() and not known_label.all():
                    scaling = calibration.fit(past, known_past)
                    mended = calibration.reliability(labels, scaling(scores))
                    row |= {"ECE, Platt": mended.ece, "Brier, Platt": mended.brier}
            rows.append(row)
        frame = pd.DataFrame(rows)
        frames.append(frame)
        tables.setdefault("calibration", []).append(frame.assign(model=model.evaluation.model))
    if any(model.development is None for model in plain):
        warnings.append("No development split: scores are shown as they are, without a scaling.")
    figures = []
    if plain:
        figure = plots.reliability_grid([model.test for model in plain])
        plots.save(figure, folder / f"reliability-{stem}")
        figures = [Picture(image=figure, caption="On the diagonal, a score is a probability.")]
    return Section(title="Calibration", warnings=warnings, figures=figures, frames=frames)


def _thresholds(
    models: Sequence[Model], config: ReportConfig, tables: dict[str, list[pd.DataFrame]]
) -> Section:
    frames, warnings, paragraphs = [], [], []
    for model in models:
        name = model.evaluation.model
        if model.development is not None and not model.protocol.startswith("ct-clip@"):
            chosen = thresholds.from_development(model.development, config.rule)
            kind = f"development ({config.rule})"
            paragraphs.append(
                f"{name}: thresholds by rule '{config.rule}' from {len(model.development)} "
                "development cases."
            )
        else:
            chosen = thresholds.optimistic(model.test)
            kind = "OPTIMISTIC: picked on these very cases"
            warnings.append(
                f"{name}: OPTIMISTIC. Thresholds were picked on the cases they are judged on, as "
                "in CT-CLIP's tables (nearest point to the ROC's corner), for comparison with "
                "published figures only."
            )
        frame = thresholds.operating_table(model.test, chosen)
        frame.insert(1, "thresholds from", kind)
        tables.setdefault("thresholds", []).append(frame.assign(model=name))
        frames.append(frame)
    return Section(title="At a threshold", warnings=warnings, paragraphs=paragraphs, frames=frames)


def _subgroups(
    found: Sequence[tuple[Model, list[subgroups.Gap]]], tables: dict[str, list[pd.DataFrame]]
) -> Section:
    frames, paragraphs = [], []
    for model, gaps in found:
        if not gaps:
            continue
        name = model.evaluation.model
        tables.setdefault("subgroups", []).append(subgroups.frame(gaps).assign(model=name))
        clear = [gap for gap in gaps if gap.is_clear]
        paragraphs.append(
            f"{name}: {len(clear)} of {len(gaps)} gaps have an interval without zero; about "
            f"{0.05 * len(gaps):.0f} would by chance. Each subgroup is set against all other cases."
        )
        shown = [gap for gap in gaps if gap.finding.startswith("macro")] + [
            gap for gap in clear if not gap.finding.startswith("macro")
        ]
        frames.append(
            pd.DataFrame(
                {
                    "subgroup": [f"{gap.column} {gap.group}" for gap in shown],
                    "finding": [gap.finding for gap in shown],
                    "cases": [gap.cases for gap in shown],
                    "AUROC": [report.with_interval(gap.auroc) for gap in shown],
                    "others": [report.with_interval(gap.rest) for gap in shown],
                    "gap": [f"{gap.gap:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]" for gap in shown],
                }
            )
        )
    return Section(title="Subgroups", paragraphs=paragraphs, frames=frames)


def _p(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2g}"


def _command(
    paths: Sequence[str | Path], out: str | Path, config: ReportConfig, labels: str | Path | None
) -> str:
    words = ["python", "eval/report.py", *map(str, paths), "--out", str(out)]
    if labels is not None:
        words += ["--labels", str(labels)]
    defaults = ReportConfig()
    for key, value in vars(config).items():
        if value != getattr(defaults, key):
            words += [f"--{key}", str(value)]
    return shlex.join(words)
