from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_cohort

from ctclip import losses
from ctclip.data.cohort import PreparedCohort
from ctclip.data.dataset import CohortDataset, collate
from ctclip.models.text import TextConfig, build_tokenizer
from ctclip.training.batches import StepBuilder
from ctclip.training.feed import StepVolumes
from ctclip.training.objective import LossConfig, Targets
from ctclip.training.text_views import SentenceBank, TextViewConfig, read_study

CPU = torch.device("cpu")


def targets_of(folder: Path, views: TextViewConfig, **report: str) -> Targets:
    """What six studies are compared with, whose reports have the given sections in common."""
    cohort = PreparedCohort.open(toy_cohort.build(folder, num_studies=8))
    records = [replace(record, **report) for record in cohort.split("train")]
    dataset = CohortDataset(cohort, records)
    pieces = [collate([dataset[i], dataset[i + 1]]) for i in (0, 2, 4)]
    studies = [read_study(record) for record in records]
    tokenizer = build_tokenizer(TextConfig(name_or_path=None))
    wanted = LossConfig(sentence=1.0)
    builder = StepBuilder(tokenizer, SentenceBank(studies), views, wanted, seed=0, device=CPU)
    return builder(pieces, studies, StepVolumes(pieces, dataset.finished, CPU), 0)[1]


def contrast(identity: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, len(identity), 8, generator=generator)
    return float(losses.info_nce(image, text, torch.ones(1), identity))


def test_identical_reports_are_no_negatives_of_each_other_whole_or_by_the_sentence(tmp_path):
    same = {"findings": "No acute finding in the chest. Heart is normal.", "impression": "Normal."}
    targets = targets_of(tmp_path, TextViewConfig(), **same)

    assert contrast(targets.identity) == pytest.approx(0.0, abs=1e-6)
    assert contrast(targets.sentence_identity) == pytest.approx(0.0, abs=1e-6)


def test_reports_of_which_the_same_is_left_are_no_negatives(tmp_path):
    views = TextViewConfig(sections="impression")
    targets = targets_of(tmp_path, views, impression="No acute abnormality.")

    assert contrast(targets.identity) == pytest.approx(0.0, abs=1e-6)


def test_other_reports_are_negatives(tmp_path):
    targets = targets_of(tmp_path, TextViewConfig())

    assert contrast(targets.identity) > 1.0
