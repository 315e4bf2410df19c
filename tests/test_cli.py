import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path

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


def test_a_flag_without_a_value_for_key_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.phantom(["--out=x", "num_patients"])

    assert "expected key=value, got 'num_patients'" in capsys.readouterr().err


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
