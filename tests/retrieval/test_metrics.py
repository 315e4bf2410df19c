import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from embedding_tables import random_table

from ctclip.embeddings import EmbeddingError
from ctclip.findings import FINDINGS
from ctclip.retrieval import metrics


@pytest.fixture(scope="module")
def fixture(test_data):
    folder = test_data / "ct-clip/fixtures/retrieval"
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = np.array([[int(row[name]) for name in FINDINGS] for row in rows], dtype=np.float32)
    latents = np.load(folder / "latents.npz")
    return latents, labels, json.loads((folder / "expected.json").read_text())


def normalised(vectors):
    vectors = vectors.reshape(len(vectors), -1).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_ct_clips_own_numbers_are_reproduced(fixture):
    latents, labels, expected = fixture
    images, texts = normalised(latents["image"]), normalised(latents["text"])

    per_k = metrics.ct_clip_map_at_k(images, labels)
    printed = metrics.running_mean(per_k)

    assert list(per_k) == expected["v2v_K"]
    assert list(per_k.values()) == pytest.approx(expected["v2v_per_K"], abs=1e-12)
    assert list(printed.values()) == pytest.approx(expected["v2v_original_script"], abs=1e-12)
    names = [str(row) for row in range(len(images))]
    ranks = metrics.pair_ranks(texts, names, images, names)
    for k, recall in expected["r2v_recall"].items():
        assert (ranks <= int(k)).mean() == pytest.approx(recall, abs=1e-12)


def clustered(num_patients=60, width=16, noise=0.05, seed=0):
    """Every case has one of three findings and lies near the centre of its own."""
    rng = np.random.default_rng(seed)
    table = random_table(num_patients, width=width, volumes_per_patient=1)
    kind = np.arange(num_patients) % 3
    centres = rng.normal(size=(3, width))
    labels = np.zeros((num_patients, len(FINDINGS)), dtype=np.float32)
    labels[np.arange(num_patients), kind] = 1
    return replace(
        table,
        vectors=normalised(centres[kind] + noise * rng.normal(size=(num_patients, width))),
        labels=labels,
    )


def test_a_perfect_space_scores_one_and_chance_is_the_share_of_like_cases():
    scores = metrics.volume_to_volume(clustered(), ks=(1, 5))

    for name in ("overlap@5", "precision@5", "MAP@5", "nDCG@5"):
        assert scores[name].value == pytest.approx(1.0)
        assert scores[name].low == pytest.approx(1.0)
    assert scores["precision@5"].chance == pytest.approx(19 / 59, abs=0.06)
    assert scores["precision@5"].pool == 59


def test_a_space_without_signal_scores_like_chance():
    table = random_table(300, volumes_per_patient=1)
    scores = metrics.volume_to_volume(table, ks=(10,))

    assert scores["overlap@10"].low <= scores["overlap@10"].chance <= scores["overlap@10"].high


def test_true_map_is_the_textbooks():
    """Relevant at ranks 1 and 3 of three, two relevant in all: (1/1 + 2/3) / 2."""
    scores = metrics._ranking_scores(np.array([1.0, 0.0, 1.0]), k=3, relevant_from=0.5)

    assert scores["MAP"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["nDCG"] == pytest.approx((1 + 1 / 2) / (1 + 1 / np.log2(3)))


def test_reconstructions_of_a_study_are_one_query():
    table = random_table(40, volumes_per_patient=2)

    assert metrics.volume_to_volume(table, ks=(1,))["overlap@1"].num_queries == 20


def test_a_report_that_equals_its_volume_is_found_first():
    volumes = random_table(30, volumes_per_patient=1)
    reports = replace(volumes, kind="report")

    scores = metrics.report_to_volume(reports, volumes, ks=(1, 10, 100))

    assert scores["report→volume recall@1"].value == 1.0
    assert scores["volume→report median rank"].value == 1.0
    assert scores["report→volume recall@10"].chance == pytest.approx(10 / 30)
    assert "report→volume recall@100" not in scores


def test_a_constant_embedding_ranks_like_chance():
    """Ties must not be a way to win."""
    volumes = random_table(31, volumes_per_patient=1)
    volumes.vectors[:] = volumes.vectors[0]

    scores = metrics.report_to_volume(replace(volumes, kind="report"), volumes, ks=(1, 10))

    assert scores["report→volume median rank"].value == 16.0
    assert scores["report→volume recall@10"].value == 0.0


def test_a_study_is_found_by_its_best_volume():
    pool = np.eye(4, dtype=np.float32)
    ranks = metrics.pair_ranks(pool[[3]], ["b"], pool, ["a", "a", "b", "b"])

    assert ranks.tolist() == [1.0]


def test_a_report_without_a_volume_is_named():
    with pytest.raises(EmbeddingError, match="e\\.g\\. z"):
        metrics.pair_ranks(np.eye(2, dtype=np.float32), ["a", "z"], np.eye(2), ["a", "b"])


def test_per_finding_quality_is_judged_by_other_patients_only():
    """Every patient has four identical volumes of four studies; they must not find each other."""
    table = random_table(80, volumes_per_patient=4)
    table = replace(table, study_id=[f"s{row}" for row in range(80)])
    table.vectors[:] = table.vectors[np.arange(80) // 4 * 4]
    table.labels[:] = table.labels[np.arange(80) // 4 * 4]

    for score in metrics.per_finding(table, k=3).values():
        assert score.pool == 76
        assert score.value < 0.75


def test_per_finding_quality_ignores_cases_that_nobody_labelled():
    table = clustered()
    table.labels[::2, 0] = np.nan

    score = metrics.per_finding(table, k=5)["Medical material"]

    assert score.value == pytest.approx(1.0)
    assert score.num_queries == 10
    assert score.pool == 29
