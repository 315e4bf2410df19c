import csv
import gzip
import itertools
from collections import defaultdict
from importlib import resources

import pytest
import yaml

from ctclip.data.mentions import labels_from_text, mentions
from ctclip.data.report import clean
from ctclip.findings import FINDINGS

AFFIRMED = ["{} is present.", "There is {}.", "{} is observed in both lungs.", "Findings of {}."]
DENIED = [
    "{} is not present.",
    "No evidence of {}.",
    "There is no {}.",
    "{} was not observed.",
    "The scan is without {}.",
    "Negative for {}.",
    "{} is absent.",
    "Neither {} nor anything else is seen.",
]


@pytest.mark.parametrize("finding", FINDINGS)
@pytest.mark.parametrize("lower", [True, False])
def test_plain_templates_are_understood_for_every_finding(finding, lower):
    name = finding.lower() if lower else finding
    for template in AFFIRMED:
        assert labels_from_text(template.format(name)).get(finding) == 1, template
    for template in DENIED:
        assert labels_from_text(template.format(name)).get(finding) == 0, template


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The heart is enlarged.", {"Cardiomegaly": 1}),
        ("Heart size is within normal limits.", {"Cardiomegaly": 0}),
        ("Cardiothoracic ratio is increased in favour of the heart.", {"Cardiomegaly": 1}),
        ("Fluid in the left pleural space, up to 2 cm.", {"Pleural effusion": 1}),
        (
            "No pleural or pericardial effusion.",
            {"Pleural effusion": 0, "Pericardial effusion": 0},
        ),
        ("Calcified plaques along the LAD.", {"Coronary artery wall calcification": 1}),
        ("Atheromatous changes of the aortic arch.", {"Arterial wall calcification": 1}),
        ("Subcarinal lymph nodes are enlarged to 15 mm.", {"Lymphadenopathy": 1}),
        ("No enlarged lymph nodes are seen.", {"Lymphadenopathy": 0}),
        ("Bullae in both apices.", {"Emphysema": 1}),
        ("Patchy ground-glass areas in the lower lobes.", {"Lung opacity": 1}),
        ("Scarring at the right apex.", {"Pulmonary fibrotic sequela": 1}),
        ("Dilated bronchi in the lingula.", {"Bronchiectasis": 1}),
        ("Kerley B lines at the bases.", {"Interlobular septal thickening": 1}),
        ("Bronchial walls are thickened.", {"Peribronchial thickening": 1}),
        ("A pacemaker is in place.", {"Medical material": 1}),
        ("Part of the stomach is herniated into the chest.", {"Hiatal hernia": 1}),
        ("Air trapping at the bases.", {"Mosaic attenuation pattern": 1}),
        ("A 6 mm nodule in the right upper lobe.", {"Lung nodule": 1}),
        ("No change in the 6 mm nodule of the right lung.", {"Lung nodule": 1}),
        ("Atelectasis cannot be excluded.", {"Atelectasis": 1}),
        ("The trachea is open.", {}),
        (
            "No consolidation, but a nodule in the left lung.",
            {"Consolidation": 0, "Lung nodule": 1},
        ),
        (
            "Emphysema without bronchiectasis.",
            {"Emphysema": 1, "Bronchiectasis": 0},
        ),
    ],
)
def test_radiologists_words_are_understood(sentence, expected):
    assert labels_from_text(sentence) == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Hazy opacity that does not obscure the vessels is present.", {"Lung opacity": 1}),
        ("An opacity which doesn't obscure the vessels is seen.", {"Lung opacity": 1}),
        ("Opacity that does not obscure the vessels is not seen.", {"Lung opacity": 0}),
        ("Opacity which was described before is not seen.", {"Lung opacity": 0}),
        ("There is no opacity, which doesn't exclude early infection.", {"Lung opacity": 0}),
        (
            "Ground-glass opacity that does not contain consolidation is present.",
            {"Lung opacity": 1, "Consolidation": 0},
        ),
        (
            "Ground-glass opacity is not accompanied by pleural effusion.",
            {"Lung opacity": 1, "Pleural effusion": 0},
        ),
        ("A nodule, which cannot be measured, is seen in the right lung.", {"Lung nodule": 1}),
        ("The lung nodule is not calcified.", {"Lung nodule": 1}),
        ("Several lung nodules, none larger than 5 mm, are seen.", {"Lung nodule": 1}),
        ("Ground-glass nodules are present in both lungs.", {"Lung nodule": 1}),
        ("Consolidation that was not present before is seen.", {"Consolidation": 1}),
        (
            "Pleural effusion is observed and was not detected in the previous examination.",
            {"Pleural effusion": 1},
        ),
        (
            "Pleural effusion, which was present in the previous examination, is not observed.",
            {"Pleural effusion": 0},
        ),
        (
            "Lymph nodes that did not reach pathological dimensions were observed.",
            {"Lymphadenopathy": 0},
        ),
        ("Mediastinal lymph nodes, none larger than 10 mm.", {"Lymphadenopathy": 0}),
    ],
)
def test_not_denies_only_what_it_speaks_of(sentence, expected):
    assert labels_from_text(sentence) == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The heart measures 177 mm, above normal, in keeping with cardiomegaly.", 1),
        ("The heart measures 140 mm (normal up to 130 mm): cardiomegaly.", 1),
        ("The heart is larger than normal.", 1),
        ("Heart size is above the upper limit of normal.", 1),
        ("Cardiothoracic ratio is greater than normal.", 1),
        ("Heart size is not normal, cardiomegaly is present.", 1),
        ("The heart is enlarged and the aorta is of normal width.", 1),
        ("The heart is not larger than normal.", 0),
        ("Heart size does not exceed normal limits.", 0),
        ("The heart and the aorta are normal.", 0),
        ("Pericardial effusion of 12 mm, heart size normal.", 0),
    ],
)
def test_above_normal_is_not_normal(sentence, expected):
    assert labels_from_text(sentence)["Cardiomegaly"] == expected


def test_what_phantom_hospitals_say_is_read_as_they_mean_it():
    wording = yaml.safe_load(
        resources.files("ctclip.phantom").joinpath("data/wording.yaml").read_text("utf-8")
    )
    slots = defaultdict(
        lambda: "marked", where="both lower lobes", size="12 mm", n="7", kind="solid"
    )
    for name, words in wording.items():
        for template in words["says"] + words["img"] + words["short"]:
            assert labels_from_text(template.format_map(slots)).get(name, 1) == 1, template
        for template in words["denies"]:
            assert labels_from_text(template).get(name, 0) == 0, template


def test_an_affirmation_anywhere_makes_the_report_positive():
    text = "No effusion on the right. Pleural effusion on the left. No pleural effusion else."
    assert labels_from_text(text)["Pleural effusion"] == 1


def test_a_mention_carries_its_sentence_and_its_hedge():
    (mention,) = mentions("The trachea is open. Possible consolidation in the lingula.")
    assert mention.sentence == "Possible consolidation in the lingula."
    assert mention.hedged
    assert mention.present


def test_agrees_with_manual_labels_of_real_reports(test_data):
    """Macro F1 of the rules against reports labelled by hand; on all 800, 0.93."""
    path = test_data / "data/real/reports/ctrate_style_reports_800_manual_labels.csv.gz"
    hits = {name: [0, 0, 0] for name in FINDINGS}
    with gzip.open(path, "rt", encoding="utf-8-sig") as file:
        for row in itertools.islice(csv.DictReader(file), 300):
            sections = [clean(row["Findings_EN"]), clean(row["Impressions_EN"])]
            labels = labels_from_text("\n".join(text for text in sections if text))
            for name in FINDINGS:
                truth, found = row[name] == "1", labels.get(name) == 1
                hits[name][0] += truth and found
                hits[name][1] += found and not truth
                hits[name][2] += truth and not found
    f1 = {name: 2 * tp / (2 * tp + fp + fn) for name, (tp, fp, fn) in hits.items()}
    assert sum(f1.values()) / len(f1) > 0.9
    assert min(f1.values()) > 0.75
