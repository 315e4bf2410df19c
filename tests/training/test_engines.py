"""Each way to compute and to shard a run either trains the same, or is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import RISES_AND_FALLS, Run, column, losses_of, pretrain, weights_of

COMPILED = (
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants g++ on a CPU"),
)
CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


@pytest.fixture(scope="module")
def plain(cohort, tmp_path_factory):
    """One process, ZeRO 0, fp32, nothing recomputed."""
    out = tmp_path_factory.mktemp("plain")
    pretrain(cohort, out)
    return out


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "engine"),
    [
        (1, 2, {"activation_checkpointing": True}),
        (2, 2, {"deepspeed": str(CONFIGS / "zero1.json")}),
        (2, 2, {"deepspeed": str(CONFIGS / "zero2.json")}),
        (2, 2, {"deepspeed": str(CONFIGS / "zero2_offload.json")}),
        (2, None, {"deepspeed": str(CONFIGS / "zero3.json")}),
        pytest.param(1, 2, {"compile": True}, marks=COMPILED),
    ],
    ids=["checkpointing", "zero1", "zero2", "zero2-offload", "zero3", "compile"],
)
def test_it_trains_the_same_as_the_plain_engine(
    cohort, plain, tmp_path, world_size, micro_batch_size, engine
):
    """In micro-batches of two where that is allowed, with GradCache's two forwards."""
    split = {} if micro_batch_size is None else {"micro_batch_size": micro_batch_size}
    lines = pretrain(cohort, tmp_path / "run", world_size, engine=engine, steps=6, **split)

    for name in ("loss", "grad_norm"):
        expected = column(losses_of(plain), name)
        assert column(lines, name) == pytest.approx(expected, rel=1e-4), name
    expected = weights_of(plain)
    for name, weight in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_bf16_follows_fp32_within_its_precision_and_keeps_fp32_weights(cohort, plain, tmp_path):
    lines = pretrain(cohort, tmp_path / "run", 1, engine={"precision": "bf16"})

    assert {line["skipped_steps"] for line in lines} == {0}
    assert column(lines) == pytest.approx(column(losses_of(plain)), rel=2e-2)
    assert {weight.dtype for weight in weights_of(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("deepspeed", "changes", "words"),
    [
        ({"gradient_accumulation_steps": 2}, {}, "is set by micro_batch_size"),
        ({"bf16": {"enabled": True}}, {}, "is set by engine.precision"),
        (
            {"zero_optimization": {"stage": 3}},
            {"engine": {"compile": True}},
            "ZeRO 3 x torch.compile is refused",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            {"optim": {"ema_decay": 0.9}},
            "ZeRO 3 x optim.ema_decay is refused",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            {"evaluations": RISES_AND_FALLS},
            "ZeRO 3 x evaluation during training is refused",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            {},
            "ZeRO 0 has nothing to offload",
        ),
    ],
)
def test_a_combination_that_does_not_work_is_refused_by_name_at_start(
    cohort, tmp_path, deepspeed, changes, words
):
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(deepspeed))
    engine = {**changes.get("engine", {}), "deepspeed": str(path)}

    run = Run(cohort, tmp_path / "run", 1, {**changes, "engine": engine})

    assert run.wait() == [1]
    assert words in run.said()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
