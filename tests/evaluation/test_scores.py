from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ctclip.evaluation import importers
from ctclip.evaluation.scores import COLUMNS, ScoreTable, ScoreTableError, from_long


def table() -> ScoreTable:
    return ScoreTable(
        volume_id=np.array(["v1", "v2", "v3"]),
        study_id=np.array(["s1", "s1", "s2"]),
        patient_id=np.array(["001", "001", "002"]),
        split=np.array(["test", "test", "valid"]),
        findings=("Emphysema", "Lung nodule"),
        labels=np.array([[1.0, np.nan], [0.0, 1.0], [0.0, 0.0]]),
        scores=np.array([[0.1, 0.2], [np.nan, 1 / 3], [0.5, 0.6]]),
        header={"model": "m", "prompts": "default@abc"},
        meta={"sex": np.array(["F", "F", ""])},
    )


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_table_reloads_unchanged(tmp_path, suffix):
    path = tmp_path / f"scores.{suffix}"
    table().save(path)

    again = ScoreTable.load(path)

    assert again.header == table().header
    assert again.findings == table().findings
    assert again.patient_id.tolist() == ["001", "001", "002"]
    assert again.meta["sex"].tolist() == ["F", "F", ""]
    np.testing.assert_array_equal(again.labels, table().labels)
    np.testing.assert_array_equal(again.scores, table().scores)


def test_the_file_is_readable_without_this_package(tmp_path):
    table().save(tmp_path / "scores.parquet")
    frame = pd.read_parquet(tmp_path / "scores.parquet")
    assert list(frame.columns) == [*COLUMNS, "meta_sex"]
    assert len(frame) == 6
    assert frame.loc[0, "label"] == 1.0


def test_a_long_csv_of_another_origin_needs_no_header(tmp_path):
    frame = table().to_long().drop(columns="meta_sex")
    frame.sample(frac=1, random_state=0).to_csv(tmp_path / "theirs.csv", index=False)
    again = ScoreTable.load(tmp_path / "theirs.csv")
    assert again.name == "theirs"
    assert sorted(again.volume_id.tolist()) == ["v1", "v2", "v3"]


def test_wrong_tables_are_refused_with_the_reason():
    frame = table().to_long()
    with pytest.raises(ScoreTableError, match="'score' is missing"):
        from_long(frame.drop(columns="score"), {})
    with pytest.raises(ScoreTableError, match="two rows for 'Emphysema'"):
        from_long(pd.concat([frame, frame.head(1)]), {})
    with pytest.raises(
        ScoreTableError, match="'v1', Emphysema: label is 2, expected 1, 0 or empty"
    ):
        from_long(frame.assign(label=2.0), {})
    with pytest.raises(ScoreTableError, match="expected a number or empty"):
        from_long(frame.assign(score="high"), {})
    torn = frame.copy()
    torn.loc[0, "patient_id"] = "someone else"
    with pytest.raises(
        ScoreTableError, match="'v1' has two values of patient_id: 'someone else' and '001'"
    ):
        from_long(torn, {})
    with pytest.raises(ScoreTableError, match="more than once"):
        replace(table(), volume_id=np.array(["v1", "v1", "v2"]))


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize(("nothing", "rows"), [("", 6), (" ", 6), ("", 2)])
def test_volumes_of_nobody_are_not_taken_for_one_patient(tmp_path, suffix, nothing, rows):
    frame = table().to_long()
    frame.loc[: rows - 1, "patient_id"] = nothing
    path = tmp_path / f"scores.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    with pytest.raises(ScoreTableError, match=rf"scores.*patient_id is empty in {rows} of 6 rows"):
        ScoreTable.load(path)
    with pytest.raises(ScoreTableError, match="patient_id is empty in 6 of 6"):
        from_long(frame.assign(patient_id=None), {})
    with pytest.raises(ScoreTableError, match="volume_id is empty in 6 of 6"):
        from_long(frame.assign(volume_id=np.nan), {})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty; expected a line of column names"),
        (b"# ctclip-scores {not json\nvolume_id,label\n", "the header is no JSON object"),
        (b"# ctclip-scores [1]\nvolume_id,label\n", "the header is no JSON object"),
        ("volume_id,score\n".encode("utf-16"), "is not text in UTF-8"),
        (b'volume_id,score\n"a,1\n', "is no readable CSV"),
        (
            b"volume_id,finding,label\n",
            "column 'study_id', 'patient_id', 'split', 'score' is missing",
        ),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_its_name(tmp_path, content, complaint):
    path = tmp_path / "scores.csv"
    path.write_bytes(content)
    for load in (ScoreTable.load, importers.load):
        with pytest.raises(ScoreTableError, match=rf"scores\.csv.*{complaint}"):
            load(path)


def test_a_wrong_cell_is_named_with_its_file(tmp_path):
    frame = table().to_long()
    frame.loc[3, "score"] = np.inf
    frame.to_csv(tmp_path / "scores.csv", index=False)
    with pytest.raises(
        ScoreTableError, match=r"scores\.csv: volume 'v2', Lung nodule: score is inf"
    ):
        ScoreTable.load(tmp_path / "scores.csv")


def test_rows_and_findings_can_be_chosen():
    chosen = table().of_split("test").of_findings(["Lung nodule"])
    assert chosen.scores.shape == (2, 1)
    assert chosen.meta["sex"].tolist() == ["F", "F"]
    with pytest.raises(ScoreTableError, match="no row of split 'train'"):
        table().of_split("train")
    with pytest.raises(ScoreTableError, match=r"no scores for \['Pneumonia'\]"):
        table().of_findings(["Pneumonia"])
