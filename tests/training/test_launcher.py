"""What happens to a job as a user starts it: the real launcher, two ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_cohort
import yaml
from training_runs import TINY, free_port, losses_of, merged

from ctclip import checkpoint

SCRIPT = """
import os, pathlib, signal, sys, time
from ctclip import config
from ctclip.cli.command import command
from ctclip.training import optim, pretrain

take_step, steps = optim.take_step, iter(range(10**6))

def dies(engine):
    if next(steps) == 2 and os.environ["RANK"] == os.environ.get("DYING_RANK"):
        pathlib.Path(os.environ["DEATH"]).write_text(str(time.time()))
        if "KILLED" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("boom on rank 1")
    return take_step(engine)

optim.take_step = dies
command(lambda argv: pretrain.run(config.load(pretrain.PretrainConfig, sys.argv[-1])))()
"""


def launch(tmp_path, **environment):
    """Start ``deepspeed``; its output goes to ``said.txt``."""
    cohort = toy_cohort.build(tmp_path / "cohort", num_studies=16)
    changes = {"cohort": str(cohort), "out": str(tmp_path / "run"), "steps": 100_000}
    settings = merged(TINY, {**changes, "checkpoint": {"every": 100_000}})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus=2", f"--master_port={free_port()}"]
    command += [tmp_path / "script.py", tmp_path / "run.yaml"]
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{launcher.parent}:{os.environ['PATH']}"
    with (tmp_path / "said.txt").open("w") as said:
        return subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **environment},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.slow
def test_a_rank_that_dies_stops_the_job_and_its_error_comes_first(tmp_path):
    death = tmp_path / "death"
    job = launch(tmp_path, DYING_RANK="1", DEATH=str(death))

    assert job.wait(timeout=500) != 0
    print(f"the job ended {time.time() - float(death.read_text()):.1f} s after the death")
    said = (tmp_path / "said.txt").read_text()
    assert "boom on rank 1" in said
    first_error = said.index("Traceback")
    assert "boom on rank 1" in said[first_error : first_error + 3000]
    assert "[rank0]" not in said[: said.index("boom on rank 1")]


@pytest.mark.slow
def test_a_rank_that_is_killed_is_missed_in_a_sentence(tmp_path):
    """As the kernel kills where memory is short: nothing of it is left to speak."""
    job = launch(tmp_path, DYING_RANK="1", DEATH=str(tmp_path / "death"), KILLED="1")

    assert job.wait(timeout=500) != 0
    said = (tmp_path / "said.txt").read_text()
    assert "error: another process of this job is gone" in said
    assert "Traceback" not in said[: said.index("another process of this job is gone")]


@pytest.mark.slow
def test_sigterm_to_the_job_saves_a_checkpoint(tmp_path):
    """As SLURM, ``timeout`` and a shell send it: to every process of the job."""
    job = launch(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and losses_of(tmp_path / "run")):
        assert job.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGTERM)
    job.wait(timeout=300)
    model = tmp_path / "run" / "model.safetensors"
    while not model.exists():
        time.sleep(0.1)

    done = checkpoint.load(model).provenance["step"]
    assert done == len(losses_of(tmp_path / "run"))
    assert f"step {done} is saved, stopping" in (tmp_path / "said.txt").read_text()
