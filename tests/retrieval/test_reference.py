from dataclasses import replace

import numpy as np
import pytest
from embedding_tables import random_table

from ctclip.findings import FINDINGS
from ctclip.retrieval.reference import Reference, wilson


def scored(num_cases=4000, seed=0):
    """Scores that are probabilities: a case scored 0.7 has the finding with 0.7."""
    rng = np.random.default_rng(seed)
    table = random_table(num_cases, volumes_per_patient=1)
    scores = rng.random((num_cases, len(FINDINGS))).astype(np.float32)
    labels = (rng.random(scores.shape) < scores).astype(np.float32)
    return replace(table, scores=scores, labels=labels)


def test_wilsons_interval_is_the_textbooks():
    share, low, high = wilson(8, 10)

    assert share == 0.8
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10)[1] == 0.0


@pytest.mark.parametrize("score", [0.1, 0.5, 0.9])
def test_a_calibrated_score_is_read_as_itself(score):
    readings = Reference.of(scored()).read(np.full(len(FINDINGS), score))

    covered = [reading.low - 0.03 <= score <= reading.high + 0.03 for reading in readings]
    assert np.mean(covered) > 0.9
    assert np.mean([reading.share for reading in readings]) == pytest.approx(score, abs=0.03)


def test_the_operating_point_separates_what_can_be_separated():
    table = scored(400)
    table.labels[:, 0] = (table.scores[:, 0] > 0.62).astype(np.float32)
    reference = Reference.of(table)

    reading = reference.read(np.full(len(FINDINGS), 0.7))[0]

    assert reference.threshold[0] == pytest.approx(0.62, abs=0.01)
    assert (reading.sensitivity, reading.specificity) == (1.0, 1.0)
    assert reading.is_above
    assert not reference.read(np.full(len(FINDINGS), 0.5))[0].is_above


def test_a_finding_without_both_classes_has_no_operating_point():
    table = scored(50)
    table.labels[:, 3] = np.nan
    table.labels[:, 4] = 0

    readings = Reference.of(table).read(np.full(len(FINDINGS), 0.5))

    assert readings[3].share is None
    assert readings[3].is_above is None
    assert readings[4].share == 0.0
    assert readings[4].is_above is None


def test_a_table_without_scores_gives_no_reference():
    assert Reference.of(random_table(5)) is None
