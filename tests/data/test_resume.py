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
cache.prepare(records, sys.argv[2], config, problems=problems, workers=int(sys.argv[3]))
"""

KILLS = int(os.environ.get("CTCLIP_KILLS", "4"))
"""Of each kind; the full test is CTCLIP_KILLS=20."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def killed_after(num_writes: int, delay_s: float, manifest: Path, out: Path, workers: int) -> bool:
    """Start preparing and kill it a moment after its n-th write; False if it finished first."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(manifest), str(out), str(workers)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    for _ in range(num_writes):
        process.stdout.readline()
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    was_killed = process.wait() != 0
    while members(process.pid):  # the test's timeout ends this if workers outlive their parent
        time.sleep(0.05)
    return was_killed


def members(session: int) -> list[str]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kills_at_random_points_change_no_byte(tmp_path, workers):
    manifest = cohort(tmp_path, num=16)
    (tmp_path / "scans/v3.nii.gz").write_bytes(b"not a scan")
    records, problems = read_manifest(manifest)
    undisturbed = prepare(records, tmp_path / "whole", SMALL, problems=problems)

    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(KILLS):
        # Workers write on their own; theirs are hit by a longer delay after the parent's first.
        writes = int(rng.integers(1, 4)) if workers == 1 else 1
        delay_s = float(rng.uniform(0, 0.03 if workers == 1 else 3.0))
        kills += killed_after(writes, delay_s, manifest, tmp_path / "out", workers)
    finished = prepare(records, tmp_path / "out", SMALL, problems=problems)

    assert kills >= (KILLS // 2 if workers == 1 else 1)
    assert files_of(finished.path) == files_of(undisturbed.path)


def test_two_runs_at_once_end_with_the_same_bytes(tmp_path):
    manifest = cohort(tmp_path, num=6)
    records, problems = read_manifest(manifest)
    undisturbed = prepare(records, tmp_path / "whole", SMALL, problems=problems)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(manifest), str(tmp_path / "out"), "1"],
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert files_of(tmp_path / "out") == {
        f"{undisturbed.fingerprint}/{name}": data
        for name, data in files_of(undisturbed.path).items()
    }
