"""A typed text as a point of the joint space: a phrase against absence, a report as it is.

A report says of most findings that they are absent; a phrase ("pleural effusion") is silent about
all but one. Its embedding is therefore mostly what any text about that finding shares, present or
not, and scans near it are often those without the finding. So a phrase is contrasted: the mean of
the prompts that deny each finding is taken from it, as zero-shot scoring takes one prompt of a pair
from the other. A text that denies something carries its own contrast and is left alone.
"""

from typing import TYPE_CHECKING

import numpy as np

from ctclip.data.mentions import labels_from_text, mentions
from ctclip.embeddings import EmbeddingTable, embed_texts, space_of
from ctclip.findings import FINDINGS
from ctclip.retrieval.search import Archive, Query, project, unit

if TYPE_CHECKING:
    from ctclip.retrieval.question import Background
    from ctclip.retrieval.service import Scorer


def is_phrase(text: str) -> bool:
    """Whether a text names what to look for, and denies no finding."""
    return all(mention.present for mention in mentions(text))


def text_query(
    text: str, archive: Archive, scorer: "Scorer", background: "Background", device: str = "cpu"
) -> Query:
    """The point to search for a text.

    Args:
        text: A phrase or a report.
        archive: What is searched.
        scorer: The archive's model with its prompts.
        background: What similarity is ordinary in the archive.
        device: For example ``"cuda:0"``.

    Raises:
        EmbeddingError: If the archive is of another model.
    """
    name = f"“{text}”"
    space = space_of(scorer.checkpoint)
    vector = archive.project(
        embed_texts(scorer.checkpoint, [text], device=device)[0], space, "report"
    )
    if not is_phrase(text):
        return Query(
            vector=vector,
            name=name,
            ordinary=background.text_ordinary,
            expected=background.text_mean,
            spread=background.text_spread,
        )
    absent = [archive.project(row, space, "report") for row in scorer.prompt_vectors[:, 1]]
    return Query(
        vector=contrasted(vector[None], np.stack(absent))[0],
        name=name,
        ordinary=background.phrase_ordinary,
        expected=background.phrase_mean,
        spread=background.phrase_spread,
    )


def findings_in(text: str) -> np.ndarray:
    """``(18,)``: 1 where a text affirms a finding, 0 where it denies it, else nan."""
    stated = labels_from_text(text)
    return np.array([stated.get(finding, np.nan) for finding in FINDINGS], dtype=np.float32)


def contrasted(phrases: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """``(N, E)`` phrases less the mean of ``(K, E)`` denials, L2-normalised."""
    return np.stack([unit(phrase - absent.mean(axis=0)) for phrase in phrases])


def finding_phrases(scorer: "Scorer", table: EmbeddingTable, device: str = "cpu") -> np.ndarray:
    """``(18, E)``: the point to search for each finding's name, in the order of ``FINDINGS``.

    Raises:
        EmbeddingError: If the table is of another model.
    """
    space = space_of(scorer.checkpoint)
    names = embed_texts(scorer.checkpoint, [f"{finding}." for finding in FINDINGS], device=device)
    named, absent = (
        np.stack([project(row, space, "report", table.provenance, table.transform) for row in rows])
        for rows in (names, scorer.prompt_vectors[:, 1])
    )
    return contrasted(named, absent)
