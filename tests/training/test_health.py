import pytest
import torch

from ctclip.training.health import embedding_health


def test_spread_out_pairs_that_agree_are_healthy():
    image = torch.eye(8)
    health = embedding_health(image, image)

    assert health["effective_dim"] == pytest.approx(7.0)
    assert health["alignment"] == pytest.approx(0.0, abs=1e-6)
    assert health["report_recall_1"] == 1.0


def test_a_line_has_one_dimension():
    image = torch.tensor([[1.0, 0.1 * step] for step in range(6)])
    health = embedding_health(image, torch.ones(6, 2))

    assert health["effective_dim"] == pytest.approx(1.0, abs=0.05)


def test_recall_counts_reports_that_are_nearer_and_forgives_equal_ones():
    image = torch.eye(3)
    text = torch.stack([image[1], image[0], image[2]])

    assert embedding_health(image, text)["report_recall_1"] == pytest.approx(1 / 3)
    assert embedding_health(image, text)["report_recall_5"] == 1.0
    assert embedding_health(image, torch.ones(3, 3))["report_recall_1"] == 1.0
