"""One self-contained HTML file: figures and tables inline, no network, no script."""

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ctclip import __version__
from ctclip.evaluation import metrics, plots
from ctclip.evaluation.scores import ScoreTable

PICKED_HERE = (
    "Sensitivity at 90 % specificity takes its threshold from these very cases, which flatters it."
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure, or a uint8 image ``(H, W)`` or ``(H, W, 3)``, with what it shows."""

    image: Figure | np.ndarray
    caption: str

    @property
    def uri(self) -> str:
        """The picture as an inline PNG."""
        return plots.data_uri(self.image)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report. Any command can add its own: a loss curve, similar cases ..."""

    title: str
    paragraphs: Sequence[str] = ()
    warnings: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    """Below each other, full width."""

    frames: Sequence[pd.DataFrame] = ()
    captions: Sequence[str] = ()
    """Above each frame, as whose it is; none, or one per frame."""

    gallery: Sequence[Picture] = ()
    """Small pictures side by side, such as the slices of similar cases."""

    @property
    def tables(self) -> list[str]:
        """The frames as HTML."""
        captions = self.captions or [""] * len(self.frames)
        return [_table(f, caption) for f, caption in zip(self.frames, captions, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Title, facts and sections of a report."""

    title: str
    sections: list[Section]
    subtitle: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: str | Path) -> Path:
        """Render to one HTML file, atomically."""
        from jinja2 import Environment

        source = resources.files("ctclip.evaluation") / "templates" / "report.html.j2"
        environment = Environment(autoescape=True)
        sections = [
            {
                "title": s.title,
                "paragraphs": s.paragraphs,
                "warnings": s.warnings,
                "figures": s.figures,
                "gallery": s.gallery,
                "tables": [_markup(table) for table in s.tables],
            }
            for s in self.sections
        ]
        text = environment.from_string(source.read_text(encoding="utf-8")).render(
            title=self.title,
            subtitle=self.subtitle,
            facts=self.facts,
            sections=sections,
            version=__version__,
        )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        return path


def zero_shot_sections(table: ScoreTable, evaluation: metrics.Evaluation) -> list[Section]:
    """ROC grid, AUC bars and the table of numbers of one model."""
    macro = evaluation.macro
    lead = (
        f"Macro AUROC {macro['auroc']:.3f} "
        f"(95 % interval {macro['auroc_low']:.3f} to {macro['auroc_high']:.3f}) over "
        f"{int(macro['num_findings'])} of {len(evaluation.findings)} findings; "
        f"{evaluation.cases} cases of {evaluation.patients} patients."
    )
    return [
        Section(
            title="AUROC per finding",
            paragraphs=[lead, PICKED_HERE],
            figures=[
                Picture(
                    image=plots.auc_bars([evaluation]),
                    caption="AUROC of each finding; the line is the 95 % interval.",
                )
            ],
            frames=[results_frame(evaluation)],
        ),
        Section(
            title="ROC curves",
            figures=[
                Picture(
                    image=plots.roc_grid([table], [evaluation]),
                    caption="One ROC curve per finding, AUROC with its 95 % interval.",
                )
            ],
        ),
    ]


def results_frame(evaluation: metrics.Evaluation) -> pd.DataFrame:
    """The numbers of one evaluation as a reader wants them: rounded, with intervals as text."""
    any_unscored = any(r.unscored for r in evaluation.findings)
    rows = []
    for r in evaluation.findings:
        rows.append(
            {
                "finding": r.finding,
                "positive": r.positives,
                "negative": r.negatives,
                "unknown": r.unknown,
                **({"not scored": r.unscored} if any_unscored else {}),
                "prevalence": f"{100 * r.prevalence:.1f} %" if r.prevalence == r.prevalence else "",
                "AUROC": with_interval(r.auroc, r.auroc_low, r.auroc_high),
                "average precision": with_interval(
                    r.average_precision, r.average_precision_low, r.average_precision_high
                ),
                "sens. at 90 % spec.": with_interval(r.sensitivity_at_90_specificity),
                "note": r.note,
            }
        )
    return pd.DataFrame(rows)


def print_evaluation(evaluation: metrics.Evaluation) -> None:
    """The AUC table in the terminal; it fits into 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Narrow enough for a terminal of 80 columns, where the numbers are what must not be cut.
    table = Table(
        title=f"AUROC of {escape(evaluation.model)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("finding", no_wrap=True)
    for column in ("positive", "AUROC [95 % interval]", "AP"):
        table.add_column(column, justify="right", no_wrap=True)
    notes: dict[str, list[str]] = {}
    for r in evaluation.findings:
        if r.note:
            notes.setdefault(r.note, []).append(r.finding)
        table.add_row(
            f"{r.finding} *" if r.note else r.finding,
            f"{r.positives}/{r.positives + r.negatives}",
            with_interval(r.auroc, r.auroc_low, r.auroc_high),
            _two_digits(r.average_precision),
        )
    macro = evaluation.macro
    table.add_section()
    table.add_row(
        f"macro over {int(macro['num_findings'])} findings",
        "",
        with_interval(macro["auroc"], macro["auroc_low"], macro["auroc_high"]),
        _two_digits(macro["average_precision"]),
        style="bold",
    )
    console = Console(highlight=False)
    console.print(table)
    for note, findings in notes.items():
        console.print(f" * {note}: {', '.join(findings)}", style="dim", markup=False)
    console.print(
        f" {evaluation.header.get('protocol', 'no protocol')}; split: {evaluation.split}; "
        f"{evaluation.cases} cases of {evaluation.patients} patients",
        markup=False,
    )


def print_frame(title: str, frame: pd.DataFrame) -> None:
    """A command's result in the terminal, numbers to three digits; names aren't cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, (name, column) in enumerate(frame.items()):
        is_number = pd.api.types.is_numeric_dtype(column)
        table.add_column(str(name), justify="right" if is_number else "left", no_wrap=index == 0)
    for row in frame.itertuples(index=False):
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row]
        table.add_row(*("–" if cell == "nan" else cell for cell in cells))
    Console().print(table)


def print_scores(scores: Mapping[str, float], development: Mapping[str, float]) -> None:
    """The scores of one scan in the terminal, highest first, and how far to trust them.

    Args:
        scores: Finding to score.
        development: AUROC of each finding on the patients that the training was watched on;
            empty where the checkpoint doesn't say.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Scores (research use only)", title_justify="left")
    table.add_column("finding")
    table.add_column("score", justify="right")
    if development:
        table.add_column("AUROC in development")
    for finding, score in sorted(scores.items(), key=lambda item: -item[1]):
        area = development.get(finding)
        known = "not measured" if area is None else f"{area:.2f}"
        if area is not None and area < metrics.LEARNT_AUROC:
            known += ", not learnt"
        table.add_row(finding, f"{score:.3f}", *([known] if development else []))
    console = Console()
    console.print(table)
    if development:
        trust = f"Not learnt: an AUROC below {metrics.LEARNT_AUROC:.2f} on development patients."
    else:
        trust = (
            "Which findings this model has learnt, its file doesn't say: look at the AUC table "
            "that --cohort gives."
        )
    console.print(f"A score ranks scans, it is no probability of disease. {trust}")


def with_interval(value: float, low: float = float("nan"), high: float = float("nan")) -> str:
    """``0.812 [0.780, 0.841]``, as far as the numbers are defined."""
    if np.isnan(value):
        return "–"
    return f"{value:.3f}" if np.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _two_digits(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def _table(frame: pd.DataFrame, caption: str = "") -> str:
    """An HTML table; numbers to the right, text to the left, everything escaped."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in frame.columns)
    body = []
    for row in frame.itertuples(index=False):
        cells = []
        for value in row:
            is_text = isinstance(value, str) and not value[:1].isdigit()
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            cells.append(f"<td{' class=text' if is_text else ''}>{html.escape(text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _markup(text: str) -> str:
    from markupsafe import Markup

    return Markup(text)
