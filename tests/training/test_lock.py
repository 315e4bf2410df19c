import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctclip.training import lock

HOLDER = """
import sys, time
from pathlib import Path
from ctclip.training.lock import sole_job
with sole_job(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


FORKS_AND_DIES = """
    import os
    reader = os.fork()
    if reader == 0:
        os.close(1)
        time.sleep(600)
    print(reader, flush=True)
    os._exit(9)
"""


def holder(out: Path) -> subprocess.Popen[str]:
    """Another process that holds a run folder."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_held_folder_is_refused_and_a_killed_job_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_S", 0.5)
    other = holder(tmp_path)
    try:
        with pytest.raises(ValueError, match="another job is training in"), lock.sole_job(tmp_path):
            raise AssertionError("must not come here")
    finally:
        other.kill()
        other.wait()
    with lock.sole_job(tmp_path):
        assert (tmp_path / lock.LOCK).exists()


def test_a_reader_that_outlives_a_killed_job_does_not_hold_its_folder(tmp_path):
    code = HOLDER.replace("time.sleep(600)", FORKS_AND_DIES)
    command = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    reader = int(said.split()[-1])
    try:
        os.kill(reader, 0)  # it is there, with the job's files open
        other = holder(tmp_path)
        other.kill()
        other.wait()
    finally:
        os.kill(reader, 9)


def test_a_folder_that_was_only_held_is_gone_and_one_with_files_stays(tmp_path):
    with lock.sole_job(tmp_path / "empty"):
        pass
    with lock.sole_job(tmp_path / "used"):
        (tmp_path / "used" / "config.yaml").touch()

    assert not (tmp_path / "empty").exists()
    assert (tmp_path / "used" / "config.yaml").exists()


def test_a_file_system_without_locks_is_warned_of_and_works(tmp_path, monkeypatch, caplog):
    def not_there(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", not_there)
    with lock.sole_job(tmp_path):
        pass

    assert "has no locks" in caplog.text
