import numpy as np
import pytest
from embedding_tables import random_table

from ctclip.embeddings import EmbeddingError, EmbeddingTable, concatenate


def test_a_table_comes_back_from_disk_bit_equal(tmp_path):
    table = random_table(20, fields={"sex": ["F", "M"] * 10})

    table.save(tmp_path / "table.parquet")
    loaded = EmbeddingTable.load(tmp_path / "table.parquet")

    assert loaded.volume_id == table.volume_id
    assert loaded.patient_id == table.patient_id
    assert loaded.fields == table.fields
    assert loaded.provenance == table.provenance
    np.testing.assert_array_equal(loaded.vectors, table.vectors)
    np.testing.assert_array_equal(loaded.labels, table.labels)
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


def test_unknown_labels_stay_unknown(tmp_path):
    table = random_table(5)
    table.labels[2, 3] = np.nan

    table.save(tmp_path / "table.parquet")

    loaded = EmbeddingTable.load(tmp_path / "table.parquet").labels
    assert np.isnan(loaded[2, 3])
    assert np.isnan(loaded).sum() == 1


def test_tables_of_different_models_never_mix():
    one, other = random_table(3), random_table(3, checkpoint="f" * 64)

    with pytest.raises(EmbeddingError, match=r"a{64}.*f{64}"):
        concatenate([one, other])


def test_tables_of_different_preprocessing_never_mix():
    one, other = random_table(3), random_table(3, fingerprint="ffffffffffff")

    with pytest.raises(EmbeddingError, match=r"fingerprint.*0123456789ab.*ffffffffffff"):
        one.require_same_space(other)


def test_a_volume_that_comes_twice_keeps_its_first_row():
    table = random_table(6)

    joined = concatenate([table.select([0, 1, 2]), table.select([2, 3])])

    assert joined.volume_id == table.volume_id[:4]


def test_vectors_that_are_not_normalised_are_refused():
    table = random_table(3)

    with pytest.raises(EmbeddingError, match="norm 2"):
        EmbeddingTable(
            volume_id=table.volume_id,
            study_id=table.study_id,
            patient_id=table.patient_id,
            split=table.split,
            vectors=table.vectors * np.float32(2.0),
            labels=table.labels,
        )


def test_nan_vectors_are_refused():
    table = random_table(3)
    table.vectors[1] = np.nan

    with pytest.raises(EmbeddingError, match="norm nan"):
        table.select([0, 1])


def test_a_file_of_something_else_is_named_as_such(tmp_path):
    path = tmp_path / "notes.parquet"
    path.write_text("not parquet")

    with pytest.raises(EmbeddingError, match="not a readable Parquet file"):
        EmbeddingTable.load(path)
    with pytest.raises(FileNotFoundError, match="ctclip-embed"):
        EmbeddingTable.load(tmp_path / "missing.parquet")
