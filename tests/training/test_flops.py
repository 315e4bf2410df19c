import pytest
from training_runs import TINY

from ctclip import config
from ctclip.models.ctclip import CTCLIP, ModelConfig, build_model
from ctclip.models.text import freeze
from ctclip.training import flops

SIZE = (8, 16, 16)


def model(**vision: object) -> CTCLIP:
    settings = TINY["model"] | {"vision": TINY["model"]["vision"] | vision}
    return build_model(config.from_dict(ModelConfig, settings))


def test_a_frozen_tower_has_no_backward():
    both, no_volumes, no_texts, neither = model(), model(), model(), model()
    for frozen in (no_volumes.visual, no_texts.text, neither.visual, neither.text):
        freeze(frozen)
    counts = [flops.per_study(m, SIZE, 1) for m in (both, no_volumes, no_texts, neither)]

    assert counts[0] == pytest.approx(3 * counts[3])
    assert counts[0] - counts[1] + counts[0] - counts[2] == pytest.approx(2 * counts[3])
    assert counts[3] < counts[1] < counts[0]


def test_dropped_patches_cost_nothing_in_the_blocks():
    whole, half = (flops.per_study(model(patch_dropout=p), SIZE, 1) for p in (0.0, 0.5))
    tokens, width = 8, 32
    projections = 2 * (3 + 1 + 4 + 4) * width**2  # of a token in one block, a forward

    assert whole - half >= 3 * projections * tokens / 2
