from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctclip.evaluation import metrics, regions, scoring
from ctclip.models.vit3d import ViT3D


def test_one_patch_is_found_by_top_k_and_lost_in_the_mean():
    rng = np.random.default_rng(0)
    direction = torch.zeros(1, 16)
    direction[0, 0] = 1.0
    labels = (np.arange(80) % 2).astype(float)
    patches = torch.from_numpy(rng.normal(size=(80, 6, 6, 6, 16)).astype(np.float32))
    patches[labels == 1, 3, 2, 1, 0] += 12.0
    best = regions.top_k(patches, direction, 1)[:, 0].numpy()
    mean = regions.top_k(patches, direction, 216)[:, 0].numpy()
    assert metrics.auroc(labels, best) > 0.95
    assert metrics.auroc(labels, mean) < 0.85


def test_the_peak_is_the_patch_that_resembles_the_finding():
    """A real tower of random weights; the direction is what a bright spot does to its patch."""
    torch.manual_seed(0)
    tower = ViT3D(embed_dim=16, width=48, depth=1, heads=2, patch=(4, 4, 4)).eval()
    model = torch.nn.Module()
    model.encode_patches = tower.patches
    config = SimpleNamespace(windows_hu=((-1000.0, 1000.0),))
    checkpoint = SimpleNamespace(model=model, volume_config=config)
    hu = np.full((16, 16, 16), -1000, dtype=np.int16)
    hu[8:12, 4:8, 12:16] = 300
    with torch.inference_mode():
        with_spot = tower.patches(torch.from_numpy(hu)[None, None] / 1000.0)[0]
    direction = (with_spot[2, 1, 3] - with_spot.mean(dim=(0, 1, 2))).numpy()
    assert regions.peak(checkpoint, hu, direction) == (10, 6, 14)


@pytest.mark.parametrize("size", [(10, 10, 10), (11, 25, 7), (30, 30, 30)])
def test_windows_cover_every_voxel_and_stay_inside(size):
    seen = np.zeros(size, dtype=int)
    for box in regions.windows(size, (10, 10, 10)):
        seen[box] += 1
        assert all(part.stop <= total for part, total in zip(box, size, strict=True))
    assert seen.min() >= 1
    assert len(list(regions.windows((10, 10, 10), (10, 10, 10)))) == 1


def test_whitening_uses_training_volumes_and_undoes_a_dominating_direction():
    rng = np.random.default_rng(0)

    def volumes(n):
        labels = (rng.random(n) < 0.5).astype(float)
        vectors = rng.normal(size=(n, 12))
        vectors[:, 0] *= 25  # what all cases share, such as the scanner
        vectors[:, 1] += 3 * labels
        return labels, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    _, train = volumes(500)
    labels, test = volumes(300)
    prompts = np.zeros((1, 2, 12))
    prompts[0, :, 1] = 1.0, -1.0
    prompts[0, :, 0] = 0.6, -0.6
    prompts /= np.linalg.norm(prompts, axis=-1, keepdims=True)
    raw = scoring.scores(test, prompts, 1.0, "cosine-difference")[:, 0]
    moved = scoring.moved(train, test, prompts, "whitened")
    white = scoring.scores(*moved, 1.0, "cosine-difference")[:, 0]
    assert metrics.auroc(labels, white) > metrics.auroc(labels, raw) + 0.1


def test_parts_and_spaces_do_not_mix():
    with pytest.raises(ValueError, match="whole volumes, not to parts"):
        scoring.ZeroShotConfig(patches=4, space="centred")
