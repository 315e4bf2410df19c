"""The sections of a comparison: summary, ROC, pairs, calibration, thresholds, subgroups."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ctclip.evaluation import (
    calibration,
    cautions,
    compare,
    metrics,
    plots,
    report,
    subgroups,
    thresholds,
    uncertain,
)
from ctclip.evaluation.report import Picture, Section

if TYPE_CHECKING:
    from ctclip.evaluation.model_report import Model, ReportConfig


MIN_HEDGED = 5
"""Hedged cases from which a finding is read three ways."""


def build(
    models: "list[Model]",
    config: "ReportConfig",
    folder: Path,
    tables: dict[str, list[pd.DataFrame]],
    texts: Mapping[str, str] | None = None,
) -> list[Section]:
    """Evaluate the models of one protocol.

    Args:
        models: At least one.
        config: Rule, replicates, seed.
        folder: Where figures are written.
        tables: Frames per file stem; this function appends its own.
        texts: Volume or study to its report, for findings that are only suspected.
    """
    evaluations = [model.evaluation for model in models]
    scores = [model.test for model in models]
    protocol = models[0].protocol
    stem = _file_name(protocol)  # with the hash: two protocols may share a name
    bars, grid = plots.auc_bars(evaluations), plots.roc_grid(scores, evaluations)
    plots.save(bars, folder / f"auc-{stem}")
    plots.save(grid, folder / f"roc-{stem}")
    for model in models:
        _keep(tables, "auc", model.evaluation.frame(), model)
    sections = [
        Section(
            title="Summary",
            paragraphs=[f"Protocol {protocol}. Patients were resampled {config.replicates} times."],
            warnings=[f"{m.evaluation.model}: {caution}" for m in models for caution in m.cautions],
            frames=[_summary(evaluations)],
            figures=[Picture(image=bars, caption="AUROC with 95 % intervals.")],
        ),
        Section(
            title="ROC curves",
            figures=[Picture(image=grid, caption="ROC of each finding.")],
        ),
        Section(
            title="Per finding",
            paragraphs=[report.PICKED_HERE],
            frames=[report.results_frame(evaluation) for evaluation in evaluations],
            captions=[evaluation.model for evaluation in evaluations],
        ),
    ]
    if len(models) > 1:
        sections.append(_comparison(models, config, tables))
    sections.append(_calibration(models, folder, stem, tables))
    sections.append(_thresholds(models, config, tables))
    found = [(model, subgroups.gaps(model.test, min(config.replicates, 1000))) for model in models]
    if any(model.test.meta for model in models):
        sections.append(_subgroups(found, tables))
    if texts is not None:
        sections.append(_uncertain(models, texts, folder, stem, tables))
    return sections


def _summary(evaluations: Sequence[metrics.Evaluation]) -> pd.DataFrame:
    rows = []
    for evaluation in evaluations:
        macro = evaluation.macro
        rows.append(
            {
                "model": evaluation.model,
                "split": evaluation.split,
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
    models: "list[Model]", config: "ReportConfig", tables: dict[str, list[pd.DataFrame]]
) -> Section:
    frames, figures, paragraphs = [], [], []
    for other in models[1:]:
        found = compare.compare(models[0].test, other.test, config.replicates, config.seed)
        frame = found.frame()
        about: dict[str, str | int]
        about = {"a": found.a, "b": found.b, "protocol": other.protocol,
                 "cases": found.cases, "patients": found.patients}  # fmt: skip
        for place, (name, value) in enumerate(about.items()):
            frame.insert(place, name, value)
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
    return Section(
        title="Paired comparison",
        paragraphs=paragraphs,
        figures=figures,
        frames=frames,
        captions=[f"{other.evaluation.model} against {models[0].evaluation.model}"
                  for other in models[1:]],
    )  # fmt: skip


def _calibration(
    models: "Sequence[Model]", folder: Path, stem: str, tables: dict[str, list[pd.DataFrame]]
) -> Section:
    plain = [model for model in models if _are_probabilities(model.test.scores)]
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
        _keep(tables, "calibration", frame, model)
    if any(model.development is None for model in plain):
        warnings.append("No development split: scores are shown as they are, without a scaling.")
    figures = []
    if plain:
        figure = plots.reliability_grid([model.test for model in plain])
        plots.save(figure, folder / f"reliability-{stem}")
        figures = [Picture(image=figure, caption="On the diagonal, a score is a probability.")]
    return Section(
        title="Calibration",
        warnings=warnings,
        figures=figures,
        frames=frames,
        captions=[model.evaluation.model for model in plain],
    )


def _thresholds(
    models: "Sequence[Model]", config: "ReportConfig", tables: dict[str, list[pd.DataFrame]]
) -> Section:
    frames, warnings, paragraphs = [], [], []
    for model in models:
        name = model.evaluation.model
        if model.development is not None and not cautions.is_optimistic(
            model.test, model.development
        ):
            chosen = thresholds.from_development(model.development, config.rule)
            kind = f"development ({config.rule})"
            paragraphs.append(
                f"{name}: thresholds by rule '{config.rule}' from {len(model.development)} "
                f"development cases (split: {model.development.split_name})."
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
        _keep(tables, "thresholds", frame, model)
        frames.append(frame)
    return Section(
        title="At a threshold",
        warnings=warnings,
        paragraphs=paragraphs,
        frames=frames,
        captions=[model.evaluation.model for model in models],
    )


def _subgroups(
    found: "Sequence[tuple[Model, list[subgroups.Gap]]]", tables: dict[str, list[pd.DataFrame]]
) -> Section:
    frames, paragraphs, captions = [], [], []
    for model, gaps in found:
        name = model.evaluation.model
        paragraphs += [f"{name}: {reason}" for reason in subgroups.left_out(model.test, gaps)]
        if not gaps:
            continue
        captions.append(name)
        _keep(tables, "subgroups", subgroups.frame(gaps), model)
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
    return Section(title="Subgroups", paragraphs=paragraphs, frames=frames, captions=captions)


def _uncertain(
    models: "Sequence[Model]",
    texts: Mapping[str, str],
    folder: Path,
    stem: str,
    tables: dict[str, list[pd.DataFrame]],
) -> Section:
    frames, figures, warnings, captions = [], [], [], []
    for model in models:
        table, name = model.test, model.evaluation.model
        said = [texts.get(volume, "") for volume in table.volume_id.tolist()]
        if not any(said):
            warnings.append(f"{name}: none of its cases has a report in the given table.")
            continue
        hedged = uncertain.hedged_findings(said, table.findings)
        kept = [k for k in range(len(table.findings)) if hedged[:, k].sum() >= MIN_HEDGED]
        if not kept:
            warnings.append(f"{name}: no finding is hedged in {MIN_HEDGED} reports or more.")
            continue
        found = [
            uncertain.readings(table.findings[k], table.labels[:, k], hedged[:, k],
                               table.scores[:, k])
            for k in kept
        ]  # fmt: skip
        frame = pd.DataFrame([vars(row) for row in found])
        _keep(tables, "uncertain", frame, model)
        frames.append(frame)
        captions.append(name)
        figure = plots.uncertain_roc(table, hedged, kept)
        plots.save(figure, folder / f"uncertain-{stem}-{_file_name(name)}")
        figures.append(Picture(image=figure, caption=f"{name}: ROC under the three readings."))
    return Section(
        title="Uncertain findings",
        paragraphs=[
            "Findings that a report only suspects, counted as present, as absent, or left out. "
            "'rank' is where they score between the certain cases: 0 like absent, 1 like present."
        ],
        warnings=warnings,
        figures=figures,
        frames=frames,
        captions=captions,
    )


def _are_probabilities(scores: np.ndarray) -> bool:
    known = scores[~np.isnan(scores)]
    return bool(len(known) and known.min() >= 0 and known.max() <= 1)


def _keep(
    tables: dict[str, list[pd.DataFrame]], stem: str, frame: pd.DataFrame, model: "Model"
) -> None:
    """Add a frame to the CSV of that stem, whose rows say whose they are and under what."""
    named = frame.copy()
    named.insert(0, "protocol", model.protocol)
    named.insert(0, "model", model.evaluation.model)
    tables.setdefault(stem, []).append(named)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def _p(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2g}"
