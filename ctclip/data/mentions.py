"""Which findings a report affirms and which it denies, sentence by sentence, by rules.

A sentence is cut into clauses; in a clause, a synonym names a finding and a cue in front of it or
behind it denies it. Rules can be read and argued with, need no weights, and work on the templates
of a phantom ("Emphysema is not present.") as on translated clinical prose. The vocabulary is data:
``data/mentions.yaml``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

import yaml

from ctclip.data.report import split_sentences
from ctclip.findings import FINDINGS


@dataclass(frozen=True)
class Mention:
    """One finding in one sentence."""

    finding: str
    present: bool
    sentence: str
    hedged: bool = False
    """Whether the sentence only suspects it."""


@dataclass(frozen=True)
class _Finding:
    synonyms: re.Pattern[str]
    exclude: re.Pattern[str] | None
    absent: re.Pattern[str] | None


@dataclass(frozen=True)
class _Vocabulary:
    findings: dict[str, _Finding]
    before: re.Pattern[str]
    after: re.Pattern[str]
    pseudo: re.Pattern[str]
    hedge: re.Pattern[str]


_CLAUSE = re.compile(
    r"[.;:]\s+|\s+(?:but|however|although|though|whereas|while|except(?: for)?|apart from|"
    r"other than|besides)\s+|,\s+(?=(?:there (?:is|are|was|were)|and (?:there|it)|with (?:a |an )?"
    r"(?!no\b))\b)",
    re.IGNORECASE,
)
"""Where a denial ends."""

_RELATIVE = re.compile(
    r"\b(?:that|which|who)(?: \w+ly| also| still| otherwise)? "
    r"(?:is|are|was|were|has|have|had|do|does|did|can|could|may|might|will)(?: ?not|n't)\b"
    r".*?(?=,|\)|\s(?:is|are|was|were|(?:has|have) been|measures?|extends?|involves?|lies?)\b|$)",
    re.IGNORECASE,
)
"""A relative clause with a "not": it qualifies what stands before it and denies only what is in it,
as in "opacity that does not obscure the vessels is present"."""


def mentions(text: str) -> list[Mention]:
    """List every finding that a text mentions, once per sentence.

    Args:
        text: A report, a section, or one sentence.

    Returns:
        Mentions in the order of the sentences. Where the clauses of a sentence disagree about a
        finding, the affirmation wins: "no effusion on the left, but effusion on the right".
    """
    found: list[Mention] = []
    for sentence in split_sentences(text):
        found += _in_sentence(sentence)
    return found


def labels_from_text(text: str) -> dict[str, float]:
    """Report-level labels: 1 if affirmed anywhere, 0 if only denied; unmentioned is left out."""
    labels: dict[str, float] = {}
    for mention in mentions(text):
        labels[mention.finding] = max(labels.get(mention.finding, 0.0), float(mention.present))
    return labels


@lru_cache(maxsize=2**16)  # stock sentences make up most reports
def _in_sentence(sentence: str) -> tuple[Mention, ...]:
    vocabulary = _vocabulary()
    hedged = bool(vocabulary.hedge.search(sentence))
    states: dict[str, bool] = {}
    for clause in _CLAUSE.split(sentence):
        for name, present in _in_clause(clause, vocabulary):
            states[name] = states.get(name, False) or present
    return tuple(
        Mention(name, states[name], sentence, hedged) for name in FINDINGS if name in states
    )


def _in_clause(clause: str, vocabulary: _Vocabulary) -> Iterable[tuple[str, bool]]:
    # Blanked rather than removed, so that positions stay valid.
    cues = vocabulary.pseudo.sub(_blank, clause)
    aside = [match.span() for match in _RELATIVE.finditer(cues)]
    outside = _RELATIVE.sub(_blank, cues)
    for name, rules in vocabulary.findings.items():
        if rules.exclude is not None and rules.exclude.search(clause):
            continue
        # Of "heart 140 mm (normal up to 130): cardiomegaly" the words that deny decide over the
        # synonyms they overlap, the others are judged for themselves.
        absent = None if rules.absent is None else rules.absent.search(cues)
        if absent is not None:
            yield name, False
        for match in rules.synonyms.finditer(clause):
            first, last = match.span()
            if absent is not None and first < absent.end() and absent.start() < last:
                continue
            start, stop = next((span for span in aside if span[0] <= first < span[1]), (0, None))
            around = outside if stop is None else cues
            denied = vocabulary.before.search(around[start:last]) or vocabulary.after.search(
                around[first:stop]
            )
            yield name, not denied


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())


@cache
def _vocabulary() -> _Vocabulary:
    text = resources.files("ctclip.data").joinpath("data/mentions.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    if tuple(data["findings"]) != FINDINGS:
        raise ValueError("mentions.yaml must list the 18 findings in order")
    findings = {
        name: _Finding(
            _any_of(rules["synonyms"]),
            _any_of(rules["exclude"]) if rules.get("exclude") else None,
            _any_of(rules["absent"]) if rules["absent"] else None,
        )
        for name, rules in data["findings"].items()
    }
    return _Vocabulary(
        findings,
        _any_of(data["negation_before"]),
        _any_of(data["negation_after"]),
        _any_of(data["pseudo_negation"]),
        _any_of(data["hedges"]),
    )


def _any_of(patterns: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(rf"\b(?:{pattern})\b" for pattern in patterns), re.IGNORECASE)
