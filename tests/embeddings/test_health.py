from dataclasses import replace

import numpy as np
import pytest
from embedding_tables import random_table

from ctclip.embeddings.health import effective_dimension, health


def test_isotropic_vectors_use_every_dimension():
    found = health(random_table(4000, width=16))

    assert found.effective_dimension == pytest.approx(16, rel=0.02)
    assert found.mean_cosine == pytest.approx(0.0, abs=0.01)


def test_a_cone_shows_in_the_mean_cosine():
    table = random_table(1000, width=16)
    vectors = table.vectors + 3.0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    assert health(replace(table, vectors=vectors)).mean_cosine > 0.95


def test_a_plane_has_two_dimensions_and_a_point_none():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(5000, 2)) @ np.linalg.qr(rng.normal(size=(16, 2)))[0].T

    assert effective_dimension(flat) == pytest.approx(2, rel=0.02)
    assert effective_dimension(np.ones((10, 16))) == 0.0
