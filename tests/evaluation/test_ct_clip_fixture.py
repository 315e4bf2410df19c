"""CT-CLIP's own scripts on random scores: their numbers, reproduced."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ctclip.evaluation import importers, metrics, protocols, thresholds
from ctclip.findings import FINDINGS

pytestmark = pytest.mark.skipif(
    "CTCLIP_TEST_DATA" not in os.environ, reason="CTCLIP_TEST_DATA names the shared material"
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(os.environ["CTCLIP_TEST_DATA"]) / "ct-clip" / "fixtures" / "metrics"


@pytest.fixture(scope="module")
def expected(folder) -> dict:
    return json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def table(folder):
    return protocols.load("ct-clip").apply(importers.ct_clip(folder))


def test_findings_are_in_ct_clips_order(table, expected):
    assert list(table.findings) == expected["labels"] == list(FINDINGS)


def test_auroc_is_ct_clips(table, expected):
    evaluation = metrics.evaluate(table, replicates=0)
    for result in evaluation.findings:
        assert result.auroc == pytest.approx(expected["auc"][result.finding], abs=1e-12)


def test_external_rule_is_ct_clips(folder, expected):
    raw = importers.ct_clip(folder)
    # the outside cohort has one calcification column, which stands for both findings
    arterial, coronary = map(
        FINDINGS.index, ("Arterial wall calcification", "Coronary artery wall calcification")
    )
    raw.labels[:, coronary] = raw.labels[:, arterial]
    found = metrics.evaluate(protocols.load("rad-chestct-16").apply(raw), replicates=0)
    areas = {result.finding: result.auroc for result in found.findings}
    assert set(areas) == set(expected["auc_external"])
    for finding, area in areas.items():
        assert area == pytest.approx(expected["auc_external"][finding], abs=1e-12)


def test_optimistic_thresholds_and_what_follows_are_ct_clips(table, expected):
    chosen = thresholds.optimistic(table)
    frame = thresholds.operating_table(table, chosen)
    np.testing.assert_allclose(list(chosen.values()), expected["thresholds"], atol=1e-12)
    np.testing.assert_allclose(frame["f1_weighted"], expected["f1_weighted"], atol=1e-12)
    np.testing.assert_allclose(frame["accuracy"], expected["accuracy"], atol=1e-12)
    np.testing.assert_allclose(frame["precision"], expected["precision_positive"], atol=1e-12)
