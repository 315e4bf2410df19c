"""``ctclip-prepare`` and ``ctclip-inspect`` as a user types them."""

import logging

import numpy as np
import pytest
from scans import chest_hu, cohort, save

from ctclip import cli
from ctclip.data.cohort import PreparedCohort

SMALL = ["--workers=1", "spacing_mm=[10,8,8]", "size=[28,32,40]"]


@pytest.fixture
def said(caplog):
    """What the command has logged so far, line by line."""
    caplog.set_level(logging.INFO, "ctclip")
    return lambda: [record.getMessage() for record in caplog.records]


def test_it_says_at_once_what_it_does_and_at_the_end_what_came_of_it(tmp_path, said):
    cohort(tmp_path, num=3)
    (tmp_path / "scans/v1.nii.gz").write_bytes(b"nothing")
    cli.prepare([f"--source={tmp_path}", f"--out={tmp_path / 'out'}", *SMALL])
    lines = said()
    assert lines[0].endswith("starting, loading libraries")
    assert lines[1] == f"reading {tmp_path} as a manifest"
    assert lines[2].startswith("preparing 3 volumes in ")
    assert "2 of 3 inputs are used (0 of them with a correction or warning), 1 refused" in lines
    assert lines[-1].startswith("prepared cohort: ")


def test_a_scan_with_an_offset_is_read_as_the_user_says_and_packed_behind_a_url(tmp_path, said):
    save(tmp_path / "scans/hu.nii.gz", chest_hu(seed=1))
    save(tmp_path / "scans/raw.nii.gz", chest_hu(seed=2) + np.int16(1024))
    arguments = [f"--source={tmp_path / 'scans'}", f"--out={tmp_path / 'out'}", *SMALL]
    with pytest.raises(SystemExit):
        cli.prepare([*arguments, "--strict"])
    url = f"file://{tmp_path}/packed"
    cli.prepare([*arguments, "--rescale", "1", "-1024", f"--pack={url}"])
    assert said()[-1].startswith(f"packed cohort: {url}/")
    packed = PreparedCohort.open(said()[-1].removeprefix("packed cohort: "))
    assert [record.volume_id for record in packed.records] == ["hu", "raw"]
    for record in packed.records:
        assert -1024 <= packed.read(record.volume_id).min() < -900


def test_inspecting_takes_the_same_word_for_an_offset(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "raw.nii.gz", chest_hu() + np.int16(1024))
    with pytest.raises(SystemExit):
        cli.inspect(["raw.nii.gz"])
    assert "--rescale 1 -1024" in " ".join(capsys.readouterr().out.split())
    cli.inspect(["raw.nii.gz", "--rescale", "1", "-1024"])
    assert "applied slope 1, intercept -1024" in capsys.readouterr().out
    assert (tmp_path / "raw.png").exists()
