from collections import Counter

import pytest

from ctclip.data.report import clean, report_text, split_sections, split_sentences


@pytest.mark.parametrize(
    "cell", [None, "", "  ", "Not given.", "not given", "nan", "NaN", "None", "N/A", "-", "."]
)
def test_cells_that_mean_nothing_are_absent(cell):
    assert clean(cell) is None


def test_cleaning_keeps_every_word_and_counts_what_it_removes():
    counts: Counter[str] = Counter()
    dirty = '•  Small  "nodule" in\u200b the\u00a0right lung.\r\n"Second   finding."'
    assert clean(dirty, counts) == "Small nodule in the right lung.\nSecond finding."
    assert counts["invisible"] == 1
    assert counts["bullet"] == 2
    assert counts["space"] > 0
    assert clean("Not given.", counts) is None
    assert counts["absent"] == 1


def test_ordinary_words_that_look_like_absences_survive_in_a_sentence():
    assert clean("None of the nodes is enlarged.") == "None of the nodes is enlarged."


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "A nodule of 5.3 mm. in the apex. The heart is normal.",
            ["A nodule of 5.3 mm. in the apex.", "The heart is normal."],
        ),
        (
            "It measures 4 mm. The pleura is thin.",
            ["It measures 4 mm.", "The pleura is thin."],
        ),
        ("Cyst (Img. 63) is stable.", ["Cyst (Img. 63) is stable."]),
        ("Compare with Dr. Adams.", ["Compare with Dr. Adams."]),
        ("Seen by T. A. Lee. Stable.", ["Seen by T. A. Lee.", "Stable."]),
        ("1. Emphysema. 2. Hernia 3. Goitre", ["Emphysema.", "Hernia 3. Goitre"]),
        ("1) Emphysema.\n2) Two nodules.", ["Emphysema.", "Two nodules."]),
        ("Lung window; Aeration is normal.", ["Lung window", "Aeration is normal."]),
        ("右肺结节。无胸腔积液；心影不大。", ["右肺结节。", "无胸腔积液；", "心影不大。"]),
        ("One line\nanother line", ["One line", "another line"]),
        ("No full stop", ["No full stop"]),
        ("", []),
        ("Is it? Yes! Sure.", ["Is it?", "Yes!", "Sure."]),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text, sentences):
    assert split_sentences(text) == sentences


def test_splitting_loses_no_word_of_real_reports(test_data):
    import csv
    import re

    path = test_data / "data/real/reports/ctrate_valid_reports.csv"
    with path.open(encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            text = clean(row["Findings_EN"])
            if text is None:
                continue
            joined = " ".join(split_sentences(text))
            assert re.findall(r"[a-z]{2,}", joined) == re.findall(r"[a-z]{2,}", text)


def test_a_report_in_one_cell_is_split_at_its_headings():
    assert split_sections("Findings: A. B. Impression: C.") == ("A. B.", "C.")
    assert split_sections("IMPRESSION:\nC.") == (None, "C.")
    assert split_sections("Just text.") == ("Just text.", None)
    assert split_sections(None) == (None, None)


@pytest.mark.parametrize(
    ("sections", "text"), [("both", "A. B."), ("findings", "A."), ("impression", "B.")]
)
def test_sections_are_joined_in_order(sections, text):
    assert report_text("A.", "B.", sections) == text
    assert report_text(None, None, sections) == ""


def test_one_missing_section_leaves_the_other():
    assert report_text(None, "B.") == "B."
    assert report_text("A.\nA2.", None) == "A. A2."
