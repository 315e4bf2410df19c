"""Preparation killed at random points ends with the bytes of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scans import cohort

from ctclip.data.cache import prepare
from ctclip.data.manifest import read_manifest
from ctclip.data.volume import VolumeConfig

SMALL = VolumeConfig(spacing_mm=(10.0, 8.0, 8.0), size=(28, 32, 40))

RUN = """
import sys, time
from ctclip.data import cache, storage
from ctclip.data.manifest import read_manifest
from ctclip.data.volume import VolumeConfig

write = storage.write_bytes
def slowly(*args):
    print("write", flush=True)
    time.sleep(0.01)
    write(*args)
    time.sleep(0.01)
storage.write_bytes = slowly
records, problems = read_manifest(sys.argv[1])
config = VolumeConfig(spacing_mm=(10.0, 8.0, 8.0), size=(28, 32, 40))
cache.prepare(records, sys.argv[2], config, problems=problems)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def killed_after(num_writes: int, delay_s: float, manifest: Path, out: Path) -> bool:
    """Start preparing and kill it a moment after its n-th write; False if it finished first."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(manifest), str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for _ in range(num_writes):
        process.stdout.readline()
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    return process.wait() != 0


@pytest.mark.slow
def test_twenty_kills_at_random_points_change_no_byte(tmp_path):
    manifest = cohort(tmp_path, num=16)
    (tmp_path / "scans/v3.nii.gz").write_bytes(b"not a scan")
    records, problems = read_manifest(manifest)
    undisturbed = prepare(records, tmp_path / "whole", SMALL, problems=problems)

    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(20):
        writes = int(rng.integers(1, 4))
        kills += killed_after(writes, float(rng.uniform(0, 0.03)), manifest, tmp_path / "out")
    finished = prepare(records, tmp_path / "out", SMALL, problems=problems)

    assert kills >= 10
    assert files_of(finished.path) == files_of(undisturbed.path)


def test_two_runs_at_once_end_with_the_same_bytes(tmp_path):
    manifest = cohort(tmp_path, num=6)
    records, problems = read_manifest(manifest)
    undisturbed = prepare(records, tmp_path / "whole", SMALL, problems=problems)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(manifest), str(tmp_path / "out")],
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert files_of(tmp_path / "out") == {
        f"{undisturbed.fingerprint}/{name}": data
        for name, data in files_of(undisturbed.path).items()
    }
