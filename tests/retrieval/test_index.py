"""The index against brute force: always in a file, and on a server where one is named.

pip install milvus==2.3.5 && milvus-server      # or any other Milvus
CTCLIP_MILVUS_URI=http://127.0.0.1:19530 python -m pytest tests/retrieval/test_index.py
"""

import io
import json
import os
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from embedding_tables import random_table

pytest.importorskip("pymilvus", reason="ctclip[retrieval] is not installed")

from pymilvus import MilvusClient

from ctclip.embeddings import EmbeddingError, EmbeddingTable
from ctclip.embeddings.transform import fit
from ctclip.findings import FINDINGS
from ctclip.retrieval import jobs
from ctclip.retrieval.filters import Filter
from ctclip.retrieval.index import MilvusArchive
from ctclip.retrieval.question import Background
from ctclip.retrieval.search import MemoryArchive, Query, from_rows, unit

NUM_ROWS = 1200


def archive_table(num_rows=NUM_ROWS):
    rng = np.random.default_rng(7)
    table = random_table(
        num_rows,
        width=24,
        volumes_per_patient=4,
        fields={
            "sex": [str(value) for value in rng.choice(["F", "M", ""], num_rows)],
            "age": ["" if row % 11 == 0 else f"{row % 90}.{row % 3}" for row in range(num_rows)],
            "date": ["" if row % 7 == 0 else f"20{row % 20 + 10}-05-01" for row in range(num_rows)],
            "hospital": [str(value) for value in rng.choice(['St. "Q"', "B\\C", "Ü"], num_rows)],
            "report": [f"text {row}" for row in range(num_rows)],
        },
    )
    table.labels[rng.random(table.labels.shape) < 0.2] = np.nan
    scores = rng.random(table.labels.shape).astype(np.float32)
    studies = [f"p{row // 4}_{'ab'[row % 4 // 2]}" for row in range(num_rows)]
    return replace(table, scores=scores, study_id=studies)


@contextmanager
def new_place(kind, folder):
    """Where an archive may be built: a URI and a name; on a server nothing is left behind."""
    if kind == "file":
        yield {"uri": folder / "archive.db"}
        return
    uri = os.environ.get("CTCLIP_MILVUS_URI")
    if not uri:
        pytest.skip("CTCLIP_MILVUS_URI is not set: no Milvus server to test against")
    name = f"test_{time.time_ns()}"
    yield {"uri": uri, "name": name}
    client = MilvusClient(uri)
    client.drop_alias(name)
    for collection in client.list_collections():
        if collection.startswith(name):
            client.drop_collection(collection)
    client.close()


@pytest.fixture(params=["file", "server"])
def place(request, tmp_path):
    with new_place(request.param, tmp_path) as found:
        yield found


@pytest.fixture(scope="module", params=["file", "server", "partitioned server"])
def pair(request, tmp_path_factory):
    table = archive_table()
    together = "hospital" if "partitioned" in request.param else None
    with (
        new_place(request.param, tmp_path_factory.mktemp("index")) as place,
        MilvusArchive.build(**place, table=table, partition_by=together) as archive,
    ):
        yield archive, MemoryArchive(table)


def outcome(hits):
    return [(hit.volume_id, hit.study_id, hit.similarity) for hit in hits]


FILTERS = {
    "none": Filter(),
    "present": Filter(present=("Emphysema",)),
    "absent": Filter(absent=("Emphysema", "Atelectasis")),
    "unknown": Filter(unknown=("Lung nodule",)),
    "sex": Filter(sex="F"),
    "age": Filter(age=(20, 40)),
    "age with decimals": Filter(age=(20.1, 40.7)),
    "age from below zero": Filter(age=(-5, 3)),
    "date": Filter(date=("2012-01-01", "2020-12-31")),
    "whole years": Filter(date=("2012", "2020")),
    "hospital with quotes": Filter(hospital=('St. "Q"',)),
    "hospitals": Filter(hospital=("B\\C", "Ü")),
    "split": Filter(split="valid"),
    "nobody": Filter(split="test"),
    "one per cent": Filter(present=FINDINGS[:3], sex="F"),
    "all at once": Filter(present=("Emphysema",), sex="M", age=(1, 80), hospital=("Ü",)),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("per_patient", [1, 2])
def test_the_index_answers_like_brute_force_under_every_filter(pair, name, per_patient):
    archive, oracle = pair
    rng = np.random.default_rng(1)
    for k in (1, 10, 60):
        query = Query(vector=unit(rng.normal(size=24)), exclude_patients=frozenset({"p3", 'x"y'}))
        options = {"k": k, "per_patient": per_patient, "where": FILTERS[name]}

        assert outcome(archive.search(query, **options)) == outcome(oracle.search(query, **options))


def test_hits_carry_what_the_table_carried(pair):
    archive, oracle = pair
    query = Query(vector=unit(np.ones(24)))

    hit, expected = archive.search(query, k=1)[0], oracle.search(query, k=1)[0]

    np.testing.assert_array_equal(hit.labels, expected.labels)
    np.testing.assert_array_equal(hit.scores, expected.scores)
    assert hit.fields == expected.fields


def test_a_study_of_the_archive_is_looked_up_like_in_memory(pair):
    archive, _ = pair

    mine, theirs = (from_rows(side.rows(study_id="p5_b")) for side in pair)

    np.testing.assert_array_equal(mine.vector, theirs.vector)
    assert "p5" not in {hit.patient_id for hit in archive.search(mine, k=100)}
    with pytest.raises(EmbeddingError, match="no case 'zz'"):
        archive.rows(study_id="zz")


def test_studies_are_found_by_the_beginning_of_their_name(pair):
    archive, _ = pair

    assert archive.studies("p12_") == ["p12_a", "p12_b"]
    assert archive.studies("2_") == []
    assert len(archive.studies("", limit=7)) == 7
    assert archive.studies('"; drop') == []


def test_a_thousand_equal_vectors_are_still_collapsed_exactly(place):
    table = archive_table(800)
    table.vectors[:700] = table.vectors[0]
    query = Query(vector=table.vectors[0])

    with MilvusArchive.build(**place, table=table) as archive:
        found = archive.search(query, k=20)

    assert outcome(found) == outcome(MemoryArchive(table).search(query, k=20))


def test_an_approximate_index_is_bypassed_where_a_filter_leaves_few(place):
    table = archive_table(2000)
    table.labels[:, 0] = (np.arange(2000) % 100 == 0).astype(np.float32)
    oracle = MemoryArchive(table)
    rng = np.random.default_rng(2)
    where = Filter(present=(FINDINGS[0],))
    with MilvusArchive.build(**place, table=table, index="HNSW") as archive:
        recalls = []
        for _ in range(30):
            query = Query(vector=unit(rng.normal(size=24)))
            assert outcome(archive.search(query, where=where)) == outcome(
                oracle.search(query, where=where)
            )
            expected = {hit.study_id for hit in oracle.search(query)}
            recalls.append(len(expected & {hit.study_id for hit in archive.search(query)}) / 10)
    assert np.mean(recalls) >= 0.99


def test_an_approximate_index_that_misses_neighbours_gives_way_to_an_exact_one(
    place, monkeypatch, caplog
):
    monkeypatch.setattr("ctclip.retrieval.index.HNSW_BUILD", {"M": 4, "efConstruction": 8})
    monkeypatch.setattr("ctclip.retrieval.index.HNSW_EF", (10,))
    rng = np.random.default_rng(0)
    noise = np.stack([unit(row) for row in rng.normal(size=(2000, 256)).astype(np.float32)])
    table = replace(archive_table(2000), vectors=noise)
    oracle = MemoryArchive(table)

    with MilvusArchive.build(**place, table=table, index="HNSW") as archive:
        assert archive.index == "FLAT"
        for row in range(10):
            query = Query(vector=noise[row])
            assert outcome(archive.search(query)) == outcome(oracle.search(query))
    assert "is searched exactly" in caplog.text


def test_what_the_store_refuses_is_told_in_a_sentence(place):
    with MilvusArchive.build(**place, table=archive_table(20)) as archive:
        archive.name = "gone"
        with pytest.raises(EmbeddingError, match="refused the search: .*gone"):
            archive.search(Query(vector=unit(np.ones(24))))


def test_inserting_twice_doubles_nothing_and_updates_what_changed(place):
    table = archive_table(40)
    changed = replace(table, fields={**table.fields, "sex": ["F"] * 40})
    with MilvusArchive.build(**place, table=table.select(range(30))) as archive:
        archive.insert(table)
        archive.insert(changed)

        assert len(archive) == 40
        assert set(archive.rows(study_id="p0_a").fields["sex"]) == {"F"}


@pytest.fixture
def partitioned(tmp_path):
    with new_place("server", tmp_path) as place:
        MilvusArchive.build(**place, table=archive_table(60), partition_by="hospital").close()
        yield place


def test_a_volume_that_moves_to_another_partition_is_found_there_and_only_there(partitioned):
    table = archive_table(60)
    moved = replace(table, fields=table.fields | {"hospital": ["Ü"] * 60})
    with MilvusArchive(**partitioned) as archive:
        assert archive.partition_by == "hospital"
        archive.insert(moved)
        archive.insert(moved)

        query = Query(vector=table.vectors[5].astype(np.float64))
        there = archive.search(query, k=60, per_patient=60, where=Filter(hospital=("Ü",)))
        elsewhere = archive.search(query, k=60, where=Filter(hospital=('St. "Q"', "B\\C")))

        expected = MemoryArchive(moved).search(query, k=60, per_patient=60)
        assert len(archive) == 60
        assert outcome(there) == outcome(expected)
        assert elsewhere == []
        assert archive.withdraw(["p1"]) == 4
        assert len(archive) == 56


def test_a_file_is_not_partitioned(tmp_path):
    with pytest.raises(EmbeddingError, match="only a server keeps partitions: leave partition_by"):
        MilvusArchive.build(tmp_path / "a.db", archive_table(8), partition_by="hospital")


def test_a_field_that_is_not_carried_cannot_partition():
    with pytest.raises(EmbeddingError, match="doesn't carry manufacturer"):
        MilvusArchive.build("http://nowhere", archive_table(8), partition_by="manufacturer")


def test_tables_of_another_model_or_other_fields_are_refused(place):
    table = archive_table(20)
    with MilvusArchive.build(**place, table=table) as archive:
        with pytest.raises(EmbeddingError, match="don't belong together"):
            archive.insert(replace(table, provenance={**table.provenance, "checkpoint": "b"}))
        with pytest.raises(EmbeddingError, match="carries the fields"):
            archive.insert(replace(table, fields={}))
        with pytest.raises(EmbeddingError, match="table of reports"):
            archive.insert(replace(table, kind="report", vectors=-table.vectors))
        np.testing.assert_array_equal(
            archive.rows(volume_id="p0_a_1").vectors[0], table.vectors[table.row_of("p0_a_1")]
        )
        with pytest.raises(EmbeddingError, match="don't belong together"):
            archive.project(table.vectors[0], {"checkpoint": "b"})


def contents(path):
    """A file's bytes; of a Parquet file, whose columns are compressed, also the plain ones."""
    data = path.read_bytes()
    if not data.startswith(b"PAR1"):
        return data
    plain = io.BytesIO()
    pq.write_table(pq.read_table(path), plain, compression="none", use_dictionary=False)
    return data + plain.getvalue()


def traces(folder, needles):
    """Which of some byte strings occur in any file of a folder."""
    files = [contents(path) for path in folder.rglob("*") if path.is_file()]
    return [needle for needle in needles if any(needle in file for file in files)]


def test_a_withdrawn_patient_leaves_nothing_behind(tmp_path):
    table = archive_table(400)
    rows = [row for row, patient in enumerate(table.patient_id) if patient == "p42"]
    vectors = [table.vectors[row].tobytes() for row in rows]
    texts = [f"text {row}".encode() for row in rows]
    needles = [*vectors, *texts, b"p42_a", b"p42_b"]
    with MilvusArchive.build(tmp_path / "a.db", table) as archive:
        assert traces(tmp_path, needles) == needles, "the test can't see what it looks for"

        archive.withdraw(["p42"])

    assert traces(tmp_path, needles) == []


def test_a_withdrawn_patient_is_not_found_again(place):
    table = archive_table(400)
    row = table.patient_id.index("p42")
    with MilvusArchive.build(**place, table=table) as archive:
        assert archive.withdraw(["p42", "nobody"]) == 4

        assert len(archive) == 396
        hits = archive.search(Query(vector=table.vectors[row]), k=396, per_patient=4)
        assert "p42" not in {hit.patient_id for hit in hits}
        assert len(hits) == 198
        assert archive.studies("p42_") == []
        with pytest.raises(EmbeddingError, match="no case"):
            archive.rows(study_id="p42_a")


def test_the_values_to_choose_from_follow_the_rows(place):
    table = archive_table(40)
    table.fields["hospital"][:] = ["Old"] * 40
    guest = replace(
        table.select(range(4)),
        volume_id=[f"g_{row}" for row in range(4)],
        patient_id=["g"] * 4,
        fields={**table.select(range(4)).fields, "hospital": ["Guest"] * 4},
    )
    with MilvusArchive.build(**place, table=table) as archive:
        archive.insert(guest)
        assert archive.values()["hospital"] == ["Guest", "Old"]
        archive.withdraw(["g"])
        assert archive.values() == MemoryArchive(table).values()
    with MilvusArchive(**place) as archive:
        assert archive.values() == MemoryArchive(table).values()


def save_result(state, study):
    question = {"study": study, "more": [], "less": []}
    state.mkdir(exist_ok=True)
    (state / f"{study}.json").write_text(json.dumps({"question": question, "hits": []}))


def test_a_withdrawal_forgets_saved_results_before_the_rows(tmp_path, monkeypatch, caplog):
    state, uri = tmp_path / "state", str(tmp_path / "a.db")
    MilvusArchive.build(uri, archive_table(40)).close()
    for study in ("p3_a", "p4_b"):
        save_result(state, study)
    config = jobs.IndexConfig(action="withdraw", uri=uri, patients=("p3",), state=state)

    def fail(*_):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(MilvusArchive, "withdraw", fail)
        with pytest.raises(RuntimeError):
            jobs.run_index(config)
    assert [path.stem for path in state.iterdir()] == ["p4_b"]
    jobs.run_index(replace(config, patients=("p3", "p33x")))
    assert "none of p33x" in caplog.text
    with pytest.raises(EmbeddingError, match="none of the patients p3, so nothing was removed"):
        jobs.run_index(config)
    with MilvusArchive(uri) as archive:
        assert len(archive) == 36


def test_an_interrupted_withdrawal_is_finished_on_opening(tmp_path, monkeypatch):
    table = archive_table(80)
    uri = tmp_path / "a.db"
    with MilvusArchive.build(uri, table) as archive:
        monkeypatch.setattr(archive, "purge", lambda: None)
        archive.withdraw(["p3"])

    MilvusArchive(uri).close()

    vectors = [table.vectors[row].tobytes() for row in range(12, 16)]
    assert traces(tmp_path, vectors) == []
    with MilvusArchive(uri) as archive:
        assert len(archive) == 76


def test_a_backup_restores_the_same_archive(place, tmp_path):
    table = archive_table(60)
    table = table.transformed(fit(table.vectors, whiten=True))
    query = Query(vector=table.vectors[5])
    background = Background.of(table, replace(table, vectors=-table.vectors), table.vectors[:18])
    with MilvusArchive.build(**place, table=table, background=background) as archive:
        assert archive.backup(tmp_path / "backup.parquet") == 60
        before = archive.search(query, k=20)

    saved = EmbeddingTable.load(tmp_path / "backup.parquet")
    with MilvusArchive.build(tmp_path / "b.db", saved) as restored:
        assert outcome(restored.search(query, k=20)) == outcome(before)
        assert restored.transform.name == table.transform.name
        restored_background = asdict(restored.background)
    assert restored_background == pytest.approx(asdict(background), abs=0.05)
    assert restored_background["text_ordinary"] == background.text_ordinary
    assert restored_background["phrase_spread"] == background.phrase_spread != 1


def test_a_rebuild_replaces_the_archive_and_leaves_one_collection(place):
    MilvusArchive.build(**place, table=archive_table(40)).close()
    time.sleep(0.01)
    with MilvusArchive.build(**place, table=archive_table(20)) as archive:
        assert len(archive) == 20
        collections = archive._client.list_collections()
        assert len([name for name in collections if name.startswith(archive.name)]) == 1


def test_a_missing_archive_says_how_to_make_one(tmp_path):
    with pytest.raises(EmbeddingError, match="ctclip-index --action build"):
        MilvusArchive(tmp_path / "none.db")


def test_a_whitened_archive_takes_raw_vectors_of_its_model(place):
    raw = archive_table(60)
    table = raw.transformed(fit(raw.vectors))
    with MilvusArchive.build(**place, table=table) as archive:
        vector = archive.project(raw.vectors[7], raw.provenance)
        hit = archive.search(Query(vector=vector), k=1)[0]

    assert hit.similarity == pytest.approx(1.0)
