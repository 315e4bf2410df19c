from dataclasses import replace

import numpy as np
import pytest

from ctclip.evaluation import importers, prompts, protocols
from ctclip.evaluation.scores import ScoreTable, ScoreTableError
from ctclip.findings import FINDINGS


def table() -> ScoreTable:
    rng = np.random.default_rng(0)
    labels = (rng.random((6, 18)) < 0.5).astype(float)
    names = ["valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_1", "valid_2_a_2", "x"]
    ids = [importers.ct_rate_ids(name) for name in names]
    return ScoreTable(
        volume_id=np.array(names),
        study_id=np.array([i[0] for i in ids]),
        patient_id=np.array([i[1] for i in ids]),
        split=np.array([i[2] for i in ids]),
        findings=FINDINGS,
        labels=labels,
        scores=rng.random((6, 18)),
        header={"model": "toy"},
    )


@pytest.mark.parametrize(
    ("name", "findings"),
    [
        ("ct-clip", 18),
        ("ct-rate-18", 18),
        ("ct-rate-18-volumes", 18),
        ("ct-rate-16", 16),
        ("rad-chestct-17", 17),
        ("rad-chestct-16", 16),
        ("rad-chestct-15", 15),
    ],
)
def test_shipped_protocols_have_as_many_findings_as_their_name_says(name, findings):
    found = protocols.load(name).apply(table())
    assert found.scores.shape[1] == findings
    assert found.header["protocol"] == protocols.load(name).label
    assert name in protocols.shipped()


def test_hashes_differ_with_the_content_and_not_with_the_description():
    hashes = {protocols.load(name).hash for name in protocols.shipped()}
    assert len(hashes) == len(protocols.shipped())
    one = protocols.load("ct-rate-18")
    assert replace(one, about="other words").hash == one.hash
    assert replace(one, unit="patient").hash != one.hash


@pytest.mark.parametrize(("unit", "units"), [("volume", 6), ("study", 4), ("patient", 3)])
def test_reconstructions_are_pooled_into_units(unit, units):
    raw = table()
    found = replace(protocols.load("ct-rate-18"), unit=unit).apply(raw)
    assert len(found) == units
    if unit == "study":
        row = found.volume_id.tolist().index("valid_1_a")
        np.testing.assert_allclose(found.scores[row], raw.scores[:2].mean(axis=0))
        np.testing.assert_allclose(found.labels[row], raw.labels[:2].max(axis=0))
        assert found.patient_id[row] == "valid_1"


def test_pooling_knows_max_and_first():
    raw = table()
    for pool, expected in [("max", raw.scores[:2].max(axis=0)), ("first", raw.scores[0])]:
        found = replace(protocols.load("ct-rate-18"), pool=pool).apply(raw)
        row = found.volume_id.tolist().index("valid_1_a")
        np.testing.assert_allclose(found.scores[row], expected)


def test_unknown_stays_unknown_unless_another_label_is_positive():
    labels = np.array([[1, np.nan, 0, np.nan], [np.nan, np.nan, 0, 0]])
    np.testing.assert_array_equal(protocols.any_positive(labels), [1, np.nan, 0, np.nan])


def test_a_table_is_under_one_protocol_only():
    under = protocols.load("ct-rate-18").apply(table())
    assert protocols.load("ct-rate-18").apply(under) is under
    with pytest.raises(protocols.ProtocolError, match="already under ct-rate-18@"):
        protocols.load("ct-rate-16").apply(under)
    with pytest.raises(protocols.ProtocolError, match="wants scores of 'Medical material'"):
        protocols.load("ct-rate-18").apply(table().of_findings(["Emphysema"]))


def test_mistakes_in_a_protocol_file_are_named(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("name: x\nfindings: all\nunit: scan\n")
    with pytest.raises(protocols.ProtocolError, match="unit is 'scan', expected one of volume"):
        protocols.load(path)
    path.write_text("name: x\n")
    with pytest.raises(protocols.ProtocolError, match="has name, findings"):
        protocols.load(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("5", "has name, findings .* got 5"),
        ("name: x\nfindings: 5", "findings is 5, expected 'all' or a list"),
        ("name: x\nfindings: []", "expected 'all' or a list"),
        ("name: x\nfindings: [5]", "a finding is a name, .* got 5"),
        ("name: x\nfindings: [{scores: [Emphysema]}]", "a finding is a name, or has name"),
        ("name: x\nfindings: [{name: A, scores: Emphysema}]", "both lists of names"),
        ("name: x\nfindings: [{name: A, score: [Emphysema]}]", "a finding is a name, or has name"),
        ("name: x\nfindings: [Emphysema, Emphysema]", "'Emphysema' comes twice"),
        ("name: x\nfindings: all\nthresholds: wrong", "expected one of development, optimistic"),
    ],
)
def test_a_malformed_protocol_is_refused_by_file_and_place(tmp_path, content, complaint):
    path = tmp_path / "p.yaml"
    path.write_text(content)
    with pytest.raises(protocols.ProtocolError, match=rf"p\.yaml: .*{complaint}"):
        protocols.load(path)


def test_ct_clip_files_are_imported_with_their_patients(tmp_path):
    raw = table()
    np.savez(tmp_path / "predicted_weights.npz", data=raw.scores.astype(np.float32))
    np.savez(tmp_path / "labels_weights.npz", data=raw.labels.astype(int))
    (tmp_path / "accessions.txt").write_text("\n".join(raw.volume_id) + "\n")
    found = importers.load(tmp_path / "predicted_weights.npz")
    assert found.patient_id.tolist() == ["valid_1"] * 3 + ["valid_2"] * 2 + ["x"]
    np.testing.assert_allclose(found.scores, raw.scores, atol=1e-6)
    (tmp_path / "accessions.txt").write_text("one\n")
    with pytest.raises(ScoreTableError, match="1 names for 6 rows"):
        importers.load(tmp_path)


def test_wide_tables_are_matched_by_volume_and_foreign_labels_by_protocol(tmp_path):
    (tmp_path / "scores.csv").write_text(
        "VolumeName,Emphysema,Lung nodule,Medical material\n"
        "a.nii.gz,0.9,0.1,0.3\nb.nii.gz,0.2,0.8,0.4\nc,0.5,0.5,0.5\n"
    )
    (tmp_path / "labels.csv").write_text(
        "id,patient_id,emphysema,nodule,nodulegr1cm\nb,P1,0,0,1\na,P1,1,0,\n"
    )
    protocol = protocols.load("rad-chestct-17")
    found = importers.load(tmp_path / "scores.csv", tmp_path / "labels.csv", protocol)
    assert found.volume_id.tolist() == ["a", "b"]
    assert found.patient_id.tolist() == ["P1", "P1"]
    np.testing.assert_array_equal(found.labels[0], [np.nan, 1, np.nan])
    np.testing.assert_array_equal(found.labels[1], [np.nan, 0, 1])
    with pytest.raises(ScoreTableError, match="give its labels too"):
        importers.load(tmp_path / "scores.csv")


@pytest.mark.parametrize("label", ["2", "-1", "0.5", "yes"])
def test_a_wide_label_that_is_neither_present_nor_absent_is_refused(tmp_path, label):
    """An uncertain -1 must not be counted as absent."""
    (tmp_path / "scores.csv").write_text("VolumeName,Emphysema\na,0.9\nb,0.2\n")
    (tmp_path / "labels.csv").write_text(f"VolumeName,Emphysema\na,1\nb,{label}\n")
    with pytest.raises(
        ScoreTableError, match=rf"labels\.csv: column 'Emphysema' .* 'b' is '{label}"
    ):
        importers.load(tmp_path / "scores.csv", tmp_path / "labels.csv")


@pytest.mark.parametrize("score", ["abc", "inf"])
def test_a_wide_score_that_is_no_number_is_named_with_its_place(tmp_path, score):
    (tmp_path / "scores.csv").write_text(f"VolumeName,Emphysema\na,0.9\nb,{score}\n")
    (tmp_path / "labels.csv").write_text("VolumeName,Emphysema\na,1\nb,0\n")
    with pytest.raises(ScoreTableError, match=rf"scores\.csv: .* of volume 'b' is '{score}'"):
        importers.load(tmp_path / "scores.csv", tmp_path / "labels.csv")


def test_a_wide_volume_without_a_patient_is_not_given_to_a_patient_called_nan(tmp_path):
    (tmp_path / "scores.csv").write_text("VolumeName,Emphysema\na,0.9\nb,0.2\nc,0.1\n")
    (tmp_path / "labels.csv").write_text("VolumeName,patient_id,Emphysema\na,P1,1\nb,,0\nc,,0\n")
    with pytest.raises(ScoreTableError, match=r"labels\.csv: patient_id is empty for 2 of 3 .*'b'"):
        importers.load(tmp_path / "scores.csv", tmp_path / "labels.csv")


def test_a_protocol_of_fixed_prompts_refuses_scores_of_others():
    """ct-clip@hash beside a number says that CT-CLIP's own prompt pair made it."""
    own = prompts.load("ct-clip").label
    ct_clip = protocols.load("ct-clip")
    for header in ({"model": "toy"}, {"model": "toy", "prompts": own}):
        assert ct_clip.apply(replace(table(), header=header)).header["protocol"] == ct_clip.label
    other = replace(table(), header={"model": "toy", "prompts": prompts.load("default").label})
    with pytest.raises(protocols.ProtocolError, match=r"with prompts default@.* is for ct-clip@"):
        ct_clip.apply(other)
    assert protocols.load("ct-rate-18").apply(other).header["prompts"].startswith("default@")


def test_what_a_wide_table_loses_on_the_way_is_said(tmp_path):
    (tmp_path / "scores.csv").write_text(
        "VolumeName,Emphysema,nodule,Pleural Effusion\na,0.9,1,1\nb,0.2,1,1\nc,0.5,1,1\n"
    )
    (tmp_path / "labels.csv").write_text("VolumeName,emphysema\nb,1\nc,0\nd,0\ne,0\n")
    found = importers.load(tmp_path / "scores.csv", tmp_path / "labels.csv")
    assert found.volume_id.tolist() == ["b", "c"]
    strangers, unlabelled, unscored, unknown = found.header["notes"]
    assert "'nodule' (did you mean 'Lung nodule'?)" in strangers
    assert "'Pleural Effusion' (did you mean 'Pleural effusion'?)" in strangers
    assert "1 of 3 volumes with scores have no labels" in unlabelled
    assert "2 of 4 volumes with labels have no scores" in unscored
    assert "no label column 'Emphysema' (did you mean 'emphysema'?)" in unknown
