import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from score_tables import cohort

from ctclip.evaluation import model_report, protocols
from ctclip.evaluation.model_report import ReportConfig
from ctclip.findings import FINDINGS


def probabilities(model: str, separation: float):
    table = cohort(240, FINDINGS, separation, seed=1, model=model, checkpoint="ab" * 32)
    table.labels[:, 3] = 0.0
    split = np.where(np.arange(240) < 80, "valid", "test")
    sex = np.array(["F", "M"])[np.arange(240) // 2 % 2]
    return replace(table, scores=expit(table.scores), split=split, meta={"sex": sex})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    probabilities("ours", 1.5).save(folder / "ours.parquet")
    probabilities("theirs", 1.0).save(folder / "theirs.csv")
    models = model_report.run(
        [folder / "ours.parquet", folder / "theirs.csv"],
        folder / "out",
        ReportConfig(protocol="ct-rate-18", replicates=250),
    )
    return models, folder / "out"


def test_test_cases_are_reported_and_thresholds_come_from_the_others(results):
    models, folder = results
    assert {m.evaluation.cases for m in models} == {160}
    assert {len(m.development) for m in models} == {80}
    table = pd.read_csv(folder / "thresholds.csv")
    assert set(table["thresholds from"]) == {"development (youden)"}


def test_every_number_carries_its_protocol(results):
    models, folder = results
    table = pd.read_csv(folder / "auc.csv")
    assert set(table["protocol"]) == {models[0].protocol}
    assert models[0].protocol.startswith("ct-rate-18@")
    assert json.loads((folder / "results.json").read_text())[0]["header"]["unit"] == "study"


def test_the_card_names_the_command_and_the_file_behind_each_number(results):
    models, folder = results
    card = (folder / "card.md").read_text()
    assert "python eval/report.py" in card
    assert "--protocol ct-rate-18 --replicates 250" in card
    assert models[0].sha256[:12] in card
    assert f"{models[0].evaluation.macro['auroc']:.3f}" in card
    assert "| Pericardial effusion | 0 / 160 | no positives: not measured |" in card
    assert "theirs minus ours" in card


def test_the_page_shows_each_part(results):
    text = (results[1] / "report.html").read_text()
    for part in ("Paired comparison", "Calibration", "At a threshold", "Subgroups", "ECE, Platt"):
        assert part in text
    assert "not in the macro: Pericardial effusion" in text
    assert "http" not in text


def test_every_table_of_several_models_names_its_own(results):
    """Per finding, calibration, thresholds and subgroups come once per model."""
    text = (results[1] / "report.html").read_text()
    for title in ("Per finding", "Calibration", "At a threshold", "Subgroups"):
        part = text.split(f">{title}</h2>")[1].split("<h2")[0]
        for model in ("ours", "theirs"):
            assert part.count(f"<table><caption>{model}</caption>") == 1, title
    assert "takes its threshold from these very cases" in text


@pytest.fixture
def small(tmp_path):
    """Two findings, and two protocols over them: quick to draw."""
    for name, unit in (("one", "volume"), ("ct-clip", "study")):
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\nunit: {unit}\nfindings: [Emphysema, Lung nodule]\n"
        )
    table = cohort(80, model="ours")
    table.save(tmp_path / "a.parquet")
    other = replace(table, header={"model": "theirs"})
    protocols.load(tmp_path / "ct-clip.yaml").apply(other).save(tmp_path / "b.parquet")
    return tmp_path


def test_protocols_are_never_mixed(small):
    config = ReportConfig(protocol=str(small / "one.yaml"), replicates=0)
    model_report.run([small / "a.parquet", small / "b.parquet"], small / "out", config)
    assert "Paired comparison" not in (small / "out" / "report.html").read_text()
    card = (small / "out" / "card.md").read_text()
    assert "## AUROC under one@" in card
    assert "## AUROC under ct-clip@" in card


def test_protocols_of_one_name_stay_apart_in_tables_and_figures(tmp_path):
    table = halves(meta={"sex": np.array(["F", "M"])[np.arange(80) // 2 % 2]})
    labels = []
    for unit in ("volume", "study"):
        path = tmp_path / "mine.yaml"
        path.write_text(f"name: mine\nunit: {unit}\nfindings: [Emphysema, Lung nodule]\n")
        under = protocols.load(path).apply(replace(table, scores=expit(table.scores)))
        replace(under, header=under.header | {"model": unit}).save(tmp_path / f"{unit}.parquet")
        labels.append(protocols.load(path).label)
    paths = [tmp_path / "volume.parquet", tmp_path / "study.parquet"]
    model_report.run(paths, tmp_path / "out", ReportConfig(replicates=50))
    for name in ("auc", "calibration", "thresholds", "subgroups"):
        found = pd.read_csv(tmp_path / "out" / f"{name}.csv")
        assert found.groupby("model")["protocol"].unique().str[0].to_dict() == {
            "volume": labels[0],
            "study": labels[1],
        }, name
    for name in ("auc", "roc", "reliability"):
        assert len(list((tmp_path / "out").glob(f"{name}-mine-*.png"))) == 2


def test_ct_clips_thresholds_are_called_optimistic(small):
    model_report.run([small / "b.parquet"], small / "out", ReportConfig(replicates=0))
    text = (small / "out" / "report.html").read_text()
    assert "OPTIMISTIC" in text
    assert "scores are no probabilities" in text


def test_suspected_findings_are_read_from_the_reports(small):
    """Every fifth report only suspects a nodule, and the score can't tell those cases."""
    rows = ["patient_id,study_id,volume_id,path,report"]
    for i in range(80):
        text = "A possible lung nodule is seen." if i % 5 == 0 else "The heart is normal."
        rows.append(f"p{i // 2},s{i},v{i},v{i}.nii.gz,{text}")
    (small / "manifest.csv").write_text("\n".join(rows) + "\n")
    config = ReportConfig(protocol=str(small / "one.yaml"), replicates=0)
    model_report.run([small / "a.parquet"], small / "out", config, reports=small / "manifest.csv")
    found = pd.read_csv(small / "out" / "uncertain.csv").set_index("finding")
    assert found.index.tolist() == ["Lung nodule"]
    assert found.loc["Lung nodule", ["certain", "uncertain"]].tolist() == [64, 16]
    page = (small / "out" / "report.html").read_text()
    assert "ROC under the three readings" in page
    assert f"--reports {small / 'manifest.csv'}" in page


def test_each_model_is_shown_against_its_own_findings_whatever_their_order(tmp_path):
    """Emphysema is ranked perfectly, the nodule at random; the second file lists it first."""
    table = cohort(80, separation=0.0, model="a")
    table.scores[:, 0] += 9 * table.labels[:, 0]
    table.save(tmp_path / "a.parquet")
    turned = replace(table, header={"model": "b"}).of_findings(table.findings[::-1])
    turned.save(tmp_path / "b.parquet")
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    model_report.run(paths, tmp_path / "out", ReportConfig(replicates=0))
    card = (tmp_path / "out" / "card.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| Emphysema"))
    assert row.count("1.000") == 2


def test_models_of_different_findings_are_refused_by_name(tmp_path):
    table = cohort(80, model="a")
    table.save(tmp_path / "a.parquet")
    fewer = replace(table, header={"model": "b"}).of_findings(["Lung nodule"])
    fewer.save(tmp_path / "b.parquet")
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for order in (paths, paths[::-1]):
        with pytest.raises(ValueError, match="b lacks 'Emphysema'; apply one protocol to both"):
            model_report.run(order, tmp_path / "out", ReportConfig(replicates=0))


def test_models_of_one_name_are_told_apart_by_what_differs(tmp_path):
    """Zero-shot runs of one checkpoint all say 'model' and are all called scores.parquet."""
    for folder, prompts in (
        ("first", "default@1"),
        ("second", "ct-clip@2"),
        ("third", "default@1"),
    ):
        table = cohort(80, model="model", checkpoint="ab" * 32, prompts=prompts)
        table.save(tmp_path / folder / "scores.parquet")
    paths = [tmp_path / folder / "scores.parquet" for folder in ("first", "second", "third")]

    def names(*wanted, **options):
        config = ReportConfig(replicates=0)
        found = model_report.run(wanted, tmp_path / "out", config, **options)
        return [model.evaluation.model for model in found]

    assert names(*paths[:2]) == ["model (default@1)", "model (ct-clip@2)"]
    assert names(*paths) == [
        "model (default@1, first)",
        "model (ct-clip@2, second)",
        "model (default@1, third)",
    ]
    assert names(*paths[:2], names=["ours", "theirs"]) == ["ours", "theirs"]
    card = (tmp_path / "out" / "card.md").read_text()
    assert "--names ours theirs" in card
    assert "theirs minus ours" in card
    with pytest.raises(ValueError, match="1 names for 2 score tables"):
        names(*paths[:2], names=["ours"])
    with pytest.raises(ValueError, match="are both called 'model'; give each a name: --names"):
        names(paths[0], paths[0])


def halves(**changes):
    """Half of the patients for development, half for the test."""
    table = cohort(80, model="ours")
    split = np.where(np.arange(80) < 40, "valid", "test")
    return replace(table, **{"split": split, **changes})


def both(folder):
    """What page and card say."""
    return [(folder / name).read_text() for name in ("report.html", "card.md")]


def test_a_protocols_own_thresholds_are_used_whatever_its_name(tmp_path, caplog):
    protocol = tmp_path / "mine.yaml"
    protocol.write_text("name: mine\nthresholds: optimistic\nfindings: [Emphysema, Lung nodule]\n")
    halves().save(tmp_path / "a.parquet")
    config = ReportConfig(protocol=str(protocol), replicates=0)
    model_report.run([tmp_path / "a.parquet"], tmp_path / "out", config)
    table = pd.read_csv(tmp_path / "out" / "thresholds.csv")
    assert table["thresholds from"].str.startswith("OPTIMISTIC").all()
    for text in (*both(tmp_path / "out"), caplog.text):
        assert "thresholds are OPTIMISTIC" in text


def test_a_table_under_another_protocol_keeps_it_and_page_and_card_say_so(small, caplog):
    config = ReportConfig(protocol=str(small / "one.yaml"), replicates=0)
    model_report.run([small / "b.parquet"], small / "out", config)
    for text in (*both(small / "out"), caplog.text):
        assert "already under ct-clip@" in text
        assert "was not applied" in text


def test_training_cases_are_not_shown_as_if_they_were_new(tmp_path, caplog):
    halves(split=np.full(80, "train")).save(tmp_path / "a.parquet")
    model_report.run([tmp_path / "a.parquet"], tmp_path / "out", ReportConfig(replicates=0))
    page, card = both(tmp_path / "out")
    for text in (page, card, caplog.text):
        assert "training cases are among those evaluated" in text
    assert "| as-given | train |" in card


def test_thresholds_of_the_evaluated_cases_are_never_called_development(tmp_path):
    halves().save(tmp_path / "a.parquet")
    for config in (
        ReportConfig(split="test", development="test"),
        ReportConfig(development="test"),
        ReportConfig(split="valid", development="valid"),
    ):
        with pytest.raises(ValueError, match="is evaluated, so it can't be the development split"):
            model_report.run([tmp_path / "a.parquet"], tmp_path / "out", config)


def test_patients_in_development_and_test_are_counted(tmp_path):
    halves(patient_id=np.array([f"p{i % 41}" for i in range(80)])).save(tmp_path / "a.parquet")
    model_report.run([tmp_path / "a.parquet"], tmp_path / "out", ReportConfig(replicates=0))
    for text in both(tmp_path / "out"):
        assert "39 of 40 patients are in the development split too" in text


def test_a_negative_number_of_replicates_is_refused():
    with pytest.raises(ValueError, match="replicates must be >= 0, got -5"):
        ReportConfig(replicates=-5)


def test_the_card_counts_each_models_own_cases_and_those_of_a_difference(tmp_path):
    table = cohort(200, model="all")
    table.save(tmp_path / "a.parquet")
    replace(table, header={"model": "half"}).rows(np.arange(100)).save(tmp_path / "b.parquet")
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    models = model_report.run(paths, tmp_path / "out", ReportConfig(replicates=50))
    card = (tmp_path / "out" / "card.md").read_text()
    assert "| finding | positive / known | all | positive / known | half |" in card
    row = next(line for line in card.splitlines() if line.startswith("| Emphysema"))
    for model in models:
        result = model.evaluation.findings[0]
        assert f"| {result.positives} / {result.positives + result.negatives} |" in row
    assert "all: 200 cases of 100 patients; half: 100 cases of 50 patients." in card
    half = f"{models[1].evaluation.macro['auroc']:.3f}"
    assert (
        f"on the 100 cases of 50 patients that both have: macro AUROC {half} minus {half}" in card
    )


def test_labels_without_scores_and_subgroups_left_out_are_on_the_page(tmp_path):
    scores = cohort(80).scores
    scores[:60, 0] = np.nan
    thick = {"slice_thickness_mm": np.full(80, "5.0")}
    replace(cohort(80), scores=scores, meta=thick).save(tmp_path / "a.parquet")
    model_report.run([tmp_path / "a.parquet"], tmp_path / "out", ReportConfig(replicates=0))
    page, card = both(tmp_path / "out")
    assert "slice_thickness_mm left out: all known cases are in one group" in page
    assert "60 of 160 labels have no score beside them" in page
    assert "60 of 160 labels have no score beside them" in card
