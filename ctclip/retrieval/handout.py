"""A result as one self-contained HTML file or a PDF, in English or Chinese."""

import base64
import html
import io
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctclip.retrieval import figure

if TYPE_CHECKING:
    from reportlab.pdfgen.canvas import Canvas
    from reportlab.platypus import Flowable, SimpleDocTemplate

    from ctclip.retrieval.service import CaseService

WEB = Path(__file__).with_name("web")
MAX_CASES = 6
"""Similar cases in the picture; more would be too small to see."""

PDF_FONT = "Helvetica"
PDF_CHINESE = "STSong-Light"
"""A standard font of PDF: the reader's own Chinese font is used, and none has to travel."""


@lru_cache
def texts(language: str) -> dict[str, Any]:
    """The words of the page in a language: ``en`` or ``zh``."""
    words: dict[str, Any] = json.loads((WEB / "words.json").read_text(encoding="utf-8"))
    return words[language if language in words else "en"]


def as_html(service: "CaseService", handle: str, language: str = "en") -> str:
    """A result with its picture, in one file that needs nothing else."""
    result, words = service.result(handle), texts(language)
    picture = base64.b64encode(_picture(service, handle, result)).decode()
    headings, *cells = _cases(result, words)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    rows = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in cells]
    readings = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>"
        for row in _readings(result, words)
    )
    asked = html.escape(_asked(result, words))
    warnings = "".join(
        f"<p class=note>{html.escape(text)}</p>" for text in _warnings(result, words)
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:70rem}"
        "table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #ccc;"
        "padding:.3rem .6rem;text-align:left;vertical-align:top}img{max-width:100%}"
        ".note{background:#fff3cd;padding:.5rem 1rem}"
    )
    return (
        f'<!doctype html><html lang="{language}"><meta charset="utf-8">'
        f"<title>{html.escape(words['title'])}</title><style>{style}</style>"
        f"<h1>{html.escape(words['title'])}</h1><p class=note>{html.escape(words['research'])}</p>"
        f"{warnings}<p>{asked}<br>{html.escape(result['time'])} · {html.escape(words['model'])} "
        f"{result['model']}</p><table><tr>{head}</tr>"
        + "".join(f"<tr>{row}</tr>" for row in rows)
        + f'</table><img alt="" src="data:image/png;base64,{picture}">'
        + f"<p>{html.escape(words['picture'])}</p>"
        + (f"<h2>{html.escape(words['scores'])}</h2><table>{readings}</table>" if readings else "")
        + "</html>"
    )


def as_pdf(service: "CaseService", handle: str, language: str = "en") -> bytes:
    """A result as PDF: what was asked and found, the picture, and the scores."""
    from reportlab.lib import colors
    from reportlab.lib.pagesizes import A4
    from reportlab.lib.utils import ImageReader
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.cidfonts import UnicodeCIDFont
    from reportlab.platypus import Image, SimpleDocTemplate, Spacer, Table

    pdfmetrics.registerFont(UnicodeCIDFont(PDF_CHINESE))
    grey = colors.Color(0.7, 0.7, 0.7)
    result, words = service.result(handle), texts(language)
    buffer = io.BytesIO()
    document = SimpleDocTemplate(
        buffer, pagesize=A4, title=words["title"], leftMargin=42, rightMargin=42, bottomMargin=56
    )

    def table(rows: list[list[str]], widths: list[float]) -> Table:
        total = document.width / sum(widths)
        cells = [[_paragraph(text, 8) for text in row] for row in rows]
        style = [("VALIGN", (0, 0), (-1, -1), "TOP"), ("LINEBELOW", (0, 0), (-1, -1), 0.3, grey)]
        return Table(cells, [width * total for width in widths], style=style, repeatRows=1)

    picture = _picture(service, handle, result)
    width, height = ImageReader(io.BytesIO(picture)).getSize()
    scale = min(document.width / width, 360 / height)
    made = f"{result['time']} · {words['model']} {result['model']}"
    story: list[Flowable] = [
        _paragraph(words["title"], 15),
        _paragraph(words["research"], 10),
        *(_paragraph(text, 10) for text in _warnings(result, words)),
        Spacer(0, 6),
        _paragraph(_asked(result, words), 9),
        _paragraph(made, 8),
        Spacer(0, 8),
        table(_cases(result, words), [1, 5, 4, 7, 7, 9]),
        Spacer(0, 10),
        Image(io.BytesIO(picture), width * scale, height * scale),
        _paragraph(words["picture"], 8),
    ]
    if result["readings"]:
        story += [Spacer(0, 10), _paragraph(words["scores"], 12)]
        story += [table(_readings(result, words), [8, 2, 5, 1])]

    def footer(canvas: "Canvas", document: "SimpleDocTemplate") -> None:
        note = _paragraph(words["research"], 8)
        note.wrap(document.width, 40)
        note.drawOn(canvas, document.leftMargin, 28)

    document.build(story, onFirstPage=footer, onLaterPages=footer)
    return buffer.getvalue()


def _paragraph(text: str, size: float) -> Any:
    """A paragraph whose characters outside Latin-1 are set in the Chinese font."""
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.platypus import Paragraph

    style = ParagraphStyle(
        "text", fontName=PDF_FONT, fontSize=size, leading=1.4 * size, wordWrap="CJK"
    )
    marked = re.sub(
        r"[^\x00-\xff]+",
        lambda run: f'<font name="{PDF_CHINESE}">{run.group()}</font>',
        html.escape(text, quote=False),
    )
    return Paragraph(marked, style)


def _warnings(result: dict[str, Any], words: dict[str, Any]) -> list[str]:
    """What the reader of the scan doubts; a result saved before there were any has none."""
    return [
        " — ".join(filter(None, (words["warnings"].get(warning["code"]), warning["text"])))
        for warning in result.get("warnings", [])
    ]


def _cases(result: dict[str, Any], words: dict[str, Any]) -> list[list[str]]:
    """Headings, then one row per similar case."""
    names = words["findings"]
    keys = ("study", "similarity", "shared", "only_hit", "report")
    rows = [["#", *(words[key] for key in keys)]]
    for rank, hit in enumerate(result["hits"], 1):
        mark = f" ({words['ordinary']})" if hit["is_ordinary"] else ""
        shared, other = (
            ", ".join(names[name] for name in hit[key]) for key in ("shared", "only_hit")
        )
        similarity = f"{hit['similarity']:.3f}{mark}"
        rows.append([str(rank), hit["study"], similarity, shared, other, hit["excerpt"]])
    return rows


def _readings(result: dict[str, Any], words: dict[str, Any]) -> list[list[str]]:
    """One row per finding: name, score, what it has meant, and whether it is high."""
    return [
        [
            words["findings"][reading["finding"]],
            f"{reading['score']:.3f}",
            _share(reading),
            "▲" if reading["is_above"] else "",
        ]
        for reading in result["readings"] or []
    ]


def _picture(service: "CaseService", handle: str, result: dict[str, Any]) -> bytes:
    """Query and cases side by side as PNG, without words: its caption is in the language asked."""
    cases = range(min(len(result["hits"]), MAX_CASES))
    panels = []
    for case in (None, *cases):
        hu = service.slices(handle, case)
        shape = hu.shape if hu is not None else (1, 1, 1)
        depth, height, width = (mm / n for mm, n in zip(service.extent_mm, shape, strict=True))
        title = "?" if case is None else str(case + 1)
        panels.append(figure.Panel(title=title, hu=hu, spacing_mm=(depth, height, width)))
    buffer = io.BytesIO()
    figure.draw(panels, row_names=()).savefig(buffer, dpi=90, format="png")
    return buffer.getvalue()


def _asked(result: dict[str, Any], words: dict[str, Any]) -> str:
    question = result["question"]
    parts = [words["uploaded_scan"]] if question["scan"] else []
    parts += [question["study"]] if question["study"] else []
    parts += [f"“{question['text']}”"] if question["text"] else []
    parts += [f"+ {study}" for study in question["more"]]
    parts += [f"- {study}" for study in question["less"]]
    if question["text"] and len(parts) > 1:
        parts.append(f"{words['weight']} {question['text_weight']:.0%}")
    conditions = "; ".join(_conditions(question["where"], words))
    filters = f" · {words['filters']}: {conditions}" if conditions else ""
    return f"{words['query']}: {', '.join(parts)}{filters}"


def _conditions(where: dict[str, Any], words: dict[str, Any]) -> list[str]:
    """What a case had to meet to be returned."""
    told = []
    for name, value in where.items():
        values = [value] if isinstance(value, str) else value or []
        texts = [
            words["findings"].get(one, one) if isinstance(one, str) else f"{one:g}"
            for one in values
        ]
        if texts:
            told.append(
                f"{words[name]}: {(' - ' if name in ('age', 'date') else ', ').join(texts)}"
            )
    return told


def _share(reading: dict[str, Any]) -> str:
    if reading["share"] is None:
        return ""
    return f"{reading['share']:.0%} ({reading['low']:.0%} - {reading['high']:.0%})"
