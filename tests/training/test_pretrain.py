import json
import time
from pathlib import Path

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
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-6)


def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_weights(
    cohort, undisturbed, tmp_path
):
    out = tmp_path / "run"
    for delay_s in (0.8, 1.3, 1.6):
        run = Run(cohort, out, 1, {})
        time.sleep(delay_s)
        run.kill()
    lines = pretrain(cohort, out)

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
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    run.processes[1].terminate()

    assert run.wait() == [0, 0]
    steps = len(losses_of(out))
    assert checkpoint.load(out / "model.safetensors").provenance["step"] == steps


@pytest.mark.parametrize(("before", "after", "stage"), [(2, 1, 2), (1, 2, 1), (2, 1, 0)])
def test_a_run_goes_on_with_another_number_of_processes(
    cohort, undisturbed, tmp_path, before, after, stage
):
    out = tmp_path / "run"
    engine = zero(tmp_path, stage)
    run = Run(cohort, out, before, {"engine": engine, "checkpoint": {"every": 4}})
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/step_*4")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.kill()
    for later in out.glob("checkpoints/step_*6"):  # the run was quicker than the kill
        later.rename(out / "not_a_checkpoint")
    lines = pretrain(cohort, out, after, engine=engine, checkpoint={"every": 4})

    assert len(lines) == 6
    assert column(lines) == pytest.approx(column(losses_of(undisturbed)), rel=1e-5)
