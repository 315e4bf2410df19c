import os
import subprocess
import sys
from pathlib import Path


def test_a_test_data_folder_that_is_not_there_skips_its_tests(tmp_path):
    tests = Path(__file__).parent

    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "tests/evaluation/test_ct_clip_fixture.py",
            "tests/data/test_ct_clip.py",
        ],
        cwd=tests.parent,
        env=os.environ | {"CTCLIP_TEST_DATA": str(tmp_path / "nothing")},
        capture_output=True,
        text=True,
    )

    assert run.returncode == 0, run.stdout
    assert "skipped" in run.stdout
    assert f"CTCLIP_TEST_DATA names {tmp_path / 'nothing'}, no folder" in run.stdout
