"""A study's report becomes the texts that one training step needs.

Zero-shot asks with one short sentence; reports are paragraphs. A model that only ever saw
paragraphs is asked something it never learned, so each study also gives one sentence (HLIP, 2025),
and each finding gives a pair of opposite sentences (Mishra et al. 2023; COLIPRI, 2026). Which
sentence states or negates which finding is read from the reports themselves: no label table.
"""

import functools
import hashlib
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.random import Generator

from ctclip import distributed
from ctclip.config import require_in
from ctclip.data.manifest import VolumeRecord
from ctclip.data.mentions import Mention, mentions
from ctclip.data.report import clean, report_text, split_sentences
from ctclip.findings import FINDINGS

if TYPE_CHECKING:
    from ctclip.models.text import TextLengths, Tokenizer

TEMPLATES: tuple[tuple[str, str], ...] = (
    ("{} is present.", "{} is not present."),
    ("There is {}.", "There is no {}."),
    ("{}.", "No {}."),
    ("{} is seen.", "{} is not seen."),
    ("Findings of {}.", "No evidence of {}."),
    ("{} was observed.", "{} was not observed."),
)
"""Ways to state a finding, and to negate it in the same words."""


SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("pleural effusion", "pleural fluid", "fluid in the pleural space"),
    ("pericardial effusion", "pericardial fluid", "fluid in the pericardial space"),
    ("cardiomegaly", "enlarged heart", "cardiac enlargement"),
    ("lymphadenopathy", "enlarged lymph nodes"),
    ("hiatal hernia", "hiatus hernia"),
    ("nodule", "nodular lesion"),
    ("ground-glass opacity", "ground glass density", "hazy opacity"),
    ("consolidation", "airspace opacification"),
    ("atelectasis", "volume loss"),
    ("emphysema", "emphysematous change"),
    ("bronchiectasis", "bronchial dilatation"),
    ("bronchial wall thickening", "peribronchial thickening"),
    ("interlobular septal thickening", "thickened interlobular septa"),
    ("mosaic attenuation", "mosaic perfusion"),
)
"""Phrases that hospitals use for one thing, each of which can stand in the other's place."""


REPORT_SAMPLE = 8192
"""Studies whose reports are read before the start; the others are read with their volumes."""

_GROUP_OF = {phrase: group for group in SYNONYMS for phrase in group}
_PHRASE = re.compile(
    # Longest first, whole words: "nodule" is not to be found in "nodules".
    rf"\b({'|'.join(sorted(map(re.escape, _GROUP_OF), key=len, reverse=True))})\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class TextViewConfig:
    """What the text tower reads."""

    sections: Literal["both", "findings", "impression"] = "both"

    shuffle_sentences: bool = True
    """Sentence order carries the hospital's template and nothing about the patient."""

    drop_section: float = 0.0
    """How often one of the two sections is left out, as hospitals do that only write one."""

    synonyms: float = 0.0
    """How often a phrase becomes another hospital's word for it, see :data:`SYNONYMS`."""

    template_share: float = 0.5
    """How often an opposite-sentence pair is a template rather than sentences from reports."""

    def __post_init__(self) -> None:
        require_in(self, "text.", 0, 1, "drop_section", "synonyms", "template_share")


@dataclass(frozen=True)
class StudyText:
    """A report, read once."""

    findings: str | None
    impression: str | None
    sentences: tuple[str, ...]
    polarity: tuple[float, ...]
    """Per finding: 1 stated, 0 negated, nan not mentioned."""
    normal: bool
    """The report mentions findings and states none."""

    single: tuple[tuple[str, bool, str], ...] = ()
    """(finding, stated, sentence) of the sentences that speak of one finding only."""


def read_study(record: VolumeRecord) -> StudyText:
    """Split a record's report into sentences and find which findings it states or negates.

    A finding that is both stated and negated (a small effusion left, none on the right) counts as
    stated.
    """
    return _read(record.findings, record.impression)


def read_sample(
    records: Sequence[VolumeRecord], *, most: int = REPORT_SAMPLE, seed: int = 0
) -> list[StudyText]:
    """Read the reports of up to ``most`` studies, each process its share of them.

    A real report takes milliseconds to read, and a cohort may hold millions.

    Args:
        records: One per volume.
        most: Studies at the most; a larger cohort gives a random sample of that size.
        seed: Of the sample.

    Returns:
        One per study, the same list on every rank.
    """
    chosen = list({record.study_id: record for record in records}.values())
    if len(chosen) > most:
        rng = np.random.default_rng([seed, 20_261])
        chosen = [chosen[i] for i in np.sort(rng.choice(len(chosen), most, replace=False))]
    rank, world = distributed.rank(), distributed.world_size()
    parts = distributed.gather_objects([read_study(record) for record in chosen[rank::world]])
    return [parts[i % world][i // world] for i in range(len(chosen))]


@functools.lru_cache(maxsize=4096)
def _read(findings: str | None, impression: str | None) -> StudyText:
    findings, impression = clean(findings), clean(impression)
    text = report_text(findings, impression)
    polarity = dict.fromkeys(FINDINGS, float("nan"))
    of_sentence: dict[str, list[Mention]] = {}
    for mention in mentions(text):
        of_sentence.setdefault(mention.sentence, []).append(mention)
        stated = polarity[mention.finding] == 1.0
        polarity[mention.finding] = 1.0 if mention.present or stated else 0.0
    values = tuple(polarity.values())
    return StudyText(
        findings=findings,
        impression=impression,
        sentences=tuple(split_sentences(text)),
        polarity=values,
        normal=0.0 in values and 1.0 not in values,
        single=tuple(
            (found[0].finding, found[0].present, sentence)
            for sentence, found in of_sentence.items()
            if len(found) == 1
        ),
    )


def report_view(study: StudyText, config: TextViewConfig, rng: Generator) -> str:
    """The whole report as one text, varied as configured."""
    findings, impression = study.findings, study.impression
    if findings and impression and rng.random() < config.drop_section:
        findings, impression = (findings, None) if rng.random() < 0.5 else (None, impression)
    text = report_text(findings, impression, sections=config.sections)
    if not text:  # the section asked for is missing: better the other one than nothing
        text = report_text(findings, impression)
    if config.shuffle_sentences:
        sentences = split_sentences(text)
        text = " ".join(sentences[index] for index in rng.permutation(len(sentences)))
    return reworded(text, config.synonyms, rng)


def sentence_view(study: StudyText, config: TextViewConfig, rng: Generator) -> str:
    """One sentence of the report, each with the same chance."""
    if not study.sentences:
        return ""
    sentence = study.sentences[int(rng.integers(len(study.sentences)))]
    return reworded(sentence, config.synonyms, rng)


def reworded(text: str, share: float, rng: Generator) -> str:
    """Replace a share of the phrases in :data:`SYNONYMS` by others of the same meaning."""
    if share == 0.0:
        return text

    def swap(match: re.Match[str]) -> str:
        phrase = match.group()
        if rng.random() >= share:
            return phrase
        group = _GROUP_OF[phrase.lower()]
        others = [other for other in group if other != phrase.lower()]
        other = others[int(rng.integers(len(others)))]
        return other[0].upper() + other[1:] if phrase[0].isupper() else other

    return _PHRASE.sub(swap, text)


def text_lengths(
    records: Iterable[VolumeRecord], tokenizer: "Tokenizer", config: TextViewConfig
) -> "TextLengths":
    """Count what the tokenizer's limit takes from the reports, each different one once.

    Every process counts its share.
    """
    reports = dict.fromkeys(
        report_text(record.findings, record.impression, config.sections) for record in records
    )
    mine = [text for text in reports if text][distributed.rank() :: distributed.world_size()]
    return functools.reduce(operator.add, distributed.gather_objects(tokenizer.lengths(mine)))


def text_id(text: str) -> int:
    """A non-negative 63-bit identity of a text: equal texts are not each other's negatives."""
    digest = hashlib.blake2b(text.strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SentenceBank:
    """Sentences that state or negate each finding, collected from the training reports.

    Only sentences about a single finding are kept: "no effusion or consolidation" says nothing
    that belongs to one of the two.

    Args:
        studies: Training reports.
        most: Sentences kept per finding and polarity.
    """

    def __init__(self, studies: Iterable[StudyText], most: int = 200) -> None:
        kept: dict[tuple[str, bool], dict[str, None]] = {}
        self._stated = np.zeros(len(FINDINGS))
        self._known = np.zeros(len(FINDINGS))
        self._num_studies = 0
        for study in studies:
            polarity = np.asarray(study.polarity)
            self._known += ~np.isnan(polarity)
            self._stated += np.nan_to_num(polarity)
            self._num_studies += 1
            for finding, present, sentence in study.single:
                bucket = kept.setdefault((finding, present), {})
                if len(bucket) < most:
                    bucket.setdefault(sentence)
        self._sentences = {key: list(bucket) for key, bucket in kept.items()}

    def rate(self, silence: float = 0.0) -> np.ndarray:
        """How often each finding is stated among its mentions.

        Args:
            silence: How much a report that says nothing of a finding counts as negating it.

        Returns:
            ``(F,)``, shrunk towards one half by one mention.
        """
        silent = self._num_studies - self._known
        return (self._stated + 0.5) / (self._known + silence * silent + 1.0)

    def num_sentences(self, finding: str, present: bool) -> int:
        """How many different sentences state (or negate) a finding."""
        return len(self._sentences.get((finding, present), ()))

    def pairs(self, rng: Generator, template_share: float) -> tuple[list[str], list[str]]:
        """Draw one (present, absent) pair of texts per finding.

        Args:
            rng: The same on every rank, so that all ranks ask the same question.
            template_share: How often a template is taken although sentences are there.

        Returns:
            Two lists of ``F`` texts in the order of :data:`ctclip.findings.FINDINGS`.
        """
        present, absent = [], []
        for finding in FINDINGS:
            positive, negative = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
            use_template = rng.random() < template_share
            pick = rng.random(2)
            texts = []
            for template, is_present, share in ((positive, True, 0), (negative, False, 1)):
                sentences = self._sentences.get((finding, is_present), [])
                if use_template or not sentences:
                    texts.append(fill(template, finding))
                else:
                    texts.append(sentences[int(pick[share] * len(sentences))])
            present.append(texts[0])
            absent.append(texts[1])
        return present, absent


def prompts(template: tuple[str, str] = TEMPLATES[0]) -> tuple[list[str], list[str]]:
    """The (present, absent) sentences of every finding in one template."""
    positive, negative = template
    return [fill(positive, name) for name in FINDINGS], [fill(negative, name) for name in FINDINGS]


def fill(template: str, finding: str) -> str:
    """Put a finding's name into a template, with a capital only where a sentence starts."""
    name = finding if template.startswith("{}") else finding.lower()
    return template.format(name)


def polarity_table(studies: Sequence[StudyText]) -> np.ndarray:
    """``(b, F)`` float32: 1 stated, 0 negated, nan not mentioned."""
    return np.asarray([study.polarity for study in studies], dtype=np.float32)
