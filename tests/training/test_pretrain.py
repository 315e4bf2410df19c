import contextlib
import functools
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_cohort
import yaml
from training_runs import RISES_AND_FALLS, Run, column, losses_of, pretrain, weights_of

from ctclip import checkpoint, config
from ctclip.data.cohort import PreparedCohort
from ctclip.training import optim
from ctclip.training import pretrain as trainer


@pytest.fixture(scope="module")
def undisturbed(cohort, tmp_path_factory):
    """A run of one process in one piece."""
    out = tmp_path_factory.mktemp("undisturbed")
    pretrain(cohort, out)
    return out


def wait_until(condition, period_s: float = 0.02) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(period_s)


def is_writing(out: Path, since_s: float) -> bool:
    """Whether a checkpoint is half written, and not one that an earlier kill left."""
    with contextlib.suppress(FileNotFoundError):
        return any(p.stat().st_mtime > since_s for p in out.glob("checkpoints/.writing-*"))
    return False


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return max((int(step) for step in re.findall(r'"step": (\d+)', text)), default=0)


def zero(tmp_path: Path, stage: int) -> dict:
    path = tmp_path / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return {"deepspeed": str(path)}


def writes_or_ended(run: Run, since_s: float) -> bool:
    return is_writing(run.out, since_s) or not run.processes[0].is_alive()


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_at_random_moments_and_started_again_it_ends_with_the_same_weights(
    cohort, tmp_path, world_size
):
    """CTCLIP_KILLS=20 is the long version; a few kills keep the suite short.

    Every other one comes while a checkpoint is being written.
    """
    kills = int(os.environ.get("CTCLIP_KILLS", 2))
    steps = 3 * kills
    out, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    pretrain(cohort, undisturbed, world_size, steps=steps)
    rng = np.random.default_rng(world_size)
    half_written = 0
    for kill in range(kills):
        started_s = time.time()
        run = Run(cohort, out, world_size, {"steps": steps})
        target = 3 * kill + int(rng.integers(1, 3))
        wait_until(lambda target=target: last_step(out) >= target)
        if kill % 2 == 0:
            wait_until(functools.partial(writes_or_ended, run, started_s), 0.001)
        else:
            time.sleep(rng.uniform(0.0, 0.1))
        run.kill()
        half_written += is_writing(out, started_s)
    print(f"{half_written} of {kills} kills left a half-written checkpoint")
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


def test_a_run_speaks_once_and_ends_with_its_model_and_the_next_command(cohort, tmp_path):
    out = tmp_path / "run"
    run = Run(cohort, out, 2, {})

    assert run.wait() == [0, 0]
    model = out / "model.safetensors"
    last = run.said(0).splitlines()[-1]
    assert last.endswith(
        f"model: {model}; score it: python eval/zero_shot.py --ckpt {model} --cohort {cohort} "
        f"--out {out / 'zero_shot'}"
    )
    assert "text warm-up: prompt-direction spread" in run.said(0)
    assert "INFO" not in run.said(1)


def test_a_finished_run_is_complete_at_once(cohort, tmp_path):
    out = tmp_path / "run"
    pretrain(cohort, out, 2)
    weights, metrics = weights_of(out), (out / "metrics.jsonl").read_text()
    (out / "model.safetensors").unlink()
    for said in out.glob("said_*.txt"):
        said.unlink()
    shutil.move(cohort, tmp_path / "moved")  # what is finished needs no data
    try:
        run = Run(cohort, out, 2, {})
        assert run.wait() == [0, 0]
    finally:
        shutil.move(tmp_path / "moved", cohort)

    assert f"{out} is complete, nothing to train" in run.said(0)
    assert f"model: {out / 'model.safetensors'}; score it" in run.said(0)
    assert "going on" not in run.said(0)
    assert "INFO" not in run.said(1)
    assert (out / "metrics.jsonl").read_text() == metrics
    for name, weight in weights_of(out).items():
        assert torch.equal(weight, weights[name]), name


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


def test_paths_may_be_spelt_in_another_way_when_a_run_goes_on(cohort, undisturbed, monkeypatch):
    settings = yaml.safe_load((undisturbed / "config.yaml").read_text())
    monkeypatch.chdir(cohort.parent.parent)
    settings |= {"cohort": str(cohort.parent.relative_to(Path.cwd())), "out": str(undisturbed)}

    trainer.check(config.from_dict(trainer.PretrainConfig, settings))  # raises nothing
    other = config.from_dict(trainer.PretrainConfig, settings | {"steps": 5})
    with pytest.raises(ValueError, match="holds a run with another config .steps: 6 there, 5 here"):
        trainer.check(other)


def test_two_jobs_never_train_in_one_folder(cohort, tmp_path):
    out = tmp_path / "run"
    first = Run(cohort, out, 1, {"steps": 2000})
    wait_until(lambda: list(out.glob("checkpoints/step_*2")))
    kept = (out / "said_0.txt").read_text()
    second = Run(cohort, out, 2, {"steps": 2000})

    assert second.wait() == [1, 1]
    assert f"another job is training in {out}" in second.said().removeprefix(kept)
    assert first.processes[0].is_alive()
    first.kill()


def test_label_informed_training_without_a_label_is_refused(tmp_path):
    unlabelled = toy_cohort.build(tmp_path, labelled=False)
    run = Run(unlabelled, tmp_path / "run", 1, {"loss": {"label_informed": True}})

    assert run.wait() == [1]
    assert "loss.label_informed=true, and no training study of" in run.said()
    assert "config.yaml" not in [path.name for path in (tmp_path / "run").iterdir()]


def test_another_choice_of_the_best_metric_starts_anew(cohort, tmp_path):
    out = tmp_path / "run"
    wanted = {"every": 100, "evaluate_every": 1, "best_metric": "health/effective_dim"}
    values = {"evaluations": RISES_AND_FALLS}
    run = Run(cohort, out, 1, {**values, "steps": 2000, "checkpoint": wanted | {"every": 2}})
    wait_until(lambda: list(out.glob("checkpoints/step_*2")))
    run.kill()
    changed = wanted | {"best_metric": "zero_shot/macro"}
    pretrain(cohort, out, **values, steps=2000, checkpoint=changed | {"patience": 2})

    evaluation = checkpoint.load(out / "best.safetensors").provenance["evaluation"]
    assert evaluation["zero_shot/macro"] == 0.7


def test_a_cohort_that_is_not_there_leaves_no_run_behind(cohort, tmp_path):
    run = Run(tmp_path / "misspelt", tmp_path / "run", 1, {})

    assert run.wait() == [1]
    assert "no prepared cohort in" in run.said()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_config_that_never_trained_does_not_block_another(cohort, undisturbed, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    settings = (undisturbed / "config.yaml").read_text()
    (out / "config.yaml").write_text(settings.replace("seed: 0", "seed: 5"))

    assert len(pretrain(cohort, out)) == 6
    assert (out / "config.yaml").read_text() == settings.replace(str(undisturbed), str(out))


def test_a_batch_that_the_processes_can_not_share_is_refused_before_anything_is_loaded(tmp_path):
    run = Run(tmp_path / "no cohort here", tmp_path / "run", 2, {"batch_size": 3})

    assert run.wait() == [1, 1]
    assert "batch_size 3 can't be shared evenly by 2 processes" in run.said()


def test_the_best_model_is_kept_and_training_stops_when_it_gets_no_better(cohort, tmp_path):
    out = tmp_path / "run"
    pretrain(
        cohort,
        out,
        evaluations=RISES_AND_FALLS,
        checkpoint={"every": 100, "evaluate_every": 1, "patience": 2},
    )

    assert len(losses_of(out)) == 4
    best = checkpoint.load(out / "best.safetensors").provenance
    assert best["step"] == 2
    assert best["evaluation"]["zero_shot/macro"] == 0.7
    assert checkpoint.load(out / "model.safetensors").provenance["step"] == 4


def test_the_lowest_number_can_be_the_best_one_and_what_is_no_number_never_is(cohort, tmp_path):
    out = tmp_path / "run"
    wanted = {"every": 100, "evaluate_every": 1, "patience": 3, "best_is": "lowest"}
    values = [math.nan, 0.4, 0.3, math.nan, 0.35, 0.3]
    pretrain(cohort, out, evaluations=values, checkpoint=wanted)

    assert checkpoint.load(out / "best.safetensors").provenance["step"] == 3
    assert len(losses_of(out)) == 6

    hopeless = tmp_path / "hopeless"
    run = Run(cohort, hopeless, 1, {"evaluations": [math.nan] * 6, "checkpoint": wanted})
    assert run.wait() == [0]
    assert "stopping early at step 3: zero_shot/macro was never a number" in run.said()
    assert not (hopeless / "best.safetensors").exists()


def test_a_best_metric_that_no_evaluation_gives_stops_the_run_and_loses_no_step(cohort, tmp_path):
    out = tmp_path / "run"
    wrong = {"every": 100, "evaluate_every": 2, "best_metric": "zero_shot/macroo"}
    run = Run(cohort, out, 2, {"evaluations": RISES_AND_FALLS, "checkpoint": wrong})

    assert run.wait() == [1, 1]
    assert "the evaluation gave no 'zero_shot/macroo'; it gave health/" in run.said()
    assert "zero_shot/macro. Set checkpoint.best_metric" in run.said()
    assert len(losses_of(out)) == 2
    mended = wrong | {"best_metric": "zero_shot/macro"}
    run = Run(cohort, out, 2, {"evaluations": RISES_AND_FALLS, "checkpoint": mended})
    assert run.wait() == [0, 0]
    assert "going on from step 2" in run.said()
    assert (out / "best.safetensors").exists()


def test_a_cohort_without_zero_shot_numbers_trains_and_says_that_no_model_is_the_best(
    cohort, tmp_path
):
    out = tmp_path / "run"
    run = Run(cohort, out, 1, {"checkpoint": {"every": 100, "evaluate_every": 2}})

    assert run.wait() == [0]
    assert run.said().count("No best.safetensors will be written") == 1
    assert len(losses_of(out)) == 6


@pytest.mark.parametrize("steps", [1, 10])
def test_a_text_warm_up_of_any_length_runs(cohort, tmp_path, steps):
    assert len(pretrain(cohort, tmp_path / "run", steps=1, text_warmup={"steps": steps})) == 1


def test_a_model_carries_no_evaluation_of_other_weights(cohort, tmp_path):
    out = tmp_path / "run"
    changes = {"checkpoint": {"every": 3, "evaluate_every": 2}, "steps": 4}
    pretrain(cohort, out, evaluations=RISES_AND_FALLS, **changes)

    carried = {
        path.name: checkpoint.load(path / "model.safetensors").provenance["evaluation"]
        for path in (out / "checkpoints").iterdir()
    }
    assert carried["step_00000003"] == {}
    assert carried["step_00000004"]["zero_shot/macro"] == 0.7


def test_a_volume_that_becomes_unreadable_is_replaced_the_same_way_on_any_number_of_ranks(
    tmp_path,
):
    damaged = toy_cohort.build(tmp_path / "cohort")
    prepared = PreparedCohort.open(damaged)
    lost = [record.volume_id for record in prepared.split("train")[3:5]]
    (prepared.path / "volumes" / f"{lost[0]}.b2nd").write_bytes(b"no longer a volume")
    (prepared.path / "volumes" / f"{lost[1]}.b2nd").unlink()

    alone = pretrain(damaged, tmp_path / "alone")
    together = pretrain(damaged, tmp_path / "together", 2)

    assert column(together) == pytest.approx(column(alone), rel=1e-5)
    for run in ("alone", "together"):
        ledger = (tmp_path / run / "unreadable_volumes.jsonl").read_text()
        assert all(f'"{volume_id}"' in ledger for volume_id in lost), ledger


def test_a_volume_that_is_lost_while_the_run_goes_on_does_not_stop_it(tmp_path):
    cohort = toy_cohort.build(tmp_path / "cohort")
    prepared = PreparedCohort.open(cohort)
    run = Run(cohort, tmp_path / "run", 2, {"steps": 12})
    wait_until(lambda: last_step(tmp_path / "run") >= 2)
    for record in prepared.split("train")[:6]:
        (prepared.path / "volumes" / f"{record.volume_id}.b2nd").unlink()

    assert run.wait() == [0, 0]
    assert len(losses_of(tmp_path / "run")) == 12
    assert (tmp_path / "run" / "unreadable_volumes.jsonl").exists()


def test_sigterm_saves_a_checkpoint_and_exits_cleanly(cohort, tmp_path):
    out = tmp_path / "run"
    run = Run(cohort, out, 2, {"steps": 10_000, "checkpoint": {"every": 10_000}})
    wait_until(lambda: last_step(out) > 0)
    run.processes[1].terminate()

    assert run.wait() == [0, 0]
    steps = len(losses_of(out))
    assert checkpoint.load(out / "model.safetensors").provenance["step"] == steps


def test_sigterm_before_the_first_step_ends_the_job_cleanly(cohort, tmp_path):
    run = Run(cohort, tmp_path, 1, {"text_warmup": {"steps": 100_000}})
    wait_until(lambda: (tmp_path / "config.yaml").exists())
    run.processes[0].terminate()

    assert run.wait() == [0]
    assert "before the first step: nothing to save" in run.said()


def test_the_same_cohort_by_another_path_is_the_same_run(cohort, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    link = tmp_path / "cohort"
    link.symlink_to(cohort)

    assert len(pretrain(link, tmp_path / "run")) == 6


def test_a_ct_vit_for_other_volumes_is_refused_before_the_warm_up(cohort, tmp_path):
    run = Run(cohort, tmp_path, 1, {"model": {"ctvit": {}}})

    assert run.wait() == [1]
    assert "model.ctvit takes (480, 480) in plane and a depth in steps of 10" in run.said()
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(("before", "after", "stage"), [(2, 1, 2), (1, 2, 1), (2, 1, 0)])
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
    assert not (out / "resharded").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 processes that don't know of each other"),
    ],
)
def test_half_a_launcher_is_refused(monkeypatch, given, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ValueError, match=message):
        optim.start_processes()


def test_settings_that_fit_no_one_are_refused_by_name():
    with pytest.raises(ValueError, match="remove model.vision.size from the config"):
        trainer.PretrainConfig(
            cohort="c",
            out="o",
            start_from="m",
            model=config.from_dict(trainer.ModelConfig, {"vision": {"size": "tiny"}}),
        )
    with pytest.raises(ValueError, match="best_metric=health/alignment is better the lower"):
        trainer.CheckpointConfig(best_metric="health/alignment")
    with pytest.raises(ValueError, match="no tower would learn"):
        optim.OptimConfig(volume_lr_scale=0, text_lr_scale=0)
