import pytest

from ctclip.summary import learnt_findings, run


def test_learnt_is_what_the_last_development_evaluation_says():
    training = [
        {"step": 10, "loss": 2.0},
        {"step": 10, "zero_shot/macro": 0.7, "zero_shot/Emphysema": 0.9},
        {
            "step": 20,
            "zero_shot/macro": 0.7,
            "zero_shot/Emphysema": 0.69,
            "zero_shot/Cardiomegaly": 0.70,
        },
    ]

    assert learnt_findings(training, ["Cardiomegaly", "Emphysema", "Lung nodule"]) == [
        "Cardiomegaly"
    ]


def test_a_run_without_evaluations_claims_nothing():
    assert learnt_findings([{"step": 1, "loss": 1.0}], ["Emphysema"]) == []


def test_a_missing_step_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="eval/zero_shot.py"):
        run(tmp_path)
