"""What a typed text finds, in a joint space where the right answer is known."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from embedding_stubs import StubCheckpoint
from embedding_tables import random_table

from ctclip.embeddings import embed_texts, space_of
from ctclip.findings import FINDINGS
from ctclip.retrieval.phrase import finding_phrases, is_phrase, text_query
from ctclip.retrieval.question import Background, compose
from ctclip.retrieval.search import MemoryArchive, Query

WIDTH = 1 + len(FINDINGS)


class JointSpace(torch.nn.Module):
    """Axis 0 is "a chest without findings", axis i + 1 is finding i; short texts lie near axis 0.

    So it is in a trained model: what a phrase shares with its own denial outweighs the finding.
    """

    def encode_text(self, tokens, normalize=False):
        return torch.nn.functional.normalize(tokens, dim=1)


@dataclass
class Checkpoint(StubCheckpoint):
    model: torch.nn.Module = field(default_factory=JointSpace)

    def tokenizer(self, texts):
        rows = torch.zeros(len(texts), WIDTH)
        for row, text in zip(rows, texts, strict=True):
            row[0] = 0.9
            for index, finding in enumerate(FINDINGS):
                if finding.lower() in text.lower():
                    row[index + 1] = 0.05
        return rows


class Scorer:
    checkpoint = Checkpoint()

    @property
    def prompt_vectors(self):
        present = np.eye(WIDTH, dtype=np.float32)[1:]
        absent = np.tile(np.eye(WIDTH, dtype=np.float32)[0], (len(FINDINGS), 1))
        return np.stack([present, absent], axis=1)


def planted_table(num_rows=200):
    """A volume's part on axis 0 shrinks with every finding that it shows."""
    table = random_table(num_rows, width=WIDTH, volumes_per_patient=1)
    table.labels[:] = np.random.default_rng(0).random(table.labels.shape) < 0.15
    vectors = np.concatenate([np.ones((num_rows, 1)), 0.5 * table.labels], axis=1)
    vectors += np.random.default_rng(1).normal(scale=0.02, size=vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return replace(
        table, vectors=vectors.astype(np.float32), provenance=space_of(Scorer.checkpoint)
    )


def precision(archive, query, finding, k=10):
    column = FINDINGS.index(finding)
    return np.mean([hit.labels[column] for hit in archive.search(query, k=k)])


@pytest.mark.parametrize("finding", ["Pleural effusion", "Lung nodule", "Emphysema"])
def test_a_phrase_finds_the_cases_with_the_finding(finding):
    archive = MemoryArchive(planted_table())
    plain = Query(vector=embed_texts(Scorer.checkpoint, [finding])[0])

    query = text_query(finding, archive, Scorer(), Background())

    assert precision(archive, plain, finding) < 0.5
    assert precision(archive, query, finding) == 1.0


def test_a_report_that_denies_something_is_searched_as_it_is():
    archive = MemoryArchive(planted_table())
    report = "Pleural effusion on the right. No pericardial effusion."

    query = text_query(report, archive, Scorer(), Background(text_ordinary=0.7, text_mean=0.5))

    np.testing.assert_allclose(query.vector, embed_texts(Scorer.checkpoint, [report])[0])
    assert (query.ordinary, query.expected) == (0.7, 0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bilateral pleural effusion with compressive atelectasis", True),
        ("coarse reticulation", True),
        ("no pleural effusion", False),
        ("Cardiomegaly. No pericardial effusion.", False),
    ],
)
def test_a_text_is_a_phrase_unless_it_denies_a_finding(text, expected):
    assert is_phrase(text) is expected


@pytest.mark.parametrize("has_scan", [False, True])
def test_a_phrase_marks_as_ordinary_what_most_volumes_reach(has_scan):
    table = planted_table(1000)
    archive = MemoryArchive(table)
    background = Background.of(table, phrases=finding_phrases(Scorer(), table))
    marked = []
    for row, finding in enumerate(FINDINGS):
        text = text_query(finding, archive, Scorer(), background)
        scans = [Query(vector=table.vectors[row])] if has_scan else []
        hits = archive.search(compose(scans, [], text, background), k=1000)
        marked.append(np.mean([hit.is_ordinary for hit in hits]))

    assert np.mean(marked) == pytest.approx(0.95, abs=0.03)
