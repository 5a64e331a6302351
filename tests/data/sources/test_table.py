"""CSV and TSV, row by row."""

import csv
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.table import CsvSource

FIELD = st.text(alphabet='ab",;\t\n\r ä', max_size=5)


def written(row: Sequence[str], delimiter: str, end: str) -> str:
    """A row, with quotes where they are needed (which the csv module forgets for a lone carriage return)."""
    fields = (
        f'"{field.replace(chr(34), chr(34) * 2)}"' if set(field) & {*'"\r\n', delimiter} else field for field in row
    )
    return delimiter.join(fields) + end


@given(
    rows=st.lists(st.tuples(st.just("x"), FIELD, FIELD), max_size=8),
    delimiter=st.sampled_from([",", "\t", ";"]),
    end=st.sampled_from(["\n", "\r\n"]),
    blank=st.sampled_from(["", "\n", " \n\n"]),
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_read_back(
    tmp_path: Path, rows: list[tuple[str, str, str]], delimiter: str, end: str, blank: str
) -> None:
    path, header = tmp_path / "a.csv", ("one", "two", "three")
    pieces = [blank, *(written(row, delimiter, end) + blank for row in (header, *rows))]
    path.write_bytes("".join(pieces).encode())
    source = CsvSource(path, delimiter)
    assert [tuple(record.values()) for record in source] == rows
    assert source.columns == header
    for index in range(len(rows)):
        begins = sum(piece.count("\n") for piece in pieces[: index + 2]) + 1
        assert source.where(index) == f"{path}:{begins}"


@given(data=st.text(alphabet='a,"\n\r \t', max_size=30))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_tables_give_rows_or_errors_with_their_line(tmp_path: Path, data: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"h\n{data}".encode())
    source = CsvSource(path)
    last = 0
    for index in range(len(source)):
        where = source.where(index)
        line = int(where.rpartition(":")[2])
        assert last < line <= data.count("\n") + 2
        last = line
        try:
            assert len(source[index]) == 1
        except RecordError as error:
            assert str(error).startswith(f"{where}: ")  # noqa: PT017


def test_a_quote_inside_an_unquoted_field_opens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf"size",name\n3" disk,"a ""b"""\n4" disk,"x\n\ny"\n\n5,z')
    source = CsvSource(path)
    assert list(source) == [
        {"size": '3" disk', "name": 'a "b"'},
        {"size": '4" disk', "name": "x\n\ny"},
        {"size": "5", "name": "z"},
    ]
    assert [source.where(index) for index in range(3)] == [f"{path}:{line}" for line in (2, 3, 7)]
    assert pickle.loads(pickle.dumps(source))[1]["name"] == "x\n\ny"


def test_a_field_may_be_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    path, limit = tmp_path / "a.csv", csv.field_size_limit()
    path.write_text("text,id\n" + '"' + "x\n" * limit + '",1\ny,2\n')
    source = CsvSource(path)
    assert len(source[0]["text"]) == 2 * limit
    assert source[1] == {"text": "y", "id": "2"}
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"1,2,3", "3 fields, and the header has 2: a, b"),
        (b"1", "1 fields"),
        (b'1,"open', "badly quoted: unexpected end of data"),
        (b'1,"x"y', "badly quoted"),
        (b"1,\xff", "not valid UTF-8 at byte 2 of the row"),
        (b"1,2\r3,4", "badly quoted|a single row"),
    ],
)
def test_a_bad_row_is_named_and_its_neighbours_are_read(tmp_path: Path, row: bytes, words: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n1,2\n\n" + row)
    source = CsvSource(path)
    assert source[0] == {"a": "1", "b": "2"}
    with pytest.raises(RecordError, match=rf"a\.csv:4: .*({words})"):
        source[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "is empty"), ("a,b,a\n1,2,3\n", "names 'a' twice"), ('"a\n', "badly quoted")],
)
def test_a_bad_header_is_an_error(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        CsvSource(path).columns  # noqa: B018


@pytest.mark.parametrize("delimiter", ["", ",,", "ä", '"', "\n"])
def test_a_delimiter_is_one_character(tmp_path: Path, delimiter: str) -> None:
    with pytest.raises(DataError, match="delimiter="):
        CsvSource(tmp_path / "a.csv", delimiter)
