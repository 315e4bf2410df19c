"""Every data set that the project reads has a card, and every card answers every question."""

import re
from pathlib import Path

import pytest
import yaml

CARDS = sorted((Path(__file__).parents[1] / "data_cards").glob("*.md"))
TEMPLATE = "own_data"

HEADINGS = [
    "Motivation",
    "Composition",
    "Collection",
    "Preprocessing and labels",
    "Splits",
    "Uses and out-of-scope",
    "Privacy and access",
    "Known limits",
    "Maintenance",
]
HEADER = {"pretty_name", "license", "language", "size_categories", "task_categories"}
PATIENTS = ("scanner", "kernel", "contrast", "slice thickness", "sex", "age")
FILLERS = re.compile(r"\b(?:todo|tbd|fixme|lorem|xxx)\b|<[a-z][^>]*>", re.IGNORECASE)


def sections(card):
    parts = re.split(r"^## (.+)$", card.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], (body.strip() for body in parts[2::2]), strict=True))


def test_every_source_has_a_card():
    names = {card.stem for card in CARDS}
    assert {"ct_rate", "rad_chestct", TEMPLATE} <= names
    assert any(name.startswith("phantom") for name in names)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
class TestCard:
    def test_opens_with_the_hubs_header(self, card):
        match = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), re.DOTALL)
        assert match, "no YAML header"
        header = yaml.safe_load(match[1])
        assert set(header) >= HEADER
        assert all(header[key] for key in HEADER)

    def test_answers_every_question_in_order(self, card):
        found = sections(card)
        assert [name for name in found if name in HEADINGS] == HEADINGS
        for name in HEADINGS:
            assert len(found[name].split()) >= 5, f"{name} is empty"

    def test_tells_what_kind_of_patients_and_scans_it_holds(self, card):
        text = sections(card)["Composition"].lower()
        assert [word for word in PATIENTS if word not in text] == []
        labels = sections(card)["Preprocessing and labels"].lower()
        assert "label" in labels
        assert "error" in labels

    def test_leaves_no_placeholder(self, card):
        # Angle brackets in code are syntax, not something left to fill in.
        text = re.sub(r"`[^`]*`", "", card.read_text(encoding="utf-8"))
        found = FILLERS.findall(text)
        if card.stem == TEMPLATE:
            assert found, "the template has nothing left to fill in"
        else:
            assert not found
