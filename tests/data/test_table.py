import gzip

import pandas
import pytest

from ctclip.data.problems import ManifestError
from ctclip.data.table import read_table


def table(tmp_path, content, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path)


def test_cells_stay_text_and_rows_know_their_line(tmp_path):
    found = table(tmp_path, 'a,b\n1, NaN \n"two\nlines",x\n')
    assert [row.cells for row in found.rows] == [
        {"a": "1", "b": "NaN"},
        {"a": "two\nlines", "b": "x"},
    ]
    assert [row.line for row in found.rows] == [2, 3]


def test_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path):
    found = table(tmp_path, "\ufeffVolumeName,x\r\na,1\r\n")
    assert found.columns == ("VolumeName", "x")
    assert found.rows[0].cells == {"VolumeName": "a", "x": "1"}


def test_gzipped_and_parquet_tables_read_alike(tmp_path):
    plain = table(tmp_path, "a,b\n1,x\n,y\n")
    zipped = table(tmp_path, gzip.compress(b"a,b\n1,x\n,y\n"), "t.csv.gz")
    frame = pandas.DataFrame({"a": [1.0, None], "b": ["x", "y"]})
    frame.to_parquet(tmp_path / "t.parquet")
    columnar = read_table(tmp_path / "t.parquet")
    cells = [row.cells for row in plain.rows]
    assert [row.cells for row in zipped.rows] == cells
    assert [row.cells for row in columnar.rows] == cells


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"a,b\n", "without rows"),
        ("a,b\n1,é\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
        (b'a,b\n"x 5" y,z\n', "line 2.*unbalanced quote"),
        (b'a,b\nx,"never closed\n', "unbalanced quote"),
        (b"a,b\n1,2,3\n4,5\n6,7,8\n", ":2: 3 cells, the header has 2.* 2 of 3 rows"),
        (b'a,b\n"x\ny",z,1\n2,3\n', "line 2: 3 cells.* up to line 3; an unbalanced quote"),
        (b"a,a\n1,2\n", "column a appears more than once"),
        (b"a,b\n\0\0\n", "zero bytes"),
        (b"\x1f\x8bnot gzip", "damaged gzip"),
    ],
)
def test_a_malformed_table_is_refused_with_its_line(tmp_path, content, message):
    with pytest.raises(ManifestError, match=message):
        table(tmp_path, content)


def test_a_row_that_does_not_fit_is_kept_apart_with_its_line(tmp_path):
    found = table(tmp_path, "a,b\n1,x\n2,y,z\n3,w\n")
    assert [row.cells["a"] for row in found.rows] == ["1", "3"]
    (problem,) = found.malformed
    assert (problem.status, problem.code) == ("refused", "malformed-row")
    assert problem.path.endswith("t.csv:3")


def test_a_semicolon_table_gets_a_hint(tmp_path):
    with pytest.raises(ManifestError, match="not separated by commas"):
        table(tmp_path, "a;b\n1;2\n").require(["a"])


def test_a_broken_parquet_file_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="Parquet"):
        table(tmp_path, "PAR1 but no", "t.parquet")
