import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ctclip.evaluation import metrics, plots, report
from ctclip.evaluation.scores import ScoreTable


@pytest.fixture
def table() -> ScoreTable:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 2)) < 0.4).astype(float)
    labels[:, 1] = 0
    return ScoreTable(
        volume_id=np.array([f"v{i}" for i in range(60)]),
        study_id=np.array([f"s{i}" for i in range(60)]),
        patient_id=np.array([f"p{i}" for i in range(60)]),
        split=np.full(60, "test"),
        findings=("Emphysema", "Hiatal hernia"),
        labels=labels,
        scores=rng.random((60, 2)),
        header={"model": "a <b> model"},
    )


def test_a_report_is_one_file_that_needs_no_network(tmp_path, table):
    evaluation = metrics.evaluate(table, replicates=250)
    extra = report.Section(
        title="Similar cases",
        gallery=[report.Picture(image=np.zeros((8, 8), np.uint8), caption="query")],
        frames=[pd.DataFrame({"name": ["<script>"], "value": [0.5]})],
    )
    page = report.Report(
        title="Quick look",
        facts=table.header,
        sections=[*report.zero_shot_sections(table, evaluation), extra],
    )
    text = page.write(tmp_path / "report.html").read_text()

    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert "http" not in text
    assert text.count("data:image/png;base64,") == 3
    assert "no positives: not measured" in text
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "a &lt;b&gt; model" in text
    assert not list(tmp_path.glob("*.tmp"))


def test_figures_are_written_as_png_and_svg(tmp_path, table):
    evaluation = metrics.evaluate(table, replicates=0)
    for path in plots.save(plots.roc_grid([table], [evaluation]), tmp_path / "roc"):
        assert path.stat().st_size > 1000


def test_intervals_are_written_only_where_they_exist():
    nan = float("nan")
    assert report.with_interval(nan) == "–"
    assert report.with_interval(0.5) == "0.500"
    assert report.with_interval(0.5, 0.4, 0.6) == "0.500 [0.400, 0.600]"


def test_the_terminal_table_shows_whole_numbers_in_eighty_columns(table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table = replace(
        table,
        findings=("Coronary artery wall calcification", "Hiatal hernia"),
        header={"model": "toy", "protocol": "ct-rate-18@0123456789ab"},
    )
    found = metrics.evaluate(table, replicates=250)
    rare = replace(found.findings[0], positives=1999, negatives=8001, note="rough: 17 patients")
    report.print_evaluation(replace(found, findings=[rare, found.findings[1]]))
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "* rough: 17 patients: Coronary artery wall calcification\n" in out
    assert "* no positives: not measured: Hiatal hernia\n" in out
    assert "ct-rate-18@0123456789ab; split: test; 60 cases of 60 patients" in out


def test_a_macro_that_was_not_measured_is_a_dash_in_the_terminal(table, capsys):
    report.print_evaluation(metrics.evaluate(table.of_findings(["Hiatal hernia"]), replicates=0))
    assert "nan" not in capsys.readouterr().out
