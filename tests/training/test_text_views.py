import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.random import default_rng
from ranks import on_ranks

from ctclip.data.manifest import VolumeRecord
from ctclip.findings import FINDINGS
from ctclip.training.text_views import (
    SentenceBank,
    TextViewConfig,
    prompts,
    read_sample,
    read_study,
    report_view,
    sentence_view,
    text_id,
)


def study(findings: str | None = None, impression: str | None = None):
    return read_study(
        VolumeRecord(
            volume_id="v",
            study_id="s",
            patient_id="p",
            split="train",
            path=None,
            findings=findings,
            impression=impression,
        )
    )


def polarity(text, finding):
    return text.polarity[FINDINGS.index(finding)]


def test_polarity_is_read_from_the_report():
    text = study("There is a pleural effusion on the left. No lymphadenopathy.")

    assert polarity(text, "Pleural effusion") == 1.0
    assert polarity(text, "Lymphadenopathy") == 0.0
    assert math.isnan(polarity(text, "Hiatal hernia"))
    assert not text.normal


def test_stated_on_one_side_counts_as_stated():
    text = study("There is a pleural effusion on the left.", "No pleural effusion on the right.")

    assert polarity(text, "Pleural effusion") == 1.0


def test_a_report_that_only_negates_is_normal():
    assert study("No pleural effusion. No cardiomegaly.").normal
    assert not study("The trachea is open.").normal


def test_a_missing_section_gives_the_other_one():
    config = TextViewConfig(sections="impression", shuffle_sentences=False)

    assert report_view(study("Emphysema is seen."), config, default_rng(0)) == "Emphysema is seen."


def test_shuffling_keeps_every_sentence():
    text = study("Emphysema is seen. No effusion. The heart is large.", "Emphysema.")
    views = {report_view(text, TextViewConfig(), default_rng(seed)) for seed in range(8)}

    assert len(views) > 1
    assert len({tuple(sorted(view.split(". "))) for view in views}) <= len(views)
    assert all("The heart is large." in view for view in views)


def test_dropping_a_section_keeps_one_of_them():
    text = study("Emphysema is seen.", "Small effusion.")
    config = TextViewConfig(drop_section=1.0, shuffle_sentences=False)
    views = {report_view(text, config, default_rng(seed)) for seed in range(12)}

    assert views == {"Emphysema is seen.", "Small effusion."}


def test_every_sentence_has_its_turn():
    text = study("Emphysema is seen. No effusion. The heart is large.")

    plain = TextViewConfig()
    views = {sentence_view(text, plain, default_rng(seed)) for seed in range(40)}
    assert views == set(text.sentences)
    assert sentence_view(study(), plain, default_rng(0)) == ""


def test_synonyms_change_words_and_keep_the_meaning():
    text = study("Pleural effusion on the left. No cardiomegaly. Several nodules.")
    config = TextViewConfig(synonyms=1.0, shuffle_sentences=False)
    views = {report_view(text, config, default_rng(seed)) for seed in range(20)}

    assert all("leural effusion" not in view for view in views)
    assert any(view.startswith("Fluid in the pleural space on the left.") for view in views)
    assert any("No enlarged heart." in view for view in views)
    assert all("Several nodules." in view for view in views)
    for view in views:
        again = study(view)
        assert polarity(again, "Pleural effusion") == 1.0
        assert polarity(again, "Cardiomegaly") == 0.0


def test_the_bank_keeps_only_sentences_about_one_finding():
    bank = SentenceBank(
        [
            study("Emphysema is seen."),
            study("There is no emphysema."),
            study("No emphysema or pleural effusion."),
        ]
    )

    assert bank.num_sentences("Emphysema", present=True) == 1
    assert bank.num_sentences("Emphysema", present=False) == 1
    present, absent = bank.pairs(default_rng(0), template_share=0.0)
    where = FINDINGS.index("Emphysema")
    assert (present[where], absent[where]) == ("Emphysema is seen.", "There is no emphysema.")
    assert len(present) == len(absent) == len(FINDINGS)


def test_how_often_a_finding_is_stated_depends_on_what_silence_means():
    bank = SentenceBank([study("Emphysema is seen."), *[study("The trachea is open.")] * 9])
    where = FINDINGS.index("Emphysema")

    assert bank.rate(0.0)[where] == pytest.approx(1.5 / 2)
    assert bank.rate(1.0)[where] == pytest.approx(1.5 / 11)
    assert np.all((bank.rate(0.5) > 0) & (bank.rate(0.5) < 1))


def test_prompts_are_those_of_zero_shot():
    present, absent = prompts()

    assert present[0] == "Medical material is present."
    assert absent[0] == "Medical material is not present."


def test_equal_texts_have_one_identity_whatever_their_case_and_margins():
    assert text_id(" No effusion. ") == text_id("no effusion.")
    assert text_id("No effusion.") != text_id("Effusion.")
    assert text_id("x") >= 0


def records(num_studies: int) -> list[VolumeRecord]:
    """Two volumes of each study."""
    return [
        VolumeRecord(
            volume_id=f"{study}_{volume}",
            study_id=f"{study}",
            patient_id=f"{study}",
            split="train",
            path=None,
            findings=f"Study {study}. There is no effusion.",
        )
        for study in range(num_studies)
        for volume in range(2)
    ]


def sample_of_five():
    return read_sample(records(9), most=5, seed=3)


def test_ranks_share_the_reading_and_hold_the_same_sample():
    alone = sample_of_five()
    first, second = on_ranks(2, sample_of_five)

    assert repr(first) == repr(second) == repr(alone)  # nan is not equal to itself
    assert len({study.findings for study in alone}) == 5
    assert [study.findings for study in read_sample(records(9))] == [
        f"Study {study}. There is no effusion." for study in range(9)
    ]


def test_what_the_tokenizer_cuts_from_the_reports_is_counted_once_per_report():
    from ctclip.models.text import Tokenizer
    from ctclip.training.text_views import text_lengths

    long = VolumeRecord(
        volume_id="v",
        study_id="s",
        patient_id="p",
        split="train",
        path=None,
        findings="No pleural effusion on the right side.",
        impression="Nodule.",
    )
    short, none = replace(long, findings=None), replace(long, findings=None, impression=None)
    tokenizer = Tokenizer.builtin(8)
    length = tokenizer("No pleural effusion on the right side. Nodule.", 99).shape[1]
    found = text_lengths([long, long, short, none], tokenizer, TextViewConfig())
    assert (found.num_texts, found.num_truncated, found.num_cut) == (2, 1, length - 8)
    found = text_lengths([long, short], tokenizer, TextViewConfig(sections="impression"))
    assert (found.num_texts, found.num_truncated) == (1, 0)
