import errno
import os
import shutil

import pytest
import torch

from ctclip.training import resume


def write(content):
    def to(folder):
        (folder / "engine").mkdir()
        (folder / "engine" / "states.pt").write_bytes(content)

    return to


def save(folder, step, keep=2, content=b"weights"):
    return resume.save(folder, step, write(content), {"step": step}, keep=keep)


def test_the_last_k_checkpoints_stay(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert resume.newest_intact(tmp_path).name == "step_00000003"
    assert resume.read_state(tmp_path / "step_00000003") == {"step": 3}


def test_a_checkpoint_that_was_being_written_is_never_taken_for_one(tmp_path):
    save(tmp_path, 1)

    def killed(folder):
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume.save(tmp_path, 2, killed, {}, keep=2)

    assert resume.newest_intact(tmp_path).name == "step_00000001"
    save(tmp_path, 2)
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("damage", ["changed", "missing", "no checksums"])
def test_damage_is_found_and_the_one_before_taken(tmp_path, caplog, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    if damage == "changed":
        (newest / "engine" / "states.pt").write_bytes(b"weighty")
    elif damage == "missing":
        (newest / "engine" / "states.pt").unlink()
    else:
        (newest / resume.CHECKSUMS).unlink()

    assert resume.newest_intact(tmp_path).name == "step_00000001"
    assert "step_00000002 is damaged" in caplog.text
    assert (tmp_path / "damaged_step_00000002").is_dir()
    assert resume.newest_intact(tmp_path).name == "step_00000001"


def test_damaged_checkpoints_never_push_intact_ones_out(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 9) / "engine" / "states.pt").write_bytes(b"weighty")
    resume.newest_intact(tmp_path)

    newest = save(tmp_path, 2, keep=1)

    assert newest.is_dir()
    assert resume.newest_intact(tmp_path) == newest


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "engine" / "states.pt").write_bytes(b"weighty")

    with pytest.raises(
        ValueError, match=r"every checkpoint in .* is damaged \(engine/states.pt has"
    ):
        resume.newest_intact(tmp_path)
    assert len(list(tmp_path.glob("step_*"))) == 2


def test_no_checkpoint_is_no_error(tmp_path):
    assert resume.newest_intact(tmp_path / "none") is None


def test_a_full_disk_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match="no space left in .*free space or lower checkpoint.keep"):
        resume.require_space(tmp_path, shutil.disk_usage(tmp_path).free * 2)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the newest complete checkpoint is intact"),
        (errno.EROFS, "choose another run folder with out=FOLDER"),
    ],
)
def test_what_the_disk_refuses_is_explained(tmp_path, code, message):
    def refused(folder):
        raise OSError(code, os.strerror(code))

    save(tmp_path, 1)
    with pytest.raises(OSError, match=message):
        resume.save(tmp_path, 2, refused, {}, keep=2)
    assert resume.newest_intact(tmp_path).name == "step_00000001"


def plain_write():
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"weights")


def torch_write():
    torch.save({"weight": torch.zeros(8)}, "/dev/full")


@pytest.mark.parametrize("write_to_full_disk", [plain_write, torch_write])
def test_a_disk_that_fills_up_while_writing_is_explained(tmp_path, monkeypatch, write_to_full_disk):
    """/dev/full refuses every byte as a full disk does; torch hides why."""
    monkeypatch.setattr(resume, "FULL_BYTES", 1 << 62)

    with pytest.raises(OSError, match="no space left in .*free space or lower checkpoint.keep"):
        resume.save(tmp_path, 2, lambda folder: write_to_full_disk(), {}, keep=2)


def test_a_failure_that_is_not_the_disks_keeps_its_own_words(tmp_path):
    with (
        pytest.raises(RuntimeError, match="shapes differ"),
        resume.explained_disk_errors(tmp_path),
    ):
        raise RuntimeError("shapes differ")
    with pytest.raises(PermissionError, match="cohort"), resume.explained_disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "cohort is locked", "/elsewhere/cohort")


def test_a_folder_that_can_not_be_written_to_is_explained(tmp_path):
    read_only = tmp_path / "read_only"
    read_only.mkdir(mode=0o555)
    is_root = os.geteuid() == 0
    if is_root:  # whom no permission stops
        os.seteuid(65_534)
    try:
        with pytest.raises(OSError, match="can't be written to; choose another run folder"):
            save(read_only / "checkpoints", 1)
    finally:
        if is_root:
            os.seteuid(0)


def test_a_file_where_the_run_folder_should_be_is_explained(tmp_path):
    (tmp_path / "run").write_text("not a folder")

    with pytest.raises(OSError, match="can't be written to; choose another run folder"):
        save(tmp_path / "run" / "checkpoints", 1)
