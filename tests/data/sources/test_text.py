"""Plain text by lines, paragraphs and files."""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources import record_index
from swissarmy.data.sources.text import TextSource


def paragraphs_of(text: str) -> list[tuple[int, str]]:
    """The reference: runs of lines that are not blank, and the line on which each begins."""
    found: list[tuple[int, list[str]]] = []
    goes_on = False
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \t\r"):
            goes_on = False
        elif goes_on:
            found[-1][1].append(line)
        else:
            found.append((number, [line]))
            goes_on = True
    return [(number, "\n".join(lines).rstrip()) for number, lines in found]


LINE = st.sampled_from(["", " ", "\t ", "a", " b", "word word", "ä", "\r", "c\r"])


@given(lines=st.lists(LINE, max_size=12), chunk=st.sampled_from([1, 2, 5, 1 << 24]))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_and_paragraphs_are_those_of_the_reference(tmp_path: Path, lines: Sequence[str], chunk: int) -> None:
    path, text = tmp_path / "a.txt", "\n".join(lines)
    path.write_bytes(text.encode())
    with patch.object(record_index, "_CHUNK", chunk):
        paragraphs, by_line = TextSource(path, "paragraph"), TextSource(path)
        want = paragraphs_of(text)
        assert [record["text"] for record in paragraphs] == [paragraph for _, paragraph in want]
        assert [paragraphs.where(i) for i in range(len(paragraphs))] == [f"{path}:{number}" for number, _ in want]
        filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip(" \t\r")]
        assert [record["text"] for record in by_line] == [line.removesuffix("\r") for _, line in filled]
        assert [by_line.where(i) for i in range(len(by_line))] == [f"{path}:{number}" for number, _ in filled]


def test_a_paragraph_that_grows_is_read_to_its_new_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with patch.object(record_index, "_WORTH_KEEPING", 0):
        path.write_bytes(b"one\n\ntwo\n")
        assert len(TextSource(path, "paragraph")) == 2
        with path.open("ab") as file:
            file.write(b"more\n\nthree")
        source = TextSource(path, "paragraph")
        assert list(source) == [{"text": "one"}, {"text": "two\nmore"}, {"text": "three"}]
        assert source.where(2) == f"{path}:6"


def test_a_whole_file_is_one_record_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\n one \r\n\ntwo\n".encode())
    assert list(TextSource(path, "file")) == [{"text": "\n one \r\n\ntwo\n"}]
    path.write_bytes(b" \n")
    assert len(TextSource(path, "file")) == 0


@pytest.mark.parametrize(("unit", "line"), [("line", 4), ("paragraph", 4), ("file", 4)])
def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path, unit: str, line: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\ngood\nb\xe9d\n")
    source = TextSource(path, unit)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=rf"a\.txt:{line}: not valid UTF-8"):
        source[len(source) - 1]


def test_the_unit_is_part_of_the_fingerprint_and_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    assert TextSource(path).fingerprint != TextSource(path, "paragraph").fingerprint
    with pytest.raises(DataError, match="unit='lines'"):
        TextSource(path, "lines")  # type: ignore[arg-type]
