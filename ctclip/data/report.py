"""Radiology reports as text: absent or not, cleaned, split into sentences, sections joined."""

import re
from collections import Counter
from typing import Literal

Sections = Literal["both", "findings", "impression"]

ABSENT = frozenset({"", "nan", "none", "null", "n/a", "na", "not given", "-", "."})
"""Cells that stand for "no text" in CT-RATE and pandas exports, lower case, no full stop."""

_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'"})
_INVISIBLE = re.compile(r"[\u0000-\u0008\u000b-\u001f\u007f\u00ad\u200b-\u200f\u2060\ufeff\ufffd]")
_BULLET = re.compile(r"(?:(?<=\n)|^)[ \t]*[•·▪●◦*➢–—-]+[ \t]+|[•▪●◦➢]")
_QUOTED_BULLET = re.compile(r'(?:^|(?<=[\n.]))[ \t]*"+[ \t]*(?=\S)|"[ \t]*"')
_QUOTE = re.compile(r'"')
_SPACES = re.compile(r"[ \t\u00a0\u2000-\u200a\u202f\u3000]+")

_NEVER_FINAL = "approx|ca|cf|dr|e\\.g|fig|figs|i\\.e|im|img|no|nr|prof|se|ser|st|vs"
"""Abbreviations after which a sentence can't end; "mm." and "etc." may well end one."""

_BOUNDARY = re.compile(
    r"""
    (?<=[。！？；])\s*                                    # Chinese marks need no space
    | (?<=[.!?])(?:["')\]]*)\s+(?=["'(\[]*[A-Z0-9ÇĞİÖŞÜ])   # a mark, then a capital
    | ;\s+(?=[A-Z])                                       # "…window; Aeration …"
    | \n+
    """,
    re.VERBOSE,
)
_ENUMERATOR = re.compile(r"^\(?\d{1,2}[.)]\s*(?=\D|$)")
_ENDS_IN_ABBREVIATION = re.compile(rf"(?:^|[\s(])(?:[A-Z]|{_NEVER_FINAL})\.$", re.IGNORECASE)
_ENDS_IN_ENUMERATOR = re.compile(r"(?:^|\s)\(?\d{1,2}[.)]$")

_HEADING = re.compile(r"\b(findings?|impressions?|conclusions?|opinion)\s*:\s*", re.IGNORECASE)


def clean(text: str | None, counts: "Counter[str] | None" = None) -> str | None:
    """Clean one section; absent text becomes None.

    Args:
        text: A cell of a table.
        counts: Where each rule adds the number of characters, or of texts, that it removed.

    Returns:
        The text with plain quotes and single spaces, without bullets and invisible characters.
        Line breaks are kept: they separate sentences.
    """
    counts = Counter() if counts is None else counts
    if text is None:
        return None
    if text.strip().rstrip(".").lower() in ABSENT:
        if text.strip():
            counts["absent"] += 1
        return None
    cleaned = text.replace("\r\n", "\n").replace("\r", "\n").translate(_QUOTES)
    for rule, pattern, replacement in (
        ("invisible", _INVISIBLE, ""),
        ("bullet", _BULLET, "\n"),
        ("bullet", _QUOTED_BULLET, "\n"),
        ("quote", _QUOTE, ""),
    ):
        cleaned, num = pattern.subn(replacement, cleaned)
        counts[rule] += num
    single = _SPACES.sub(" ", cleaned)
    counts["space"] += len(cleaned) - len(single)
    cleaned = "\n".join(line.strip() for line in single.split("\n") if line.strip())
    return cleaned or None


def split_sentences(text: str) -> list[str]:
    """Split into sentences, good enough to train on single ones.

    Knows decimals, "mm.", "Img. 63", initials, numbered impressions and Chinese punctuation; the
    number in front of a numbered sentence is dropped.
    """
    sentences: list[str] = []
    pending = ""
    for piece in _BOUNDARY.split(text):
        piece = f"{pending} {piece.strip()}".strip()
        pending = ""
        if _ENDS_IN_ABBREVIATION.search(piece) or _ENDS_IN_ENUMERATOR.search(piece):
            pending = piece
            continue
        sentences.append(piece)
    if pending:
        sentences.append(pending)
    stripped = (_ENUMERATOR.sub("", sentence).strip() for sentence in sentences)
    return [sentence for sentence in stripped if re.search(r"\w\w|[\u4e00-\u9fff]", sentence)]


def split_sections(text: str | None) -> tuple[str | None, str | None]:
    """Split a report in one cell into findings and impression at its headings.

    Returns:
        ``(findings, impression)``; a text without headings is all findings.
    """
    if text is None:
        return None, None
    parts = _HEADING.split(text)
    findings: list[str] = [parts[0]]
    impression: list[str] = []
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        (findings if heading.lower().startswith("finding") else impression).append(body)
    return clean("\n".join(findings)), clean("\n".join(impression))


def report_text(findings: str | None, impression: str | None, sections: Sections = "both") -> str:
    """One text for the text tower: the sections that exist and are asked for, in order.

    Returns:
        The joined text, empty where the report has nothing to offer.
    """
    wanted = {
        "both": (findings, impression),
        "findings": (findings,),
        "impression": (impression,),
    }[sections]
    return " ".join(part.replace("\n", " ") for part in wanted if part)
