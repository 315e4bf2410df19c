import json
import math

import pytest

from ctclip.training.monitor import Monitor, MonitorConfig, require_tracker


def monitor(out, start_step=0, **changes):
    return Monitor(
        out, MonitorConfig(**{"log_every": 2} | changes), {}, start_step=start_step, total_steps=10
    )


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_line_averages_over_its_steps(tmp_path):
    with monitor(tmp_path) as running:
        for step, loss in enumerate([1.0, 3.0, 5.0, 7.0], start=1):
            running.step(step, volumes=8, waited_s=0.0, numbers={"loss": loss})

    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 2.0), (4, 6.0)]
    assert all(line["volumes_per_s"] > 0 for line in lines(tmp_path))
    assert all(line["data_wait_share"] == 0.0 for line in lines(tmp_path))
    assert all(line["peak_gib"] > 0 for line in lines(tmp_path))


def test_utilisation_is_counted_against_the_peak_of_all_devices(tmp_path, monkeypatch):
    """Half of the peak by construction: as many FLOP/s as were done, against twice of that."""
    from ctclip.training import monitor as module

    with Monitor(
        tmp_path,
        MonitorConfig(log_every=1),
        {},
        start_step=0,
        total_steps=2,
        flops_per_step=3e12,
    ) as running:
        monkeypatch.setattr(module, "peak_flops", lambda: 1e12)
        line = running.step(1, volumes=8, waited_s=0.0, numbers={"loss": 1.0})

    assert line["mfu"] == pytest.approx(3.0 * line["volumes_per_s"] / 8)


def test_the_last_step_writes_a_line_wherever_the_others_stand(tmp_path):
    with monitor(tmp_path, log_every=8) as running:
        for step in range(1, 11):
            running.step(step, volumes=8, waited_s=0.0, numbers={"loss": float(step)})

    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(8, 4.5), (10, 9.5)]


def test_a_skipped_step_does_not_spoil_the_mean(tmp_path):
    with monitor(tmp_path) as running:
        running.step(1, volumes=8, waited_s=0.0, numbers={"loss": math.nan})
        running.step(2, volumes=8, waited_s=0.0, numbers={"loss": 4.0})

    assert lines(tmp_path)[0]["loss"] == 4.0


def test_going_on_drops_the_lines_that_are_computed_again_and_half_written_ones(tmp_path):
    with monitor(tmp_path) as running:
        for step in range(1, 7):
            running.step(step, volumes=8, waited_s=0.0, numbers={"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')

    with monitor(tmp_path, start_step=4) as running:
        running.step(5, volumes=8, waited_s=0.0, numbers={"loss": 50.0})
        running.step(6, volumes=8, waited_s=0.0, numbers={"loss": 60.0})

    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (2, 1.5),
        (4, 3.5),
        (6, 55.0),
    ]


@pytest.mark.slow
def test_online_wandb_without_a_login_says_what_to_do(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))

    with pytest.raises(ValueError, match="run `wandb login` once, or set monitor.wandb=offline"):
        monitor(tmp_path, wandb="online")
    with pytest.raises(ValueError, match="run `wandb login` once, or set monitor.wandb=offline"):
        require_tracker(MonitorConfig(wandb="online"))


def test_evaluating_and_saving_are_no_part_of_a_steps_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ctclip.training.monitor.time.perf_counter", lambda: now[0])
    with monitor(tmp_path, log_every=1) as running:
        now[0] += 2.0
        with running.paused():
            now[0] += 100.0
        now[0] += 2.0
        line = running.step(1, volumes=8, waited_s=1.0, numbers={})

    assert line["volumes_per_s"] == 2.0
    assert line["data_wait_share"] == 0.25


@pytest.mark.slow
def test_wandb_works_offline_and_tensorboard_beside_it(tmp_path):
    pytest.importorskip("tensorboard")
    with monitor(tmp_path, wandb="offline", tensorboard=True) as running:
        running.write(1, {"loss": 1.0})

    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert list((tmp_path / "tensorboard").iterdir())
