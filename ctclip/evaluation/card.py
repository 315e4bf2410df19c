"""The results card: Markdown to paste beside a model, every number with what reproduces it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ctclip import __version__
from ctclip.evaluation.report import with_interval

if TYPE_CHECKING:
    from ctclip.evaluation.model_report import Model

COUNTS = "positive / known"


def write(
    path: Path, models: "Sequence[Model]", comparisons: Sequence[pd.DataFrame], command: str
) -> None:
    """Write the card.

    Args:
        path: Markdown file.
        models: What was evaluated.
        comparisons: Frames of :meth:`ctclip.evaluation.compare.Comparison.frame`.
        command: The command line that makes these numbers from these files.
    """
    lines = ["# Results", "", f"Every number on this card comes from ctclip {__version__} and"]
    lines += ["", "```", command, "```", ""]
    lines += ["on these files:", ""]
    lines += [
        "| model | file | SHA-256 | checkpoint | prompts | protocol | split |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        header = model.test.header
        cells = [
            model.evaluation.model,
            f"`{model.path.name}`",
            f"`{model.sha256[:12]}`",
            f"`{str(header.get('checkpoint', 'not stated'))[:12]}`",
            str(header.get("prompts", "not stated")),
            model.protocol,
            model.evaluation.split,
        ]
        lines.append(_row(cells))
    cautions = [(model.evaluation.model, text) for model in models for text in model.cautions]
    if cautions:
        lines += ["", "To bear in mind:", ""]
        lines += [f"- {name}: {text}" for name, text in cautions]
    for protocol in dict.fromkeys(model.protocol for model in models):
        members = [model for model in models if model.protocol == protocol]
        lines += ["", f"## AUROC under {protocol}", ""]
        lines.append("Brackets: 95 % interval, patients resampled.")
        lines.append("")
        columns = _columns(members)
        if sum(head == COUNTS for head, _ in columns) > 1:
            lines += ["The models have different cases; counts stand left of those they hold for."]
            lines.append("")
        names = [result.finding for result in members[0].evaluation.findings]
        lines.append(_row(["finding", *(head for head, _ in columns)]))
        lines.append("|---|" + "---:|" * len(columns))
        measured = sorted({str(int(m.evaluation.macro["num_findings"])) for m in members})
        for k, name in enumerate([*names, f"**macro over {', '.join(measured)}**"]):
            lines.append(_row([name, *(cells[k] for _, cells in columns)]))
        lines += ["", "; ".join(
            f"{m.evaluation.model}: {m.evaluation.cases} cases of {m.evaluation.patients} patients"
            for m in members
        ) + "."]  # fmt: skip
    for frame in comparisons:
        macro = frame.iloc[-1]
        lines += [
            "",
            f"## {macro['b']} minus {macro['a']}",
            "",
            f"Under {macro['protocol']}, paired, on the {macro['cases']} cases of "
            f"{macro['patients']} patients that both have: macro AUROC {macro['auroc_b']:.3f} "
            f"minus {macro['auroc_a']:.3f} = {macro['difference']:+.4f} [{macro['low']:+.4f}, "
            f"{macro['high']:+.4f}], p = {macro['p']:.2g}; a difference of "
            f"{macro['detectable']:.4f} would be seen in 80 % of samples like this one.",
            "",
        ]
        clear = frame[(frame["p_holm"] < 0.05) & (frame["finding"] != "macro")]
        for row in clear.itertuples():
            lines.append(
                f"- {row.finding}: {row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}], "
                f"Holm p = {row.p_holm:.2g}"
            )
        if clear.empty:
            lines.append("- no single finding differs after Holm's correction")
    lines += ["", "Research use only; not a medical device.", ""]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("\n".join(lines), encoding="utf-8")
    os.replace(temporary, path)


def _columns(members: "Sequence[Model]") -> list[tuple[str, list[str]]]:
    """Head and cells, the macro's last: a column per model, and counts before they change."""
    columns: list[tuple[str, list[str]]] = []
    shown = None
    for evaluation in (member.evaluation for member in members):
        results, macro = evaluation.findings, evaluation.macro
        counts = [f"{r.positives} / {r.positives + r.negatives}" for r in results]
        if counts != shown:
            columns.append((COUNTS, [*counts, ""]))
            shown = counts
        areas = [
            r.note if np.isnan(r.auroc) else with_interval(r.auroc, r.auroc_low, r.auroc_high)
            for r in results
        ]
        overall = with_interval(macro["auroc"], macro["auroc_low"], macro["auroc_high"])
        columns.append((evaluation.model, [*areas, overall]))
    return columns


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
