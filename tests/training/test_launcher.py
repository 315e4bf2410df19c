import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_cohort
import yaml
from training_runs import TINY, merged

DIES = """
import os, sys
from ctclip import config
from ctclip.training import optim, pretrain

take_step, steps = optim.take_step, iter(range(99))

def dies(engine):
    if next(steps) == 2 and os.environ["RANK"] == "1":
        raise RuntimeError("boom on rank 1")
    return take_step(engine)

optim.take_step = dies
pretrain.run(config.load(pretrain.PretrainConfig, sys.argv[-1]))
"""


@pytest.mark.slow
def test_a_rank_that_dies_stops_the_job_and_its_error_comes_first(tmp_path):
    """Through the real launcher, as a user starts it."""
    cohort = toy_cohort.build(tmp_path / "cohort", num_studies=16)
    settings = merged(TINY, {"cohort": str(cohort), "out": str(tmp_path / "run"), "steps": 1000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "dies.py").write_text(DIES)
    launcher = Path(sys.executable).with_name("deepspeed")

    started = time.monotonic()
    result = subprocess.run(
        [
            str(launcher),
            "--num_gpus=2",
            "--master_port=29713",
            str(tmp_path / "dies.py"),
            str(tmp_path / "run.yaml"),
        ],
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{launcher.parent}:{os.environ['PATH']}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )

    assert result.returncode != 0
    assert "boom on rank 1" in result.stdout, f"{time.monotonic() - started:.0f} s"
    first_error = result.stdout.index("Traceback")
    assert "boom on rank 1" in result.stdout[first_error : first_error + 3000]
    assert "[rank0]" not in result.stdout[: result.stdout.index("boom on rank 1")]
