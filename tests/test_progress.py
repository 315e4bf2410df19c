import logging

import pytest

from ctclip import progress
from ctclip.progress import Progress, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_every_few_seconds_and_one_at_the_end(clock, caplog):
    caplog.set_level(logging.INFO, "ctclip")
    for _ in track(range(100), 100, "prepare", "volume"):
        clock[0] += 1.0
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "prepare: 5 of 100 volumes after 5 s, about 1 min 35 s to go"
    assert lines[-1] == "prepare: 100 of 100 volumes after 1 min 40 s"
    assert len(lines) == 20


def test_a_short_job_says_nothing(clock, caplog):
    caplog.set_level(logging.INFO, "ctclip")
    assert list(track(range(3), 3, "read", "file")) == [0, 1, 2]
    assert not caplog.records


def test_what_an_earlier_run_did_does_not_count_for_the_pace(clock, caplog):
    caplog.set_level(logging.INFO, "ctclip")
    with Progress(100, "prepare", "volume", done=90) as shown:
        clock[0] += 10.0
        shown.update()
    assert (
        caplog.records[0]
        .getMessage()
        .endswith("91 of 100 volumes after 10 s, about 1 min 30 s to go")
    )


def test_a_hidden_one_is_silent(clock, caplog):
    caplog.set_level(logging.INFO, "ctclip")
    for _ in track(range(9), 9, "prepare", "volume", hidden=True):
        clock[0] += 9.0
    assert not caplog.records


def test_the_last_line_is_not_said_twice(clock, caplog):
    caplog.set_level(logging.INFO, "ctclip")
    for _ in track(range(2), 2, "prepare", "volume"):
        clock[0] += 6.0
    assert [r.getMessage().split(" after")[0] for r in caplog.records] == [
        "prepare: 1 of 2 volumes",
        "prepare: 2 of 2 volumes",
    ]
