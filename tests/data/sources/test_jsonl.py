"""JSON Lines: every line is read as a simple reader reads it, or refused under its number."""

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swissarmy.data.source import DataError, RecordError, Source
from swissarmy.data.sources import record_index
from swissarmy.data.sources.jsonl import JsonArraySource, JsonlSource

BOM = b"\xef\xbb\xbf"


def lines_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The reference: lines end with a line feed, those of spaces are none, a byte order mark is dropped."""
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        if line.strip(b" \t\r"):
            yield number, line


def record_of(line: bytes) -> dict[str, Any] | None:
    """The reference: the object on a line, or `None` if it is bad."""
    try:
        value = json.loads(line.decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def check(path: Path) -> None:
    """Compare with the reference, line by line."""
    source, want = JsonlSource(path), list(lines_of(path.read_bytes()))
    assert len(source) == len(want)
    for index, (number, line) in enumerate(want):
        assert source.where(index) == f"{path}:{number}"
        record = record_of(line)
        if record is None:
            with pytest.raises(RecordError) as error:
                source[index]
            assert str(error.value).startswith(f"{path}:{number}: ")
        else:
            assert repr(source[index]) == repr(record)  # NaN is not equal to itself


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """Something like JSON Lines, with a few bytes changed, put in or taken out."""
    objects = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=9) | st.none(), max_size=2)
    good = objects.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    bad = st.sampled_from(
        [b"", b" ", b"\t", b"[1]", b"7", b'"x"', b"null", b'{"a":', b"\xff", b"{}}", b"\0", BOM, b"{"]
    )
    ends = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r", b" \n", b"\n "])
    data = draw(st.sampled_from([b"", BOM]))
    data += b"".join(line + draw(ends) for line in draw(st.lists(good | bad, max_size=8)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=2)) + data[place + draw(st.integers(0, 2)) :]
    return data


@given(data=hostile() | st.binary(max_size=60), chunk=st.sampled_from([1, 2, 3, 7, 1 << 24]))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_files_are_read_as_the_reference_reads_them(tmp_path: Path, data: bytes, chunk: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with patch.object(record_index, "_CHUNK", chunk):
        check(path)


@given(parts=st.lists(hostile(), min_size=2, max_size=4))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_grows_again_and_again_stays_right(tmp_path: Path, parts: list[bytes]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"")
    (tmp_path / "a.jsonl.sat-index").unlink(missing_ok=True)
    with patch.object(record_index, "_WORTH_KEEPING", 0):
        for part in parts:
            with path.open("ab") as file:
                file.write(part)
            check(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1', "not valid JSON: Expecting ',' delimiter at column 8"),
        (b'{"a": "b', "not valid JSON: Unterminated string starting at column 7"),
        (b"[1, 2]", "this is an array"),
        (b'"text"', "this is a string"),
        (b"null", "this is null"),
        (b"3", "this is a single value"),
        (b'{"a": "\xff"}', "not valid UTF-8 at byte 7 of the line"),
        (b'{"a": 1}\0', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        ("{}".encode("utf-16"), "not valid UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n\n' + line + b'\n{"n": 2}')
    source = JsonlSource(path)
    with pytest.raises(RecordError) as error:
        source[1]
    assert str(error.value).startswith(f"{path}:3: ")
    assert words in str(error.value)
    assert [source[0], source[2], source[-1]] == [{"n": 1}, {"n": 2}, {"n": 2}]
    assert source.where(2) == f"{path}:4"


@pytest.mark.parametrize("end", [b"x", b" x", b"\x0b", "\u2028".encode()])
def test_nothing_but_spaces_may_follow_the_object_on_its_line(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}' + end)
    with pytest.raises(RecordError, match=r"a.jsonl:1: not valid JSON: Extra data"):
        JsonlSource(path)[0]


@pytest.mark.parametrize("spaces", [b"", b"\r", b" \t\r\n\n \r\n"])
def test_spaces_around_the_object_are_no_part_of_it(tmp_path: Path, spaces: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'  {"n": 1}' + spaces + b"\n{}" + spaces)
    assert list(JsonlSource(path)) == [{"n": 1}, {}]


def test_a_line_of_a_hundred_megabytes_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"n": 1}\n{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"n": 3}\n')
    source = JsonlSource(path)
    assert len(source) == 3
    assert len(source[1]["text"]) == 100 << 20
    assert source[2] == {"n": 3}
    assert source.where(2) == f"{path}:3"


def test_a_megabyte_of_spaces_is_an_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b" " * (1 << 20) + b"\n{}")
    with patch.object(record_index, "_CHUNK", 1 << 12):
        source = JsonlSource(path)
        assert [source.where(index) for index in range(len(source))] == [f"{path}:1", f"{path}:3"]


def test_it_is_a_source_that_travels_as_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(5000)))
    source = JsonlSource(path)
    assert isinstance(source, Source)
    assert source[4999] == {"n": 4999}
    sent = pickle.dumps(source)
    assert len(sent) < 500
    assert pickle.loads(sent)[17] == {"n": 17}
    assert pickle.loads(sent).fingerprint == source.fingerprint
    assert [record["n"] for record in source] == list(range(5000))
    with pytest.raises(IndexError):
        source[5000]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    for name, text in (("a", "{}\n"), ("b", "{}\n"), ("c", "{} \n")):
        (tmp_path / name).write_text(text)
    one, same, other = (JsonlSource(tmp_path / name).fingerprint for name in "abc")
    assert one == same != other


def test_a_file_that_shrinks_or_moves_its_lines_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    shrunk = JsonlSource(path)
    assert shrunk[1] == {"n": 2}
    path.write_text('{"n": 1}\n')
    with pytest.raises(DataError, match="changed since it was opened"):
        shrunk[1]
    path.write_text('{"nn": 1}\n{"n": 2}\n')
    with pytest.raises(DataError, match="changed since it was opened"):
        shrunk[1]


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_what_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}.*(No such file|Is a directory)"):
        len(JsonlSource(tmp_path / name))


def test_deep_nesting_leaves_the_recursion_limit_alone(tmp_path: Path) -> None:
    path, limit = tmp_path / "a.jsonl", sys.getrecursionlimit()
    path.write_bytes(b'{"a":' * 50_000)
    with pytest.raises(RecordError, match="nested too deeply"):
        JsonlSource(path)[0]
    assert sys.getrecursionlimit() == limit


# Files that are one array


def test_an_array_of_objects_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff[\n {"n": 1},\n 7,\n {"n": 2}\n]')
    source = JsonArraySource(path)
    assert (len(source), source[0], source[-1]) == (3, {"n": 1}, {"n": 2})
    with pytest.raises(RecordError, match=r"a\.json\[1\]: a record is an object"):
        source[1]
    assert pickle.loads(pickle.dumps(source))[2] == {"n": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [(b'[{"n": 1},\n {"n" 2}]', "line 2, column 7"), (b"{}", "no array"), (b"[\xff]", "not valid UTF-8 at byte 1")],
)
def test_a_bad_array_is_an_error(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=words):
        len(JsonArraySource(path))
