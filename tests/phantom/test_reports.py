"""What reports say, what their labels say, and how each error shows."""

import numpy as np
import pytest

from ctclip.findings import FINDINGS
from ctclip.phantom.lesions import Lesion
from ctclip.phantom.reports import STYLES, ReportConfig, write_report


def nodule(size_mm: float) -> Lesion:
    return Lesion(
        finding="Lung nodule",
        kind="solid",
        side="left",
        lobe="left upper lobe",
        size_mm=size_mm,
        severity=0.2,
    )


def effusion() -> Lesion:
    return Lesion(
        finding="Pleural effusion",
        kind="free",
        side="right",
        lobe="right pleural space",
        size_mm=30.0,
        severity=0.4,
    )


def many(lesions, config=None, style=None, count=300):
    config = config or ReportConfig()
    return [
        write_report(lesions, [7] * len(lesions), config, np.random.default_rng(i), style)
        for i in range(count)
    ]


def said(report, finding):
    return next(s for s in report.statements if s.finding == finding)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_states_what_was_drawn_and_where(style):
    for report in many([nodule(12.0), effusion()], style=style, count=40):
        text = f"{report.findings} {report.impression}".lower()
        assert "nodule" in text
        assert "effusion" in text or "fluid" in text
        assert {s.finding for s in report.statements if s.label} == {
            "Lung nodule",
            "Pleural effusion",
        }


def test_only_the_slice_number_style_counts_images():
    with_numbers = {
        style: sum("Img 7" in report.findings for report in many([nodule(9.0)], style=style))
        for style in STYLES
    }
    assert with_numbers["slices"] > 250
    assert with_numbers["exhaustive"] == with_numbers["terse"] == 0


def test_terse_reports_have_an_impression_only():
    for report in many([nodule(9.0)], style="terse", count=20):
        assert report.findings == ""
        assert report.impression


def test_absent_findings_are_denied_as_often_as_in_ct_rate():
    reports = many([], style="exhaustive", count=600)
    share = {
        name: np.mean([said(report, name).says == "negated" for report in reports])
        for name in FINDINGS
    }
    assert share["Lymphadenopathy"] == pytest.approx(0.92, abs=0.05)
    assert share["Pleural effusion"] == pytest.approx(0.68, abs=0.07)
    assert share["Lung nodule"] == pytest.approx(0.34, abs=0.07)
    assert share["Emphysema"] == share["Hiatal hernia"] == 0


@pytest.mark.parametrize(
    ("rate", "error", "label"),
    [
        ("omission", "omission", 0),
        ("hedge", "hedge", 1),
        ("contradiction", "contradiction", 1),
    ],
)
def test_each_error_has_its_own_rate_and_is_recorded(rate, error, label):
    reports = many([effusion()], ReportConfig(**{rate: 0.4}))
    statements = [said(report, "Pleural effusion") for report in reports]
    wrong = [s for s in statements if s.error]
    assert {s.error for s in wrong} == {error}
    assert len(wrong) / len(statements) == pytest.approx(0.4, abs=0.1)
    assert all(s.label == label for s in wrong)


def test_false_mentions_label_what_nobody_drew():
    reports = many([], ReportConfig(false_mention=0.2), count=100)
    statements = [s for report in reports for s in report.statements]
    false = [s for s in statements if s.error == "false mention"]
    assert len(false) / len(statements) == pytest.approx(0.2, abs=0.03)
    assert all(s.label == 1 and not s.drawn for s in false)


def test_small_nodules_are_missed_more_often_than_large_ones():
    def missed(size_mm):
        reports = many([nodule(size_mm)], ReportConfig(small_miss=1.0))
        return np.mean([said(report, "Lung nodule").error == "small miss" for report in reports])

    shares = [missed(size) for size in (2.0, 4.0, 8.0, 20.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[1] == pytest.approx(np.exp(-1), abs=0.1)
    assert shares[3] < 0.03


def test_a_contradictory_reader_denies_in_the_impression_what_the_findings_affirm():
    config = ReportConfig(contradiction=1.0)
    for report in many([effusion()], config, "exhaustive", 20):
        assert "no" in report.impression.lower().split() or "not" in report.impression.lower()
        assert "fusion" in report.findings or "fluid" in report.findings


def test_words_vary():
    texts = {report.findings for report in many([nodule(9.0), effusion()], style="exhaustive")}
    assert len(texts) > 200


def test_rates_outside_0_to_1_are_refused():
    with pytest.raises(ValueError, match="hedge"):
        ReportConfig(hedge=1.5)
