import pytest
import torch
from scans import chest_hu

from ctclip.data.augment import AugmentConfig, augment

HU = torch.from_numpy(chest_hu())
STILL = {"rotate_degrees": 0.0, "scale": 0.0, "blur_voxels": 0.0, "shift_voxels": 0}


def test_a_draw_is_a_function_of_its_seed():
    config = AugmentConfig(probability=1.0)
    assert torch.equal(augment(HU, config, (1, 2, 3)), augment(HU, config, (1, 2, 3)))
    assert not torch.equal(augment(HU, config, (1, 2, 3)), augment(HU, config, (1, 2, 4)))


def test_probability_zero_changes_nothing():
    assert torch.equal(augment(HU, AugmentConfig(probability=0.0), (0,)), HU.float())


def test_the_heart_stays_on_the_left_and_outside_stays_air():
    config = AugmentConfig(probability=1.0, noise_hu=0.0, shift_voxels=0)
    for seed in range(8):
        moved = augment(HU, config, (seed,))
        right, left = moved[10:20, :, 16:32].mean(), moved[10:20, :, 32:48].mean()
        assert left > right + 50
        assert moved[:, 0, 0].max() < -900
        assert moved.min() > -1100


def test_noise_has_at_most_the_configured_deviation():
    config = AugmentConfig(probability=1.0, noise_hu=25.0, **STILL)
    deviations = [(augment(HU, config, (seed,)) - HU).std() for seed in range(10)]
    assert max(deviations) < 26
    assert max(deviations) > 5


def test_a_shift_moves_whole_voxels_and_lets_air_in():
    config = AugmentConfig(probability=1.0, noise_hu=0.0, **(STILL | {"shift_voxels": 3}))
    volume = torch.arange(1.0, 1 + 8 * 9 * 10).reshape(8, 9, 10)
    seen = set()
    for seed in range(40):
        moved = augment(volume, config, (seed,))
        z, y, x = map(int, (moved == volume[4, 4, 4]).nonzero()[0])
        seen.add((z - 4, y - 4, x - 4))
        expected = torch.roll(volume, (z - 4, y - 4, x - 4), dims=(0, 1, 2))
        kept = moved != -1000
        assert torch.equal(moved[kept], expected[kept])
        assert int(kept.sum()) == (8 - abs(z - 4)) * (9 - abs(y - 4)) * (10 - abs(x - 4))
    assert {by for place in seen for by in place} == set(range(-3, 4))


@pytest.mark.parametrize("wrong", [{"probability": 1.5}, {"noise_hu": -1.0}])
def test_impossible_strengths_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        AugmentConfig(**wrong)
