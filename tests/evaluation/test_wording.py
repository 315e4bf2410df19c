"""Prompts, hedges and hospital styles: how much hangs on the words."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctclip.data.mentions import labels_from_text
from ctclip.evaluation import metrics, planted, sensitivity, styles, uncertain
from ctclip.evaluation.prompts import PromptSet
from ctclip.findings import FINDINGS


class DirectionModel(torch.nn.Module):
    """Encodes "+Name" and "-Name" as the finding's direction; "~Name" says the opposite."""

    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.directions = torch.from_numpy(planted.directions(width)).float()

    def encode_text(self, tokens, normalize=False):
        signs = torch.where(tokens[:, 0] == 0, 1.0, -1.0)
        return signs[:, None] * self.directions[tokens[:, 1]]


def tokenizer(texts):
    codes = [[int(text[0] in "-~"), FINDINGS.index(text[1:])] for text in texts]
    return torch.tensor(codes)


def test_a_pair_that_points_backwards_is_found_among_good_ones():
    table = planted.table(400)
    pairs = {f: ((f"+{f}", f"-{f}"), (f"+{f}", f"-{f}")) for f in FINDINGS}
    pairs["Emphysema"] = (("+Emphysema", "-Emphysema"), ("~Emphysema", "+Emphysema"))
    pairs["Atelectasis"] = (("~Atelectasis", "+Atelectasis"),)
    found = sensitivity.measure(table, DirectionModel(64), tokenizer, PromptSet("x", pairs))
    by_name = {item.finding: item for item in found}
    assert by_name["Emphysema"].lowest < 0.1
    assert by_name["Emphysema"].lowest_pair == "~Emphysema"
    assert by_name["Lung nodule"].lowest == by_name["Lung nodule"].highest > 0.95
    assert by_name["Atelectasis"].is_backwards
    text = " ".join(sensitivity.warnings(found))
    assert "wrong way: " in text
    assert "with the wording: Emphysema" in text


def test_hedged_cases_are_read_three_ways_and_placed_between_the_certain_ones():
    rng = np.random.default_rng(0)
    labels = np.repeat([0.0, 1.0, 1.0], 200)
    hedged = np.arange(600) >= 400
    scores = rng.normal(size=600) + np.repeat([0.0, 4.0, 2.0], 200)
    found = uncertain.readings("Consolidation", labels, hedged, scores)
    assert (found.certain, found.uncertain) == (400, 200)
    assert found.left_out > found.as_present > found.as_absent
    assert found.rank == pytest.approx(0.5, abs=0.1)
    assert found.left_out == metrics.auroc(labels[:400], scores[:400])


def test_hedges_are_read_from_reports():
    texts = ["Possible consolidation.", "Consolidation is seen.", "No consolidation.", "Normal."]
    hedged = uncertain.hedged_findings(texts, ("Consolidation", "Emphysema"))
    assert hedged.tolist() == [[True, False], [False, False], [False, False], [False, False]]


def test_a_style_that_says_less_finds_less():
    rng = np.random.default_rng(0)
    table = planted.table(200, separation=3.0)
    volumes = table.vectors
    noise = rng.normal(size=(2, *volumes.shape))
    clear = volumes + 0.03 * noise[0]
    vague = volumes + 0.5 * noise[1]
    found = styles.measure(volumes, {"exhaustive": clear, "terse": vague}, table.labels,
                           replicates=200)  # fmt: skip
    found = found.set_index("style")
    assert found.loc["exhaustive", "recall@1"] > 0.9
    assert found.loc["terse", "recall@10"] < found.loc["exhaustive", "recall@10"]
    assert found.loc["terse", "lost_low"] > 0
    assert found.loc["exhaustive", "lost@10"] == 0
    assert found.loc["exhaustive", "macro_auroc"] > 0.8


def test_a_phantoms_report_is_rewritten_in_every_style(tmp_path):
    (tmp_path / "truth.csv").write_text(
        "volume_id,finding,kind,side,lobe,size_mm,severity,d_first\n"
        "a_1,Pleural effusion,free,left,left lower lobe,22,0.6,30\n"
    )
    records = [SimpleNamespace(volume_id=name) for name in ("a_1", "b_1")]
    texts = styles.rewritten(records, tmp_path / "truth.csv")
    assert len({lines[0] for lines in texts.values()}) == len(texts) == 3
    for lines in texts.values():
        assert labels_from_text(lines[0])["Pleural effusion"] == 1.0
        assert labels_from_text(lines[1]).get("Pleural effusion", 0.0) == 0.0


def test_styles_need_reports_or_a_truth(tmp_path):
    with pytest.raises(ValueError, match="either --reports"):
        styles.run("model.safetensors", "cohort", tmp_path)


def test_few_shot_scores_enter_the_report_like_any_model(tmp_path, capsys):
    from ctclip.evaluation import few_shot
    from ctclip.evaluation.few_shot import FewShotConfig

    train, test = planted.table(200), planted.table(120, split="test", seed=3)
    unknown = train.labels.copy()
    unknown[:, 2:] = np.nan
    train = replace(train, labels=unknown)
    train.save(tmp_path / "train.parquet")
    test.save(tmp_path / "test.parquet")
    paths = (tmp_path / "train.parquet", tmp_path / "test.parquet", tmp_path / "out")
    found = few_shot.run(*paths, FewShotConfig(repeats=3))
    assert "AUROC against cases of each class" in capsys.readouterr().out
    assert set(found["finding"]) == set(FINDINGS[:2])
    from ctclip.evaluation.scores import ScoreTable

    scores = ScoreTable.load(tmp_path / "out" / "scores.parquet")
    assert scores.header["label_informed"] is True
    assert np.isnan(scores.scores[:, 2]).all()
    assert metrics.auroc(scores.labels[:, 0], scores.scores[:, 0]) > 0.9
    with pytest.raises(ValueError, match="is in"):
        few_shot.run(paths[0], paths[0], paths[2])
