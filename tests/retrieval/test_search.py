from dataclasses import replace

import numpy as np
import pytest
from embedding_tables import random_table

from ctclip.embeddings import EmbeddingError
from ctclip.retrieval.filters import Filter
from ctclip.retrieval.search import MemoryArchive, Query, from_rows, unit, weighted


def search(archive, query, **options):
    return [hit.volume_id for hit in archive.search(query, **options)]


def test_hits_come_in_the_order_of_their_cosine():
    table = random_table(40, volumes_per_patient=1)
    query = unit(np.random.default_rng(1).normal(size=16))

    found = search(MemoryArchive(table), Query(vector=query), k=40)

    expected = sorted(table.volume_id, key=lambda v: -(table.vectors[table.row_of(v)] @ query))
    assert found == expected


def test_a_query_never_finds_its_own_patient():
    table = random_table(40, volumes_per_patient=4)
    archive = MemoryArchive(table)

    for volume in table.volume_id:
        rows = archive.rows(volume_id=volume)
        hits = archive.search(from_rows(rows), k=40)
        assert rows.patient_id[0] not in {hit.patient_id for hit in hits}
        assert len(hits) == 9


def test_reconstructions_of_one_study_are_one_case():
    table = random_table(30, volumes_per_patient=3)
    rng = np.random.default_rng(2)
    hits = MemoryArchive(table).search(Query(vector=unit(rng.normal(size=16))), k=30, per_patient=9)

    assert len(hits) == 10
    for hit in hits:
        rows = [row for row, study in enumerate(table.study_id) if study == hit.study_id]
        best = max(table.vectors[rows] @ table.vectors[table.row_of(hit.volume_id)])
        assert best == pytest.approx(1.0)


def test_at_most_n_studies_of_a_patient_come_back():
    table = random_table(30, volumes_per_patient=6)
    table = replace(table, study_id=[f"s{row}" for row in range(30)])
    query = Query(vector=unit(np.random.default_rng(3).normal(size=16)))

    for limit in (1, 2, 6):
        hits = MemoryArchive(table).search(query, k=30, per_patient=limit)
        counts = [sum(h.patient_id == p for h in hits) for p in set(table.patient_id)]
        assert counts == [limit] * 5


def test_a_study_is_the_mean_of_its_volumes():
    table = random_table(8, volumes_per_patient=2)
    query = from_rows(MemoryArchive(table).rows(study_id="p1_a"))

    np.testing.assert_allclose(query.vector, unit(table.vectors[2:4].mean(axis=0)), atol=1e-6)


def test_equal_similarities_are_ordered_by_identifier():
    table = random_table(6, volumes_per_patient=1)
    table.vectors[:] = table.vectors[0]

    assert search(MemoryArchive(table), Query(vector=table.vectors[0])) == sorted(table.volume_id)


def test_filters_let_through_exactly_the_labelled_cases():
    table = random_table(60, volumes_per_patient=1, fields={"sex": ["F", "M", ""] * 20})
    table.labels[::5, 0] = np.nan
    query = Query(vector=table.vectors[0])

    for where, passes in [
        (Filter(present=("Medical material",)), table.labels[:, 0] == 1),
        (Filter(absent=("Medical material",)), table.labels[:, 0] == 0),
        (Filter(unknown=("Medical material",)), np.isnan(table.labels[:, 0])),
        (Filter(sex="F"), np.array([sex == "F" for sex in table.fields["sex"]])),
    ]:
        found = search(MemoryArchive(table), query, k=60, where=where)
        assert sorted(found) == sorted(np.array(table.volume_id)[passes])


def test_ages_and_dates_are_ranges_with_both_ends():
    fields = {
        "age": ["40", "50.5", "60", "", "x"],
        "date": ["2023-12-31", "2024-01-01", "2024-06-01", "", "2025-01-01"],
    }
    table = random_table(5, volumes_per_patient=1, fields=fields)

    assert Filter(age=(50.5, 60)).mask(table).tolist() == [False, True, True, False, False]
    in_2024 = Filter(date=("2024-01-01", "2024-12-31")).mask(table)
    assert in_2024.tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("date", "passes"),
    [
        (("2024", "2024"), "2024 2024-01 2024-01-01 2024-02-29 2024-12-31"),
        (("2023-12", "2024-02"), "2023-12-31 2024 2024-01 2024-01-01 2024-02-29"),
        (("20240229", "20241231"), "2024-02-29 2024-12-31"),
    ],
)
def test_a_date_may_be_a_whole_year_or_month_or_a_day_as_in_dicom(date, passes):
    days = ["2023-12-31", "2024", "2024-01", "2024-01-01", "2024-02-29", "2024-12-31", "2025", ""]
    table = random_table(len(days), volumes_per_patient=1, fields={"date": days})

    kept = Filter(date=date).mask(table)

    assert [day for day, keep in zip(days, kept, strict=True) if keep] == passes.split()


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"age": (0, float("inf"))}, "age must be two finite"),
        ({"age": (float("nan"), 3)}, "age must be two finite"),
        ({"date": ("2024", "31.12.2024")}, r"date takes .*got '31\.12\.2024'"),
        ({"date": ("2023-02-29", "2024")}, "date takes .*got '2023-02-29'"),
        ({"date": ("2024-1", "2024-13")}, "date takes .*got '2024-1'"),
        ({"date": ("", "2024")}, "date takes"),
        ({"date": ("2024-06", "2024-05")}, "first <= last"),
        ({"sex": "\ud800"}, "sex holds half a character"),
        ({"hospital": ("A", "\ud800")}, "hospital holds half a character"),
        ({"split": "\udfff"}, "split holds half a character"),
    ],
)
def test_a_condition_that_makes_no_sense_is_refused_by_name(condition, message):
    with pytest.raises(ValueError, match=message):
        Filter(**condition)


def test_a_filter_on_a_field_that_was_not_exported_says_so():
    with pytest.raises(EmbeddingError, match=r"hospital.*export again with fields=hospital"):
        Filter(hospital=("A",)).mask(random_table(3))


def test_an_unknown_finding_is_refused():
    with pytest.raises(ValueError, match="unknown finding 'Nodule'"):
        Filter(present=("Nodule",))


def test_a_query_of_another_width_is_refused():
    with pytest.raises(EmbeddingError, match=r"\(8,\).*\(16,\)"):
        MemoryArchive(random_table(3)).search(Query(vector=unit(np.ones(8))))


def test_weights_of_one_and_zero_give_the_parts_themselves():
    rng = np.random.default_rng(4)
    scan, text = (Query(vector=unit(rng.normal(size=16)), name=name) for name in ("scan", "text"))

    np.testing.assert_allclose(weighted([(1, scan), (0, text)]).vector, scan.vector, atol=1e-6)
    np.testing.assert_allclose(weighted([(0, scan), (1, text)]).vector, text.vector, atol=1e-6)


def test_a_part_with_a_narrow_spread_counts_as_much_as_one_with_a_wide_spread():
    """Ranking by the mixed query is ranking by the sum of both standardised similarities."""
    rng = np.random.default_rng(5)
    table = random_table(50, volumes_per_patient=1)
    parts = [Query(vector=unit(rng.normal(size=16)), spread=spread) for spread in (0.5, 0.01)]

    mixed = weighted([(0.7, parts[0]), (0.3, parts[1])])

    scores = (
        0.7 * table.vectors @ parts[0].vector / 0.5 + 0.3 * table.vectors @ parts[1].vector / 0.01
    )
    expected = [table.volume_id[row] for row in np.argsort(-scores)]
    assert search(MemoryArchive(table), mixed, k=10) == expected[:10]


def test_less_like_those_moves_away_from_them():
    table = random_table(50, volumes_per_patient=1)
    more, less = Query(vector=table.vectors[0]), Query(vector=table.vectors[1])

    query = weighted([(1.0, more), (-0.5, less)])

    assert query.vector @ less.vector < more.vector @ less.vector


def test_parts_that_cancel_are_refused():
    one = Query(vector=unit(np.ones(4)))

    with pytest.raises(ValueError, match="cancel"):
        weighted([(1, one), (-1, one)])
