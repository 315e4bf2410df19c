import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ctclip import cli
from ctclip.cli.command import command

ROOT = Path(__file__).parents[1]


def _console_commands() -> dict[str, str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    return dict(line.split(" = ") for line in lines)


@pytest.mark.parametrize("target", sorted(_console_commands().values()))
def test_every_console_command_exists_and_explains_itself(target, capsys):
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)

    with pytest.raises(SystemExit) as stopped:
        function(["--help"])

    assert stopped.value.code == 0
    assert function.__doc__.splitlines()[0] in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_every_command_function_is_a_console_command():
    assert {f"ctclip.cli:{name}" for name in cli.__all__} == set(_console_commands().values())


@pytest.mark.parametrize("script", sorted((ROOT / "eval").glob("*.py")), ids=lambda p: p.name)
def test_every_script_answers_for_help_without_heavy_imports(script):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(script), "--help"], capture_output=True, text=True
    )

    assert done.returncode == 0
    assert "usage:" in done.stdout
    assert " torch\n" not in done.stderr


def test_a_misspelt_config_key_is_one_sentence(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.phantom([f"--out={tmp_path}", "num_patient=3"])

    assert stopped.value.code == 2
    assert "did you mean num_patients?" in capsys.readouterr().err


def test_overrides_after_a_flag_of_many_values_are_overrides(tmp_path, capsys):
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(SystemExit):
        cli.lesion_size(
            [f"--ckpt={tmp_path / 'm.safetensors'}", "--volumes", "a.nii.gz", "diameter_mm=[6]"]
        )

    assert "did you mean diameters_mm?" in capsys.readouterr().err


def test_a_flag_without_a_value_for_key_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.phantom(["--out=x", "num_patients"])

    assert "expected key=value, got 'num_patients'" in capsys.readouterr().err


TYPOS = {
    "a path of pretraining": ("pretrain", ["cohort=misspelt", "out=run"], "no prepared cohort in"),
    "what pretraining needs": ("pretrain", ["out=run"], "cohort=FOLDER is missing"),
    "pretraining's config": ("pretrain", ["--config=no.yaml"], "config file no.yaml does not"),
    "a checkpoint": ("zero_shot", ["--ckpt=no.safetensors", "--cohort=."], "no checkpoint no.safe"),
    "a cohort": ("zero_shot", ["--ckpt=setup.cfg", "--cohort=misspelt"], "no prepared cohort in"),
    "a key": ("zero_shot", ["--ckpt=setup.cfg", "--cohort=.", "replicate=1"], "mean replicates?"),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_found_before_anything_slow_is_imported(typo):
    name, given, words = TYPOS[typo]
    run = f"import sys; from ctclip import cli; cli.{name}(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", run, *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert words in done.stderr
    assert " torch\n" not in done.stderr


def test_a_launchers_processes_leave_it_to_the_first_to_report_an_error(monkeypatch, capsys):
    waited = []
    # This module's clock alone: threads that other tests left behind sleep too.
    monkeypatch.setattr("ctclip.cli.command.time", SimpleNamespace(sleep=waited.append))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            cli.zero_shot(["--ckpt=no.safetensors", "--cohort=."])
        # Whoever is not ended by the launcher meanwhile has an error of its own to tell.
        assert "no checkpoint" in capsys.readouterr().err
        assert len(waited) == int(rank)


def test_what_the_system_refuses_is_named_with_its_path(tmp_path, capsys):
    blocked = tmp_path / "file" / "out"
    blocked.parent.write_text("not a folder")

    @command
    def write(argv=None):
        blocked.mkdir()

    with pytest.raises(SystemExit) as stopped:
        write([])

    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith(f"error: {blocked}: not a directory; name a path")
    assert "Errno" not in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "error: no space left on device; free space"),
        (OSError(28, "no space left in runs/a: lower checkpoint.keep"), "error: no space left in"),
    ],
)
def test_a_full_disk_is_not_called_a_wrong_path(error, words, capsys):
    @command
    def write(argv=None):
        raise error

    with pytest.raises(SystemExit):
        write([])

    said = capsys.readouterr().err
    assert said.startswith(words)
    assert "Errno" not in said
    assert "name a path" not in said


def test_a_write_that_the_disk_refuses_is_explained(capsys):
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("no /dev/full on this machine: nothing that refuses every write")

    @command
    def write(argv=None):
        full.write_bytes(b"scores")

    with pytest.raises(SystemExit):
        write([])

    assert "no space left on device; free space there" in capsys.readouterr().err
