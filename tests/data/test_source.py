"""Fingerprints, numbers and fields: what all sources share."""

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from swissarmy.data.source import DataError, RecordError, check_index, digest, field_of, file_fingerprint

LARGE = 3 << 20


def test_a_fingerprint_is_of_the_content_and_not_of_the_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    assert file_fingerprint(tmp_path / "a") == file_fingerprint(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"sAme")
    assert file_fingerprint(tmp_path / "a") != file_fingerprint(tmp_path / "b")


@pytest.mark.parametrize("place", [0, LARGE // 2, LARGE - 1])
def test_a_large_file_shows_changes_at_its_ends_and_in_its_sampled_blocks(tmp_path: Path, place: int) -> None:
    path = tmp_path / "large"
    content = bytearray(LARGE)
    path.write_bytes(content)
    before = file_fingerprint(path)
    # a block begins just before each 63rd part of the file
    place = place if place in (0, LARGE - 1) else (LARGE - (1 << 14)) * 31 // 63 + 5
    content[place] = 1
    path.write_bytes(content)
    assert file_fingerprint(path) != before


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path, content = tmp_path / "small", bytearray(1 << 20)
    path.write_bytes(content)
    before = file_fingerprint(path)
    for place in range(0, len(content), 99_991):
        content[place] = 1
        path.write_bytes(content)
        assert file_fingerprint(path) != before
        content[place] = 0


@pytest.mark.parametrize("length", [10, LARGE])
def test_the_fingerprint_of_a_beginning_is_that_of_the_file_before_it_grew(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * length)
    before = file_fingerprint(path)
    with path.open("ab") as file:
        file.write(b"more")
    assert file_fingerprint(path) != before
    assert file_fingerprint(path, size=length) == before


def test_a_digest_is_the_same_in_every_process() -> None:
    code = "from swissarmy.data.source import digest; print(digest('a', 1, {'x': [0.5, None]}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert digest("a", 1, {"x": [0.5, None]}) == other
    assert other == hashlib.blake2b(b'["a", 1, {"x": [0.5, null]}]', digest_size=16).hexdigest()
    assert digest("a", 1) != digest("a", "1")


def test_numbers_count_from_both_ends_and_stop() -> None:
    assert [check_index(index, 3) for index in (0, 2, -1, -3)] == [0, 2, 2, 0]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"record {index} of 3"):
            check_index(index, 3)


def test_a_missing_field_names_those_that_there_are() -> None:
    assert field_of({"text": None}, "text", "a:1") is None
    with pytest.raises(RecordError, match=r"^a:1: there is no field 'txt'\. Did you mean 'text'\? Its fields: 'text'"):
        field_of({"text": "x", "id": 1}, "txt", "a:1")


def test_a_record_error_survives_the_way_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(RecordError("a.jsonl:3: bad")))
    assert isinstance(error, DataError)
    assert str(error) == "a.jsonl:3: bad"
