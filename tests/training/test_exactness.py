"""A part of the matrix that benchmarks/exactness.py prints, with real processes and dropout on."""

from pathlib import Path

import pytest
import toy_cohort

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_processes_micro_batches_and_zero_stages_train_the_same(tmp_path, monkeypatch):
    """Losses of 5 steps, the whole first gradient, and the weights after 5 steps."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import exactness

    cohort = toy_cohort.build(tmp_path / "cohort")
    combinations = [(1, 4, 2, "fp32"), (2, 2, 1, "fp32"), (4, 1, 0, "fp32"), (4, 4, 2, "fp32")]

    rows = list(exactness.compare(combinations, cohort, tmp_path / "runs"))

    for row in rows:
        for name in ("loss", "gradient", "weight"):
            assert row[name] <= 1e-6, (name, row)
        assert row["later_gradients"] <= 1e-5, row
