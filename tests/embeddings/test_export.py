import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from embedding_stubs import StubCheckpoint, StubCohort, StubModel, VolumeConfig

from ctclip.embeddings import (
    EmbeddingError,
    EmbeddingTable,
    embed_reports,
    embed_texts,
    embed_volumes,
    export,
)


def expected_vectors(num_volumes):
    rows = []
    for row in range(num_volumes):
        hu = np.full(32, row * 10.0 - 500)
        hu[0] = -row
        rows.append([hu.mean() / 1000, 1.0, -row / 1000])
    rows = np.array(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_every_volume_is_embedded_in_order_whatever_the_batch_size():
    for batch_size in (1, 3, 16):
        table = embed_volumes(StubCheckpoint(), StubCohort(11), batch_size=batch_size)

        assert table.volume_id == [record.volume_id for record in StubCohort(11).records]
        np.testing.assert_allclose(table.vectors, expected_vectors(11), atol=1e-6)
        assert table.report_vectors is None
        assert table.provenance["checkpoint"] == "a" * 64


def test_both_readouts_are_kept_where_a_model_has_two():
    table = embed_volumes(StubCheckpoint(model=StubModel(two_readouts=True)), StubCohort(4))

    np.testing.assert_allclose(table.vectors_for_reports, expected_vectors(4)[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(table.vectors, expected_vectors(4), atol=1e-6)


def test_nothing_about_a_patient_travels_unless_it_is_listed(tmp_path):
    cohort = StubCohort(4)
    out = tmp_path / "v.parquet"

    plain = embed_volumes(StubCheckpoint(), cohort, out=out)
    asked = embed_volumes(StubCheckpoint(), cohort, fields=("date", "report"))

    assert set(plain.fields) == {"sex", "age", "manufacturer", "kernel"}
    for secret in (b"Doe^Jane", b"2024-01-01", b"finding 0"):
        assert secret not in out.read_bytes()
    assert asked.fields["date"] == ["2024-01-01"] * 4
    assert asked.fields["report"][0] == "finding 0 none"


def test_ages_above_89_are_one_class_unless_asked_for():
    table = embed_volumes(StubCheckpoint(), StubCohort(40), fields=("age", "exact_age"))

    assert table.fields["age"][29:33] == ["89", "90", "90", "90"]
    assert table.fields["exact_age"][29:33] == ["89", "90", "91", "92"]


@pytest.mark.parametrize(
    ("written", "carried"),
    [
        ("2024-01-31", "2024-01-31"),
        ("20240131", "2024-01-31"),
        ("2024-01-31T10:15:00", "2024-01-31"),
        ("31.01.2024", ""),
        ("", ""),
    ],
)
def test_dates_are_carried_as_a_filter_compares_them(written, carried):
    cohort = StubCohort(2)
    for record in cohort.records:
        record.meta["date"] = written

    assert embed_volumes(StubCheckpoint(), cohort, fields=("date",)).fields["date"] == [carried] * 2


def test_a_second_call_computes_nothing(tmp_path):
    checkpoint, out = StubCheckpoint(), tmp_path / "v.parquet"
    first = embed_volumes(checkpoint, StubCohort(9), out=out)
    content = out.read_bytes()

    again = embed_volumes(checkpoint, StubCohort(9), out=out)

    assert checkpoint.model.volumes_seen == 9
    assert again.volume_id == first.volume_id
    assert out.read_bytes() == content
    assert os.listdir(tmp_path) == ["v.parquet"]


def test_a_cohort_that_grew_computes_only_what_is_new(tmp_path):
    checkpoint, out = StubCheckpoint(), tmp_path / "v.parquet"
    embed_volumes(checkpoint, StubCohort(6), out=out)

    table = embed_volumes(checkpoint, StubCohort(10), out=out)

    assert checkpoint.model.volumes_seen == 10
    np.testing.assert_allclose(table.vectors, expected_vectors(10), atol=1e-6)


def test_a_scan_that_was_replaced_under_its_identifier_is_embedded_again(tmp_path):
    class Replaced(StubCohort):
        def read(self, volume_id):
            return super().read(volume_id) + 7 * (volume_id == "p1_a_0")

    checkpoint, out, cohort = StubCheckpoint(), tmp_path / "v.parquet", Replaced(6)
    old = embed_volumes(checkpoint, StubCohort(6), out=out)
    cohort.checksums["p1_a_0"] = 99

    new = embed_volumes(checkpoint, cohort, out=out)

    assert checkpoint.model.volumes_seen == 7
    changed = np.flatnonzero((new.vectors != old.vectors).any(axis=1))
    assert changed.tolist() == [2]
    np.testing.assert_array_equal(EmbeddingTable.load(out).vectors, new.vectors)
    embed_volumes(checkpoint, cohort, out=out)
    assert checkpoint.model.volumes_seen == 7


def test_an_export_that_does_not_say_what_it_was_made_of_is_made_again(tmp_path):
    checkpoint, out = StubCheckpoint(), tmp_path / "v.parquet"
    replace(embed_volumes(checkpoint, StubCohort(6), out=out), content=None).save(out)

    embed_volumes(checkpoint, StubCohort(6), out=out)

    assert checkpoint.model.volumes_seen == 12


def test_corrected_labels_and_fields_reach_a_table_that_needs_no_embedding(tmp_path):
    checkpoint, cohort = StubCheckpoint(), StubCohort(6)
    volumes, reports = tmp_path / "v.parquet", tmp_path / "r.parquet"
    embed_volumes(checkpoint, cohort, out=volumes)
    embed_reports(checkpoint, cohort.records, out=reports)
    for record in cohort.records:
        record.labels, record.split = {"Emphysema": 1.0, "Atelectasis": 0.0}, "test"
        record.meta["sex"] = "M"

    embed_volumes(checkpoint, cohort, out=volumes)
    embed_reports(StubCheckpoint(model=None), cohort.records, out=reports)

    assert checkpoint.model.volumes_seen == 6
    for path in (volumes, reports):
        table = EmbeddingTable.load(path)
        assert set(table.fields["sex"]) == {"M"}
        assert set(table.split) == {"test"}
        assert (table.labels == 1).sum() == (table.labels == 0).sum() == len(table)


def test_a_patient_who_left_the_cohort_leaves_the_table(tmp_path):
    cohort, out = StubCohort(6), tmp_path / "v.parquet"
    embed_volumes(StubCheckpoint(), cohort, out=out)
    cohort.records = [record for record in cohort.records if record.patient_id != "p1"]

    embed_volumes(StubCheckpoint(), cohort, out=out)

    assert "p1" not in EmbeddingTable.load(out).patient_id


def test_an_export_of_another_model_is_not_continued(tmp_path):
    out = tmp_path / "v.parquet"
    embed_volumes(StubCheckpoint(), StubCohort(3), out=out)

    with pytest.raises(EmbeddingError, match=r"v\.parquet.*a{64}.*b{64}"):
        embed_volumes(replace(StubCheckpoint(), sha256="b" * 64), StubCohort(3), out=out)


def test_a_cohort_prepared_differently_is_refused():
    other = StubCohort(3, config=VolumeConfig(size=(3, 4, 4)))

    with pytest.raises(EmbeddingError, match=other.fingerprint):
        embed_volumes(StubCheckpoint(), other)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_volume_that_became_unreadable_gets_no_row_and_is_noted(tmp_path, workers):
    table = embed_volumes(
        StubCheckpoint(),
        StubCohort(7, unreadable={"p0_a_1", "p2_a_0", "p2_a_1"}),
        out=tmp_path / "v.parquet",
        batch_size=2,
        workers=workers,
    )

    kept = [0, 2, 3, 6]
    np.testing.assert_allclose(table.vectors, expected_vectors(7)[kept], atol=1e-6)
    assert table.volume_id == [StubCohort(7).records[row].volume_id for row in kept]
    noted = [json.loads(line) for line in (tmp_path / "unreadable_volumes.jsonl").open()]
    assert {(row["volume_id"], row["status"], row["code"]) for row in noted} == {
        (name, "refused", "damaged-cache") for name in ("p0_a_1", "p2_a_0", "p2_a_1")
    }


def test_a_cohort_of_which_nothing_can_be_read_is_an_error():
    with pytest.raises(EmbeddingError, match="none of the 1 volumes"):
        embed_volumes(StubCheckpoint(), StubCohort(1, unreadable={"p0_a_0"}))


def kill_at_replace(number, out, when):
    """Run an export in a child that dies by SIGKILL around its ``number``-th atomic rename."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)
    calls = iter(range(10**6))
    real = os.replace

    def fatal(source, target):
        dying = next(calls) == number
        if dying and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if dying:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = fatal
    try:
        embed_volumes(StubCheckpoint(), StubCohort(23), out=out, batch_size=2)
    finally:
        os._exit(0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_twenty_times_an_export_loses_and_doubles_nothing(tmp_path, monkeypatch, when):
    monkeypatch.setattr(export, "SHARD_ROWS", 4)
    for number in range(10):
        out = tmp_path / f"{number}" / "v.parquet"
        kills = 0
        while kill_at_replace(number % 3 if kills else number, out, when) and kills < 10:
            kills += 1
        checkpoint = StubCheckpoint()
        table = embed_volumes(checkpoint, StubCohort(23), out=out)

        np.testing.assert_allclose(table.vectors, expected_vectors(23), atol=1e-6)
        assert table.volume_id == [record.volume_id for record in StubCohort(23).records]
        assert os.listdir(out.parent) == ["v.parquet"]
        if number in (2, 4):
            assert kills > 1


def test_the_volumes_of_a_study_share_one_report_row():
    reports = embed_reports(StubCheckpoint(), StubCohort(8).records)

    assert reports.kind == "report"
    assert reports.study_id == ["p0_a", "p1_a", "p2_a", "p3_a"]
    np.testing.assert_allclose(np.linalg.norm(reports.vectors, axis=1), 1.0, atol=1e-6)


def test_reports_are_embedded_once_and_again_when_one_was_edited(tmp_path):
    out, cohort = tmp_path / "r.parquet", StubCohort(8)
    embed_reports(StubCheckpoint(), cohort.records, out=out)
    content = out.read_bytes()
    modelless = StubCheckpoint(model=None)

    again = embed_reports(modelless, cohort.records, out=out)
    assert out.read_bytes() == content

    for record in cohort.records[:2]:
        record.findings = "an edited report of several words"
    with pytest.raises(AttributeError):  # a new text needs the model
        embed_reports(modelless, cohort.records, out=out)
    edited = embed_reports(StubCheckpoint(), cohort.records, out=out)
    assert not np.allclose(edited.vectors[0], again.vectors[0])
    np.testing.assert_array_equal(edited.vectors[1:], again.vectors[1:])
    assert os.listdir(tmp_path) == ["r.parquet"]


def test_texts_do_not_depend_on_their_neighbours():
    texts = ["a b", "long word here now", "x"]

    together = embed_texts(StubCheckpoint(), texts)
    alone = np.concatenate([embed_texts(StubCheckpoint(), [text]) for text in texts])

    np.testing.assert_allclose(together, alone, atol=1e-6)
