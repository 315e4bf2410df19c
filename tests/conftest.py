"""What every test runs under: no network, no tracker, one thread, warnings of ours as errors."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NAMED = os.environ.get("CTCLIP_TEST_DATA", "")
WITHOUT = f"CTCLIP_TEST_DATA names {NAMED}, no folder" if NAMED else "CTCLIP_TEST_DATA is not set"
if not NAMED or not Path(NAMED).is_dir():
    os.environ.pop("CTCLIP_TEST_DATA", None)  # a folder that isn't there is as none: tests skip


def pytest_report_header() -> str:
    found = "CTCLIP_TEST_DATA" in os.environ
    return f"real scans and fixtures: {NAMED if found else f'none ({WITHOUT}), their tests skip'}"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real scans, reports and fixtures; its tests skip where it is absent."""
    folder = os.environ.get("CTCLIP_TEST_DATA")
    if not folder:
        pytest.skip(f"{WITHOUT}: no real scans and fixtures")
    return Path(folder)
