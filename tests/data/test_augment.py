import pytest
import torch
from scans import chest_hu

from ctclip.data.augment import AugmentConfig, augment

HU = torch.from_numpy(chest_hu())


def test_a_draw_is_a_function_of_its_seed():
    config = AugmentConfig(probability=1.0)
    assert torch.equal(augment(HU, config, (1, 2, 3)), augment(HU, config, (1, 2, 3)))
    assert not torch.equal(augment(HU, config, (1, 2, 3)), augment(HU, config, (1, 2, 4)))


def test_probability_zero_changes_nothing():
    assert torch.equal(augment(HU, AugmentConfig(probability=0.0), (0,)), HU.float())


def test_the_heart_stays_on_the_left_and_outside_stays_air():
    config = AugmentConfig(probability=1.0, noise_hu=0.0)
    for seed in range(8):
        moved = augment(HU, config, (seed,))
        right, left = moved[10:20, :, 16:32].mean(), moved[10:20, :, 32:48].mean()
        assert left > right + 50
        assert moved[:, 0, 0].max() < -900
        assert moved.min() > -1100


def test_noise_has_at_most_the_configured_deviation():
    config = AugmentConfig(probability=1.0, rotate_degrees=0.0, scale=0.0, blur_voxels=0.0)
    deviations = [(augment(HU, config, (seed,)) - HU).std() for seed in range(10)]
    assert max(deviations) < 26
    assert max(deviations) > 5


@pytest.mark.parametrize("wrong", [{"probability": 1.5}, {"noise_hu": -1.0}])
def test_impossible_strengths_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        AugmentConfig(**wrong)
