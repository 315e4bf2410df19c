from dataclasses import replace

import numpy as np
import pytest
from embedding_tables import random_table

from ctclip.embeddings import EmbeddingError, EmbeddingTable, health
from ctclip.embeddings.transform import fit


def collapsed(num_rows=3000, seed=0):
    """A cone: every vector is nearly the same, and what varies lies in three directions."""
    rng = np.random.default_rng(seed)
    table = random_table(num_rows, width=16)
    vectors = 5 * np.eye(16)[0] + rng.normal(size=(num_rows, 16)) * np.r_[0, 1, 1, 1, [0.1] * 12]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return replace(table, vectors=vectors.astype(np.float32))


def test_centring_opens_the_cone_and_whitening_uses_more_dimensions():
    table = collapsed()

    raw = health(table)
    centred = health(table.transformed(fit(table.vectors)))
    whitened = health(table.transformed(fit(table.vectors, whiten=True)))

    assert raw.mean_cosine > 0.85
    assert abs(centred.mean_cosine) < 0.05
    assert whitened.effective_dimension > 1.2 * centred.effective_dimension


def test_each_modality_has_its_own_mean():
    """A constant gap between volumes and reports vanishes."""
    volumes = collapsed().vectors
    texts = -volumes[:, ::-1].copy()
    transform = fit(volumes, texts)

    before = np.linalg.norm(volumes.mean(axis=0) - texts.mean(axis=0))
    moved = transform(volumes, "volume").mean(axis=0) - transform(texts, "report").mean(axis=0)

    assert before > 1
    assert np.linalg.norm(moved) < 0.1


@pytest.mark.parametrize("whiten", [False, True])
def test_a_transform_travels_with_its_table(tmp_path, whiten):
    table = collapsed(50)
    moved = table.transformed(fit(table.vectors, whiten=whiten))

    moved.save(tmp_path / "t.parquet")
    loaded = EmbeddingTable.load(tmp_path / "t.parquet")

    assert loaded.transform.name == moved.transform.name
    again = loaded.transform(table.vectors, "volume")
    np.testing.assert_array_equal(again, moved.vectors)


def test_a_transformed_table_is_of_another_space():
    table = collapsed(50)
    moved = table.transformed(fit(table.vectors))

    with pytest.raises(EmbeddingError, match=r"transform.*None.*centred-"):
        table.require_same_space(moved)
    with pytest.raises(EmbeddingError, match="already"):
        moved.transformed(moved.transform)


def test_one_volume_is_too_few():
    with pytest.raises(ValueError, match="at least 2"):
        fit(np.ones((1, 4), dtype=np.float32))
