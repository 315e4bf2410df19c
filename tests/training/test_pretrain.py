import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_cohort
from training_runs import Run, column, losses_of, pretrain, weights_of

from ctclip import checkpoint
from ctclip.data.cohort import PreparedCohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return toy_cohort.build(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def undisturbed(cohort, tmp_path_factory):
    """A run of one process in one piece."""
    out = tmp_path_factory.mktemp("undisturbed")
    pretrain(cohort, out)
    return out


def wait_until(condition, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return max((int(step) for step in re.findall(r'"step": (\d+)', text)), default=0)


def zero(tmp_path: Path, stage: int) -> dict:
    path = tmp_path / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return {"deepspeed": str(path)}


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "stage"), [(1, 2, 2), (2, None, 0), (2, 1, 1), (2, 2, 2)]
)
def test_processes_micro_batches_and_zero_stages_do_not_change_training(
    cohort, undisturbed, tmp_path, world_size, micro_batch_size, stage
):
    """Same losses, gradient norms and final weights, with dropout on."""
    lines = pretrain(
        cohort,
        tmp_path / "run",
        world_size,
        micro_batch_size=micro_batch_size,
        engine=zero(tmp_path, stage),
    )

    for name in ("loss", "grad_norm", "loss_report", "loss_opposite"):
        assert column(lines, name) == pytest.approx(
            column(losses_of(undisturbed), name), rel=1e-5
        ), name
    expected = weights_of(undisturbed)
    for name, weight in weights_of(tmp_path / "run").items():
        # Adam divides by the gradient's own size, so where a gradient is rounding noise, its sign
        # moves a weight: 1e-5 is 0.3 % of the way that a weight can go in these six steps.
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_at_random_moments_and_started_again_it_ends_with_the_same_weights(
    cohort, tmp_path, world_size
):
    """CTCLIP_KILLS=20 is the long version; one or two kills keep the suite short."""
    kills = int(os.environ.get("CTCLIP_KILLS", 3 - world_size))
    steps = 3 * kills
    out, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    pretrain(cohort, undisturbed, world_size, steps=steps)
    rng = np.random.default_rng(world_size)
    for kill in range(kills):
        run = Run(cohort, out, world_size, {"steps": steps})
        target = 3 * kill + int(rng.integers(1, 3))
        wait_until(lambda target=target: last_step(out) >= target)
        time.sleep(rng.uniform(0.0, 0.1))  # in a step, or in the middle of a checkpoint
        run.kill()
    lines = pretrain(cohort, out, world_size, steps=steps)

    assert column(lines) == column(losses_of(undisturbed))
    expected = weights_of(undisturbed)
    for name, weight in weights_of(out).items():
        assert torch.equal(weight, expected[name]), name


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(cohort, undisturbed, tmp_path):
    out = tmp_path / "run"
    pretrain(cohort, out)
    newest = sorted((out / "checkpoints").iterdir())[-1]
    states = next(newest.glob("engine/*model_states.pt"))
    states.write_bytes(states.read_bytes()[:-100])
    (out / "said_0.txt").unlink()

    run = Run(cohort, out, 1, {})
    assert run.wait() == [0]

    assert "damaged" in run.said()
    assert "going on from step 4" in run.said()
    expected = weights_of(undisturbed)
    for name, weight in weights_of(out).items():
        assert torch.equal(weight, expected[name]), name


def test_the_model_file_is_complete_and_says_where_it_comes_from(cohort, undisturbed):
    loaded = checkpoint.load(undisturbed / "model.safetensors")

    assert loaded.provenance["step"] == 6
    assert loaded.provenance["label_informed"] is False
    assert loaded.provenance["cohort"] == PreparedCohort.open(cohort).fingerprint
    loaded.require_volumes(PreparedCohort.open(cohort).volume_config)


def test_another_config_in_the_same_folder_is_refused(cohort, undisturbed):
    run = Run(cohort, undisturbed, 1, {"seed": 5})

    assert run.wait() == [1]
    assert "holds a run with another config (seed: 0 there, 5 here)" in run.said()


def test_the_best_model_is_kept_and_training_stops_when_it_gets_no_better(cohort, tmp_path):
    out = tmp_path / "run"
    pretrain(
        cohort,
        out,
        stub_evaluator=True,
        checkpoint={"every": 100, "evaluate_every": 1, "patience": 2},
    )

    assert len(losses_of(out)) == 4
    assert checkpoint.load(out / "best.safetensors").provenance["step"] == 2
    assert checkpoint.load(out / "model.safetensors").provenance["step"] == 4


def test_sigterm_saves_a_checkpoint_and_exits_cleanly(cohort, tmp_path):
    out = tmp_path / "run"
    run = Run(cohort, out, 2, {"steps": 10_000, "checkpoint": {"every": 10_000}})
    wait_until(lambda: last_step(out) > 0)
    run.processes[1].terminate()

    assert run.wait() == [0, 0]
    steps = len(losses_of(out))
    assert checkpoint.load(out / "model.safetensors").provenance["step"] == steps


@pytest.mark.parametrize(("before", "after", "stage"), [(2, 1, 2), (2, 1, 0)])
def test_a_run_goes_on_with_another_number_of_processes(
    cohort, undisturbed, tmp_path, before, after, stage
):
    out = tmp_path / "run"
    engine = zero(tmp_path, stage)
    run = Run(cohort, out, before, {"engine": engine, "checkpoint": {"every": 4}})
    wait_until(lambda: list(out.glob("checkpoints/step_*4")))
    run.kill()
    for later in out.glob("checkpoints/step_*6"):  # the run was quicker than the kill
        later.rename(out / "not_a_checkpoint")
    lines = pretrain(cohort, out, after, engine=engine, checkpoint={"every": 4})

    assert len(lines) == 6
    assert column(lines) == pytest.approx(column(losses_of(undisturbed)), rel=1e-5)
