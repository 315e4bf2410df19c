import json

import pytest
import torch
import toy_cohort
from training_runs import Run, losses_of, pretrain

from ctclip import checkpoint
from ctclip.training.guard import Guard, GuardConfig, explained_memory


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return toy_cohort.build(tmp_path_factory.mktemp("cohort"), num_studies=16)


def test_a_nan_loss_is_skipped_counted_and_its_studies_named(cohort, tmp_path):
    lines = pretrain(cohort, tmp_path, world_size=2, poisoned_steps=[2])

    assert lines[-1]["skipped_steps"] == 1
    skipped = [json.loads(x) for x in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in skipped] == [2]
    assert len(skipped[0]["studies"]) == 8
    assert all(line["loss"] == line["loss"] for line in lines)


def test_after_several_in_a_row_the_run_stops_and_its_last_good_checkpoint_stays(cohort, tmp_path):
    run = Run(cohort, tmp_path, 1, {"poisoned_steps": range(4, 99), "guard": {"max_skipped": 2}})

    assert run.wait() == [1]
    assert "2 steps in a row had no usable gradient" in run.said()
    newest = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1]
    assert newest == "step_00000004"
    assert len(losses_of(tmp_path)) == 4


def test_no_checkpoint_is_written_in_a_row_of_skipped_steps(cohort, tmp_path):
    """Else the last good ones would make room for those of a run that diverges."""
    changes = {"guard": {"max_skipped": 4}, "checkpoint": {"every": 1, "keep": 2}, "steps": 12}
    run = Run(cohort, tmp_path, 1, changes | {"poisoned_steps": range(3, 99)})

    assert run.wait() == [1]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000003"]
    assert "train anew with a lower optim.lr, in another folder" in run.said()


def test_a_run_that_diverges_has_no_best_model_and_says_so(cohort, tmp_path):
    """Numbers of a model that answers NaN are no evaluation, and no number is written as NaN."""
    changes = {"steps": 5, "optim": {"lr": 1e6, "warmup_steps": 1}}
    evaluation = {"evaluate_every": 1, "best_metric": "health/report_recall_1", "every": 1}
    run = Run(cohort, tmp_path, 1, changes | {"checkpoint": evaluation})

    assert run.wait() == [0]
    assert "steps were skipped, so that the model is of step" in run.said()
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    measured = [json.loads(x)["step"] for x in lines.splitlines() if "report_recall_1" in x]
    best = checkpoint.load(tmp_path / "best.safetensors").provenance["step"]
    assert best in measured
    assert max(measured) < 5


def test_exploded_losses_and_infinite_gradients_are_not_usable(tmp_path):
    guard = Guard(GuardConfig(loss_limit=50.0), tmp_path)
    sound = torch.ones(2, 3, requires_grad=True)
    sound.grad = torch.ones(2, 3)
    infinite = torch.ones(2, 3, requires_grad=True)
    infinite.grad = torch.full((2, 3), float("inf"))

    assert guard.is_usable(torch.tensor(3.0), {"image": sound})
    assert not guard.is_usable(torch.tensor(51.0), {"image": sound})
    assert not guard.is_usable(torch.tensor(3.0), {"image": sound, "text": infinite})


def test_running_out_of_gpu_memory_says_what_to_change():
    with pytest.raises(ValueError, match="micro_batch_size 16 does not fit"), explained_memory(16):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_running_out_of_the_machines_memory_says_so_too():
    with (
        pytest.raises(ValueError, match="micro_batch_size 4 does not fit this machine's memory"),
        explained_memory(4),
    ):
        torch.empty(10**15)


def test_another_error_of_a_step_keeps_its_own_words():
    with pytest.raises(RuntimeError, match="must match"), explained_memory(4):
        torch.zeros(2) + torch.zeros(3)
