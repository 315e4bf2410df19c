"""The command that says how good an export is for finding cases."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from embedding_tables import random_table

from ctclip import cli
from ctclip.findings import FINDINGS
from ctclip.retrieval import metrics
from ctclip.retrieval.quality import CT_CLIP, CT_CLIP_PRINTED, QualityConfig, run

CONFIGS = Path(__file__).parents[2] / "configs" / "retrieval"


@pytest.fixture
def export(tmp_path):
    """Sixty patients whose reports equal their volumes."""
    table = random_table(60, volumes_per_patient=1)
    table.save(tmp_path / "volumes.parquet")
    replace(table, kind="report").save(tmp_path / "reports.parquet")
    return tmp_path, table


def test_the_command_writes_every_number_with_interval_chance_and_pool(export):
    folder, table = export
    cli.retrieval_quality(
        [
            f"--table={folder / 'volumes.parquet'}",
            f"--reports={folder / 'reports.parquet'}",
            f"--out={folder / 'quality'}",
            f"--config={CONFIGS / 'base.yaml'}",
            "replicates=50",
        ]
    )

    found = json.loads((folder / "quality" / "retrieval.json").read_text(encoding="utf-8"))
    names = [f"{name}@{k}" for k in (1, 5, 10, 50) for name in ("precision", "MAP", "nDCG")]
    assert set(names) <= set(found["like cases"])
    assert found["own report"]["report→volume recall@1"]["value"] == 1.0
    assert "report→volume recall@100" not in found["own report"]
    assert found["own report"]["volume→report median rank"]["chance"] == 30.5
    for group in ("like cases", "own report", "per finding"):
        for row in found[group].values():
            assert row["low"] <= row["value"] <= row["high"]
            assert row["pool"] in (59, 60)
    expected = metrics.ct_clip_map_at_k(table.vectors, np.nan_to_num(table.labels), (1, 5, 10, 50))
    assert list(found[CT_CLIP].values()) == pytest.approx(list(expected.values()))
    assert found[CT_CLIP_PRINTED]["5"] == pytest.approx((expected[1] + expected[5]) / 2)
    text = (folder / "quality" / "retrieval.md").read_text(encoding="utf-8")
    assert "running mean" in text
    assert text.count("| pool |") == 4


def test_what_was_planted_can_be_judged_by_instead_of_the_labels(export):
    folder, table = export
    planted = np.zeros((60, len(FINDINGS)), dtype=int)
    planted[:30, 4] = 1
    frame = pd.DataFrame(planted, columns=list(FINDINGS))
    frame.insert(0, "volume_id", table.volume_id)
    frame.to_csv(folder / "truth.csv", index=False)
    config = QualityConfig(table=folder / "volumes.parquet", truth=folder / "truth.csv")

    found = run(config)

    assert list(found["per finding"]) == [FINDINGS[4]]
    assert found["per finding"][FINDINGS[4]].num_queries == 30
    frame[:10].to_csv(folder / "truth.csv", index=False)
    with pytest.raises(ValueError, match="lacks 50 of the table's 60 volumes"):
        run(config)


def test_the_interval_is_that_of_whole_patients_drawn_again():
    """Four equal values a patient: as wide as if each patient were asked once."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.random(40), 4)
    patients = [f"p{row // 4}" for row in range(160)]

    estimate = metrics._estimate(values, patients, [0.5], [10], 0, 4000)

    assert estimate.value == pytest.approx(values.mean())
    width = 2 * 1.96 * values[::4].std() / 40**0.5
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.1)
    assert metrics._median(np.array([1.0, 2, 5]), np.array([1, 0, 3])) == 5.0
    assert metrics._median(np.array([1.0, 2, 5]), np.array([2, 1, 1])) == 1.5


def test_a_search_by_name_is_scored_like_scikit_learn_does():
    from sklearn.metrics import average_precision_score

    table = random_table(200, volumes_per_patient=1)
    texts = random_table(len(FINDINGS), volumes_per_patient=1, seed=3).vectors
    table.labels[::7, 2] = np.nan

    found = metrics.per_finding_text(table, texts, replicates=100)

    for index, finding in enumerate(FINDINGS):
        known = ~np.isnan(table.labels[:, index])
        label, score = table.labels[known, index], (table.vectors @ texts[index])[known]
        estimate = found[finding]
        assert estimate.value == pytest.approx(average_precision_score(label, score))
        assert estimate.low < estimate.value < estimate.high
        assert (estimate.chance, estimate.pool) == (pytest.approx(label.mean()), known.sum())
