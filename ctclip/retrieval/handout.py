"""A result as one self-contained HTML file or a PDF."""

import base64
import html
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctclip.retrieval import figure

if TYPE_CHECKING:
    from ctclip.retrieval.service import CaseService

WEB = Path(__file__).with_name("web")
MAX_CASES = 6
"""Similar cases in the picture; more would be too small to see."""


@lru_cache
def texts(language: str) -> dict[str, Any]:
    """The words of the page in a language: ``en`` or ``zh``."""
    words: dict[str, Any] = json.loads((WEB / "words.json").read_text(encoding="utf-8"))
    return words[language if language in words else "en"]


def as_html(service: "CaseService", handle: str, language: str = "en") -> str:
    """A result with its picture, in one file that needs nothing else."""
    result, words = service.result(handle), texts(language)
    names = words["findings"]
    picture = base64.b64encode(_picture(service, handle, result, "png")).decode()
    rows = []
    for rank, hit in enumerate(result["hits"], 1):
        cells = [
            str(rank),
            hit["study"],
            f"{hit['similarity']:.3f}" + (f" ({words['ordinary']})" if hit["is_ordinary"] else ""),
            ", ".join(names[name] for name in hit["shared"]),
            ", ".join(names[name] for name in hit["only_hit"]),
            hit["excerpt"],
        ]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    headings = ("#", words["study"], words["similarity"], words["shared"], words["only_hit"])
    head = "".join(f"<th>{html.escape(text)}</th>" for text in (*headings, words["report"]))
    readings = "".join(
        f"<tr><td>{html.escape(names[reading['finding']])}</td><td>{reading['score']:.3f}</td>"
        f"<td>{_share(reading)}</td><td>{'▲' if reading['is_above'] else ''}</td></tr>"
        for reading in result["readings"] or []
    )
    asked = html.escape(_asked(result, words))
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
        f"<p>{asked}<br>{html.escape(result['time'])} · {html.escape(words['model'])} "
        f"{result['model']}</p><table><tr>{head}</tr>"
        + "".join(f"<tr>{row}</tr>" for row in rows)
        + f'</table><img alt="" src="data:image/png;base64,{picture}">'
        + (f"<h2>{html.escape(words['scores'])}</h2><table>{readings}</table>" if readings else "")
        + "</html>"
    )


def as_pdf(service: "CaseService", handle: str) -> bytes:
    """A result as PDF: the picture, then a page of text. English, for want of a Chinese font."""
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    result, words = service.result(handle), texts("en")
    lines = [words["title"], words["research"], "", _asked(result, words), result["time"], ""]
    for rank, hit in enumerate(result["hits"], 1):
        mark = f" ({words['ordinary']})" if hit["is_ordinary"] else ""
        lines.append(f"{rank}. {hit['study']}  {hit['similarity']:.3f}{mark}")
        lines.append(f"     {words['shared']}: {', '.join(hit['shared']) or '-'}")
        lines.append(f"     {words['only_hit']}: {', '.join(hit['only_hit']) or '-'}")
    lines += ["", words["scores"]] if result["readings"] else []
    for reading in result["readings"] or []:
        lines.append(f"  {reading['finding']:<36}{reading['score']:.3f}   {_share(reading)}")
    buffer = io.BytesIO()
    with PdfPages(buffer, metadata={"Title": words["title"]}) as pages:
        pages.savefig(figure.draw(_panels(service, handle, result)))
        for start in range(0, len(lines), 60):
            page = Figure(figsize=(8.27, 11.69))
            text = "\n".join(_printable(line) for line in lines[start : start + 60])
            page.text(0.08, 0.95, text, va="top", fontsize=9, family="monospace")
            pages.savefig(page)
    return buffer.getvalue()


def _picture(service: "CaseService", handle: str, result: dict[str, Any], kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.draw(_panels(service, handle, result)).savefig(buffer, dpi=90, format=kind)
    return buffer.getvalue()


def _panels(service: "CaseService", handle: str, result: dict[str, Any]) -> list[figure.Panel]:
    def panel(title: str, case: int | None, shared: list[str], other: list[str]) -> figure.Panel:
        hu = service.slices(handle, case)
        shape = hu.shape if hu is not None else (1, 1, 1)
        depth, height, width = (mm / n for mm, n in zip(service.extent_mm, shape, strict=True))
        spacing = (depth, height, width)
        return figure.Panel(title=title, hu=hu, spacing_mm=spacing, shared=shared, other=other)

    found = [reading["finding"] for reading in result["readings"] or [] if reading["is_above"]]
    panels = [panel("Query", None, [], found)]
    for rank, hit in enumerate(result["hits"][:MAX_CASES]):
        title = f"{rank + 1} · {_printable(hit['study'])}\n{hit['similarity']:.3f}"
        panels.append(panel(title, rank, hit["shared"], hit["only_hit"]))
    return panels


def _asked(result: dict[str, Any], words: dict[str, Any]) -> str:
    question = result["question"]
    parts = [words["uploaded_scan"]] if question["scan"] else []
    parts += [question["study"]] if question["study"] else []
    parts += [f"“{question['text']}”"] if question["text"] else []
    parts += [f"+ {study}" for study in question["more"]]
    parts += [f"- {study}" for study in question["less"]]
    return f"{words['query']}: {', '.join(parts)}"


def _share(reading: dict[str, Any]) -> str:
    if reading["share"] is None:
        return ""
    return f"{reading['share']:.0%} ({reading['low']:.0%} - {reading['high']:.0%})"


def _printable(text: str) -> str:
    """What the PDF's font can draw; matplotlib would read ``$`` as mathematics."""
    return text.encode("latin-1", "replace").decode("latin-1").replace("$", r"\$")
