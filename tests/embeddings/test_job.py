"""The documented command on several real processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import page_service
import pytest

from ctclip.embeddings import EmbeddingTable

SCRIPT = Path(__file__).parents[2] / "eval" / "export_embeddings.py"


def export(folder, out, num_processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(num_processes), str(SCRIPT)]
    command += ["--ckpt", str(folder / "model.safetensors"), "--cohort", str(folder / "prepared")]
    command += ["--out", str(out), f"fields=[{','.join(page_service.FIELDS)}]", "device=cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_write_the_tables_of_one_and_the_second_run_changes_nothing(tmp_path):
    page_service.write_archive(tmp_path, num_patients=5)
    out = tmp_path / "shared"

    said = export(tmp_path, out, num_processes=2)
    first = {name: (out / name).read_bytes() for name in os.listdir(out)}
    export(tmp_path, out, num_processes=2)

    assert said.count("effective dimension") == 2
    assert sorted(first) == ["reports.parquet", "volumes.parquet"]
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == first
    for name in first:
        alone, shared = (EmbeddingTable.load(where / name) for where in (tmp_path, out))
        assert shared.volume_id == alone.volume_id
        np.testing.assert_allclose(shared.vectors, alone.vectors, atol=1e-5)
        np.testing.assert_array_equal(shared.labels, alone.labels)
        assert shared.fields == alone.fields
