from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy_cohort
from ranks import on_ranks
from scipy.special import softmax

from ctclip.data.cohort import CorruptVolumeError
from ctclip.evaluation import metrics, scoring, zero_shot


def unit(rng, *shape):
    vectors = rng.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_scores_are_the_softmax_over_each_pair():
    rng = np.random.default_rng(0)
    vectors, pairs = unit(rng, 5, 16), unit(rng, 3, 2, 16)
    scale = 14.0
    found = scoring.scores(vectors, pairs, scale)
    for n in range(5):
        for k in range(3):
            logits = scale * pairs[k] @ vectors[n]
            assert found[n, k] == pytest.approx(softmax(logits.astype(np.float64))[0], abs=1e-6)


def test_both_kinds_of_score_rank_alike():
    rng = np.random.default_rng(1)
    vectors, pairs = unit(rng, 80, 16), unit(rng, 1, 2, 16)
    labels = (rng.random(80) < 0.5).astype(float)
    probability = scoring.scores(vectors, pairs, 10.0)[:, 0]
    difference = scoring.scores(vectors, pairs, 10.0, "cosine-difference")[:, 0]
    assert metrics.auroc(labels, probability) == metrics.auroc(labels, difference)


def test_a_volume_equal_to_the_present_prompt_scores_above_one_half():
    pairs = unit(np.random.default_rng(2), 4, 2, 16)
    scores = scoring.scores(pairs[:, 0], pairs, 20.0)
    assert (np.diag(scores) > 0.5).all()


def test_the_command_wants_one_input():
    with pytest.raises(ValueError, match="either --cohort"):
        zero_shot.run("model.safetensors", "out")


@pytest.mark.parametrize("is_known", [True, False])
def test_scores_of_one_scan_say_which_findings_the_model_has_learnt(is_known, capsys):
    measured = {"zero_shot/Emphysema": 0.69, "zero_shot/Cardiomegaly": 0.95, "zero_shot/macro": 0.8}
    checkpoint = SimpleNamespace(provenance={"evaluation": measured} if is_known else {})
    development = zero_shot.development_auroc(checkpoint, scoring.ZeroShotConfig())
    scores = {"Emphysema": 0.9, "Cardiomegaly": 0.8, "Lung nodule": 0.7}

    zero_shot.report.print_scores(scores, development)

    said = capsys.readouterr().out
    assert ("0.69, not learnt" in said) == is_known
    assert ("not measured" in said) == is_known
    assert "0.95, not learnt" not in said
    assert "no probability of disease" in said
    assert ("look at the AUC table" in said) != is_known
    assert max(map(len, said.splitlines())) <= 80


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="batch_size"):
        scoring.ZeroShotConfig(batch_size=0)


def test_the_training_evaluator_reports_what_it_can_measure():
    import torch

    from ctclip.findings import FINDINGS

    rng = np.random.default_rng(0)
    labels = rng.random((12, 18)) < 0.5
    labels[:, 4] = False
    labels[7] = False  # nothing to report: no report
    told = np.roll(labels, 1, axis=0)  # partly another's report, so that not all are found
    told[:, 9:] = labels[:, 9:]
    records = [
        SimpleNamespace(
            volume_id=f"v{i}",
            labels=dict(zip(FINDINGS, map(float, row), strict=True)),
            findings=" ".join(f for f, is_told in zip(FINDINGS, told[i], strict=True) if is_told),
            impression=None,
        )
        for i, row in enumerate(labels)
    ]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode_image_readouts(self, image, normalize):
            assert not self.training
            vectors = torch.nn.functional.normalize(image.flatten(1)[:, :18], dim=-1)
            return {"prompt": vectors, "report": vectors}

        def encode_text(self, tokens, normalize):
            return torch.nn.functional.normalize(tokens.float(), dim=-1)

    def tokenizer(texts):
        rows = []
        for text in texts:
            hit = [float(f.lower() in text.lower()) for f in FINDINGS]
            absent = any(word in text.lower() for word in (" not ", "no ", "absent"))
            rows.append([-h if absent else h for h in hit])
        return torch.tensor(rows)

    cohort = SimpleNamespace(
        split=lambda name: records,
        read=lambda volume: (
            np.int16(1000)
            * (2 * labels[int(volume[1:])].astype(np.int16) - 1)[None, None].reshape(1, 3, 6)
        ),
        volume_config=SimpleNamespace(windows_hu=((-1000.0, 1000.0),)),
    )
    model = Model().train()
    values = zero_shot.evaluator(cohort, "valid")(model, tokenizer)
    assert values["zero_shot/Emphysema"] == 1.0
    assert "zero_shot/Coronary artery wall calcification" not in values
    assert values["zero_shot/macro"] == pytest.approx(
        np.mean([values[f"zero_shot/{f}"] for f in FINDINGS if f"zero_shot/{f}" in values])
    )
    assert model.training

    has_report = told.any(axis=1)
    reported = told[has_report].astype(float)
    texts = reported / np.sqrt(reported.sum(axis=1, keepdims=True))
    cosines = (2.0 * labels[has_report] - 1) @ texts.T
    own = np.array([sum(row > row[i] + 1e-9) for i, row in enumerate(cosines)])
    assert values["retrieval/pool"] == has_report.sum()
    assert 0 < np.mean(own < 1) < np.mean(own <= 1) < 1
    for k in (1, 5, 10):
        assert values[f"retrieval/report_recall_{k}"] == pytest.approx(np.mean(own < k))

    def damaged(volume):
        if volume == "v0":
            raise CorruptVolumeError("v0.b2nd", "damaged-cache", "its checksum differs")
        return read(volume)

    read, cohort.read = cohort.read, damaged
    rest = SimpleNamespace(
        split=lambda name: records[1:], read=read, volume_config=cohort.volume_config
    )
    assert zero_shot.evaluator(cohort, "valid")(model, tokenizer) == zero_shot.evaluator(
        rest, "valid"
    )(model, tokenizer)


def measured(folder: Path) -> dict[str, float]:
    """What a small model with random weights scores on a cohort's development split."""
    import torch
    from training_runs import TINY

    from ctclip import config
    from ctclip.data.cohort import PreparedCohort
    from ctclip.models.ctclip import ModelConfig, build_model
    from ctclip.models.text import build_tokenizer

    torch.manual_seed(0)
    settings = config.from_dict(ModelConfig, TINY["model"])
    evaluate = zero_shot.evaluator(PreparedCohort.open(folder), "valid")
    return evaluate(build_model(settings), build_tokenizer(settings.text))


@pytest.mark.parametrize("processes", [2, 5])  # 4 volumes: one of five has none
def test_processes_share_the_volumes_of_an_evaluation_and_the_first_has_the_answer(
    tmp_path, processes
):
    folder = toy_cohort.build(tmp_path, num_studies=16)
    alone, shared = on_ranks(1, measured, folder), on_ranks(processes, measured, folder)

    assert "zero_shot/macro" in alone[0]
    assert shared[0] == pytest.approx(alone[0], abs=1e-6)
    assert shared[1:] == [{}] * (processes - 1)
