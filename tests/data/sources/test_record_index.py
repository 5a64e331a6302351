"""The index of a text file: kept beside it, and trusted only while it fits."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from swissarmy.data.source import file_fingerprint
from swissarmy.data.sources import record_index
from swissarmy.data.sources.record_index import Positions, RecordIndex, open_index, scan_lines


@pytest.fixture(autouse=True)
def keep_small_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record_index, "_WORTH_KEEPING", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Opened:
    """Opens a file's index and counts the bytes that had to be scanned for it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, kind: str = "lines") -> tuple[RecordIndex, int]:
        scanned: list[int] = []

        def scan(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[Positions, Positions]]:
            scanned.append(stop - start)
            return scan_lines(file, start, stop)

        index = open_index(self.path, kind=kind, scan=scan, content=file_fingerprint(self.path))
        return index, sum(scanned)

    def lines(self) -> list[tuple[int, int]]:
        """Start and line of each record."""
        index, _ = self()
        return [(index.span(record)[0], index.line(record)) for record in range(len(index))]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    path = tmp_path / "data" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"one\n\ntwo\nthree\n")
    return Opened(path)


LINES = [(0, 1), (5, 3), (9, 4)]


def kept(opened: Opened) -> Path:
    return opened.path.with_name("a.jsonl.sat-index")


def test_it_is_made_once_and_then_read(opened: Opened) -> None:
    assert opened()[1] == 15
    assert kept(opened).exists()
    assert opened()[1] == 0
    assert opened.lines() == LINES
    assert sorted(os.listdir(opened.path.parent)) == ["a.jsonl", "a.jsonl.sat-index"]


def test_a_small_file_leaves_nothing_beside_it(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_index, "_WORTH_KEEPING", 1 << 20)
    assert opened.lines() == LINES
    assert os.listdir(opened.path.parent) == ["a.jsonl"]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"uno\n\ntwo\nthree\n"),  # of the same size
        lambda path: path.write_bytes(b"1\n"),
        lambda path: path.write_bytes(b"uno\n\ntwo\nthree\nfour\n"),  # longer, and changed before
        lambda path: os.utime(path, ns=(1, 1)),
    ],
)
def test_a_file_that_changed_is_scanned_again(opened: Opened, change: Any) -> None:
    opened()
    change(opened.path)
    os.utime(opened.path, ns=(2, 2))
    index, scanned = opened()
    assert scanned == opened.path.stat().st_size
    assert index.size == scanned
    assert opened()[1] == 0


def test_what_is_appended_is_all_that_is_scanned(opened: Opened) -> None:
    opened()
    with opened.path.open("ab") as file:
        file.write(b"\n \nfour")
    _, scanned = opened()
    assert scanned == len(b"three\n\n \nfour")  # the last record may have grown too
    assert opened.lines() == [*LINES, (18, 7)]
    with opened.path.open("ab") as file:
        file.write(b"teen\nfive\n")
    assert opened()[1] == len(b"fourteen\nfive\n")
    assert opened.lines() == [*LINES, (18, 7), (27, 8)]


def test_an_index_of_another_kind_is_not_used(opened: Opened) -> None:
    opened("lines")
    assert opened("rows")[1] == 15
    assert opened("rows")[1] == 0


def test_any_flipped_bit_in_it_is_found(opened: Opened) -> None:
    opened()
    whole = kept(opened).read_bytes()
    rng = np.random.default_rng(0)
    for place in {0, 20, 4091, 4095, 4096, len(whole) - 1, *rng.integers(0, len(whole), 50).tolist()}:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        kept(opened).write_bytes(damaged)
        index, scanned = opened()
        assert (scanned, index.starts.tolist()) == (15, [0, 5, 9])


@pytest.mark.parametrize("content", [b"", b"x", b"{}".ljust(4096), b"\0" * 4096, b"[1]".ljust(5000), b"x" * 4103])
def test_rubbish_in_its_place_is_replaced(opened: Opened, content: bytes) -> None:
    kept(opened).write_bytes(content)
    assert opened()[1] == 15
    assert opened()[1] == 0


def test_a_truncated_one_is_replaced(opened: Opened) -> None:
    opened()
    kept(opened).write_bytes(kept(opened).read_bytes()[:-8])
    assert opened()[1] == 15


def refuse(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_in_a_folder_that_cannot_be_written_it_goes_to_the_cache_folder(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = record_index.replace_file
    monkeypatch.setattr(
        record_index, "replace_file", lambda path: refuse() if path.parent == opened.path.parent else real(path)
    )
    assert opened()[1] == 15
    assert os.listdir(opened.path.parent) == ["a.jsonl"]
    assert len(os.listdir(tmp_path / "cache" / "swissarmy" / "index")) == 1
    assert opened()[1] == 0
    with opened.path.open("ab") as file:
        file.write(b"four\n")
    assert opened()[1] == len(b"three\nfour\n")


def test_where_nothing_can_be_written_it_is_kept_in_memory(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_index, "replace_file", refuse)
    assert opened.lines() == LINES
    assert opened()[1] == 15


def test_a_header_says_what_it_is(opened: Opened) -> None:
    opened()
    header = json.loads(kept(opened).read_bytes()[:4092])
    assert (header["kind"], header["size"], header["records"], header["skips"]) == ("lines", 15, 3, 1)


def test_a_million_lines_take_sixteen_bytes_each_at_most(opened: Opened) -> None:
    opened.path.write_bytes(b"{}\n" * 1_000_000)
    index, _ = opened()
    assert len(index) == 1_000_000
    assert index.span(999_999) == (2_999_997, 3_000_000)
    assert kept(opened).stat().st_size == 4096 + 8_000_000
