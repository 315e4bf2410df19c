from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ctclip.data.manifest import read_manifest
from ctclip.evaluation import label_audit, planted, review
from ctclip.evaluation.label_audit import AuditConfig
from ctclip.findings import FINDINGS

EMPHYSEMA = FINDINGS.index("Emphysema")


@pytest.fixture(scope="module")
def case():
    """Emphysema is visible and a tenth of its labels are flipped; the rest is unknown."""
    truth = planted.table(800)
    labels = np.full_like(truth.labels, np.nan)
    labels[:, EMPHYSEMA] = truth.labels[:, EMPHYSEMA]
    bad = planted.corrupt(labels[:, EMPHYSEMA], 0.1, "flip")
    labels[bad, EMPHYSEMA] = 1 - labels[bad, EMPHYSEMA]
    labels[5, EMPHYSEMA] = np.nan
    texts = {
        volume: "Emphysema is seen." if label == 1 else "No emphysema."
        for volume, label in zip(truth.volume_id, truth.labels[:, EMPHYSEMA], strict=True)
    }
    texts[truth.volume_id[7]] = "The heart is normal."
    table = replace(truth, labels=labels)
    found = label_audit.audit(table, texts, AuditConfig(replicates=30))
    return truth, table, bad, found


def test_planted_errors_lead_the_list(case):
    truth, _, bad, found = case
    top = found.suspects.head(len(bad))
    planted = {truth.volume_id[row] for row in bad}
    assert top["volume_id"].isin(planted).mean() >= 0.7
    assert set(found.suspects["finding"]) == {"Emphysema"}


def test_the_rate_is_estimated_and_findings_without_labels_say_so(case):
    rates = case[3].rates().set_index("finding")
    assert rates.loc["Emphysema", "wrong"] == pytest.approx(0.1, abs=0.05)
    assert "not audited" in rates.loc["Lung nodule", "note"]
    assert np.isnan(rates.loc["Lung nodule", "wrong"])


def test_unknown_labels_are_not_listed(case):
    assert case[0].volume_id[5] not in set(case[3].suspects["volume_id"])


def test_the_report_is_quoted_as_evidence(case):
    rows = case[3].suspects
    missed = rows[(rows["label"] == 0) & (rows["report"] == "affirmed")]
    assert (missed["sentence"] == "Emphysema is seen.").all()
    assert missed["reason"].str.contains("labelling error").any()


def test_a_report_that_differs_from_a_right_label_is_no_labelling_error():
    """Labels are right and reports deny a fifth of the cases: the image sides with the labels."""
    truth = planted.table(800)
    labels = np.full_like(truth.labels, np.nan)
    labels[:, EMPHYSEMA] = truth.labels[:, EMPHYSEMA]
    present = labels[:, EMPHYSEMA] == 1
    missed = present & (np.random.default_rng(0).random(len(labels)) < 0.2)
    texts = {
        volume: "Emphysema is seen." if there and not wrong else "No emphysema."
        for volume, there, wrong in zip(truth.volume_id, present, missed, strict=True)
    }
    rows = label_audit.audit(
        replace(truth, labels=labels), texts, AuditConfig(replicates=20)
    ).suspects
    unlikely = rows[rows["p_wrong"] < 0.5]
    assert len(unlikely) > 0.8 * missed.sum()
    assert unlikely["reason"].str.contains("report and label differ").all()
    assert (rows.loc[rows["reason"].str.contains("labelling error"), "p_wrong"] > 0.5).all()


def test_cleanlab_agrees_on_most_suspects(case):
    pytest.importorskip("cleanlab")
    top = case[3].suspects.head(len(case[2]))
    assert top["cleanlab"].mean() > 0.7


def test_cleaning_brings_labels_nearer_to_the_truth(case):
    truth, table, bad, found = case
    cleaned = label_audit.cleaned(table.labels, found)
    known = ~np.isnan(table.labels[:, EMPHYSEMA])
    wrong = (cleaned[:, EMPHYSEMA] != truth.labels[:, EMPHYSEMA])[known].sum()
    assert wrong < 0.4 * len(bad)
    assert np.isnan(cleaned[5, EMPHYSEMA])


def test_a_review_is_written_filled_and_applied(case, tmp_path, capsys):
    truth, table, _, found = case
    review.write(found, tmp_path, review.ReviewConfig())
    printed = capsys.readouterr().out
    assert "Emphysema" in printed
    assert "missed" in printed
    assert "labelling error" in (tmp_path / "review.html").read_text()
    rows = pd.DataFrame(
        {
            "patient_id": truth.patient_id,
            "study_id": truth.study_id,
            "path": [f"volumes/{name}.nii.gz" for name in truth.volume_id],
            "report": 'He said, "no".',
            "Emphysema": ["" if np.isnan(v) else str(int(v)) for v in table.labels[:, EMPHYSEMA]],
        }
    )
    rows.to_csv(tmp_path / "manifest.csv", index=False)
    filled = pd.read_csv(tmp_path / "review.csv", dtype=str, keep_default_na=False)
    filled.loc[0, "decision"], filled.loc[1, "decision"] = "flip", "unknown"
    filled.loc[2, "decision"] = "keep"
    filled.to_csv(tmp_path / "review.csv", index=False)

    arguments = (tmp_path / "review.csv", tmp_path / "manifest.csv", tmp_path / "corrected.csv")
    changes = review.apply(*arguments, reviewer="A. Reader")

    assert changes["new"].tolist() == [str(1 - int(filled["label"][0])), ""]
    after = pd.read_csv(tmp_path / "corrected.csv", dtype=str, keep_default_na=False)
    before = pd.read_csv(tmp_path / "manifest.csv", dtype=str, keep_default_na=False)
    assert (after != before).sum().sum() == 2
    assert "A. Reader" in (tmp_path / "corrected.provenance.json").read_text()
    with pytest.raises(ValueError, match="audit the present labels again"):
        review.apply(tmp_path / "review.csv", tmp_path / "corrected.csv", tmp_path / "x.csv", "B")


def test_a_corrected_manifest_finds_its_scans_where_it_is_written(case, tmp_path):
    volume = case[3].suspects["volume_id"][0]
    scan = tmp_path / "data" / "volumes" / f"{volume}.nii.gz"
    scan.parent.mkdir(parents=True)
    scan.touch()
    review.write(case[3], tmp_path, review.ReviewConfig())
    row = {"patient_id": "p", "study_id": "s", "path": f"volumes/{volume}.nii.gz"}
    manifest = tmp_path / "data" / "manifest.csv"
    pd.DataFrame([row]).to_csv(manifest, index=False)

    above = tmp_path / "above.csv"
    review.apply(tmp_path / "review.csv", manifest, above, "A. Reader")
    assert read_manifest(above)[0][0].path == scan
    with pytest.raises(ValueError, match="write the corrected one into"):
        review.apply(tmp_path / "review.csv", manifest, tmp_path / "b" / "c.csv", "A. Reader")


def test_a_misspelt_decision_is_named(case, tmp_path):
    review.write(case[3], tmp_path, review.ReviewConfig())
    path = tmp_path / "review.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.loc[3, "decision"] = "filp"
    frame.to_csv(path, index=False)
    with pytest.raises(ValueError, match="line 5: decision is 'filp'"):
        review.apply(path, tmp_path / "manifest.csv", tmp_path / "out.csv", "A. Reader")


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        AuditConfig(suspicion=1.0)


def test_slices_go_through_the_marked_place():
    hu = np.full((10, 20, 30), -1000, dtype=np.int16)
    hu[7, 5, 22] = 400
    picture = review.three_planes(hu, (2.0, 1.0, 1.0), (7, 5, 22))
    middle = review.three_planes(hu, (2.0, 1.0, 1.0))
    assert picture.shape == middle.shape
    assert middle.max() == 0  # the spot lies in none of the middle slices
    axial = picture[:, : round(30 * 160 / 20)]
    spot = np.array([5.5 * 160 / 20, 22.5 * axial.shape[1] / 30])
    bright = np.argwhere(axial > 100)
    assert np.abs(bright.mean(axis=0) - spot).max() < 1.5
