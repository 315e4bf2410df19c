"""What every test runs under: no network, no tracker, one thread, warnings of ours as errors."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real scans, reports and fixtures; its tests skip where it is absent."""
    folder = os.environ.get("CTCLIP_TEST_DATA")
    if not folder:
        pytest.skip("CTCLIP_TEST_DATA is not set: no folder of real scans and fixtures")
    return Path(folder)
