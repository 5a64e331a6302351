"""Token files: what is written is read back, and nothing else is read."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swissarmy.data.source import DataError, Source
from swissarmy.data.sources.token_file import TokenFile, write_token_file
from swissarmy.data.sources.tokens import TokenDocuments, TokenWindows

DOCUMENTS = [[1, 2, 3], [], [9], [4, 5, 6, 7, 8]]


def write(path: Path, documents: Sequence[Sequence[int]] = DOCUMENTS, vocab_size: int = 10) -> Path:
    with write_token_file(path, vocab_size=vocab_size, made_of="test") as writer:
        for index, ids in enumerate(documents):
            writer.add(np.array(ids, dtype=np.int64), where=f"document {index}")
    return path


@given(
    documents=st.lists(st.lists(st.integers(0, 70_000), max_size=9), max_size=9),
    vocab_size=st.sampled_from([65_536, 65_537, 100_000, 1 << 32]),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_round_trip(tmp_path: Path, documents: list[list[int]], vocab_size: int) -> None:
    documents = [[number % vocab_size for number in ids] for ids in documents]
    file = TokenFile(write(tmp_path / "a.tokens", documents, vocab_size))
    file.verify()
    assert [file.document(index).tolist() for index in range(len(file))] == documents
    assert file.header.tokens == sum(map(len, documents))
    assert file.header.dtype == ("uint16" if vocab_size == 65_536 else "uint32")
    assert file.document(0).dtype == np.int64 if documents else True


def test_a_file_made_of_parts_is_the_file_made_at_once(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole")
    parts = [write(tmp_path / name, part) for name, part in (("a", DOCUMENTS[:1]), ("b", DOCUMENTS[1:]))]
    with write_token_file(tmp_path / "joined", vocab_size=10, made_of="test") as writer:
        for part in parts:
            writer.append(TokenFile(part))
    assert (tmp_path / "joined").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("bad", [-1, 10, 1 << 40])
def test_an_id_outside_the_vocabulary_is_named_and_nothing_is_left(tmp_path: Path, bad: int) -> None:
    with pytest.raises(DataError, match=f"document 1: token id {bad} is outside the vocabulary of 10"):
        write(tmp_path / "a.tokens", [[1], [2, bad]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab_size", [0, -1, (1 << 32) + 1])
def test_a_vocabulary_without_ids_or_with_too_many_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(DataError, match=f"vocab_size={vocab_size}"):
        write(tmp_path / "a.tokens", [], vocab_size)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    whole = path.read_bytes()
    for place in [*range(300), *range(4096, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            file = TokenFile(path)
            file.verify()
        except DataError as error:
            assert "a.tokens" in str(error)  # noqa: PT017
        else:  # in the header: a name, or how many were left out
            assert place < 4096
            assert [file.document(index).tolist() for index in range(len(file))] == DOCUMENTS


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"format": "swissarmy tokens 1"}', b"\xff" * 5000, b"x" * 4096, b'{"format": 1}']
)
def test_what_is_no_token_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tokens").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tokens is no token file; `sat data tokenize` makes one"):
        TokenFile(tmp_path / "a.tokens")


@pytest.mark.parametrize(
    "change", [b'"tokens": 9', b'"tokens": 1e99', b'"tokens": -9', b'"tokens": true', b'"documents": 3']
)
def test_a_header_is_not_believed(tmp_path: Path, change: bytes) -> None:
    path = write(tmp_path / "a.tokens")
    key = change.split(b":")[0]
    data = path.read_bytes()
    old = data[data.index(key) : data.index(b",", data.index(key))]
    longer = len(change) - len(old)
    changed = data.replace(old, change, 1) if old != change else data.replace(old, key + b": 99999999999", 1)
    path.write_bytes(changed[: 4096 + max(longer, 0)].rstrip()[:4096].ljust(4096) + data[4096:])
    with pytest.raises(DataError, match=r"a\.tokens"):
        TokenFile(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"bytes and should have .* for 9 tokens in 4 documents"):
        TokenFile(path)


# As sources


def test_documents_are_records(tmp_path: Path) -> None:
    source = TokenDocuments(write(tmp_path / "a.tokens"))
    assert isinstance(source, Source)
    assert [record["input_ids"].tolist() for record in source] == DOCUMENTS
    assert source.where(-1) == f"{tmp_path}/a.tokens, document 3"
    assert source.token_counts().tolist() == [3, 0, 1, 5]
    assert pickle.loads(pickle.dumps(source))[2]["input_ids"].tolist() == [9]
    assert source.fingerprint == TokenDocuments(write(tmp_path / "b.tokens")).fingerprint
    assert source.fingerprint != TokenDocuments(write(tmp_path / "c.tokens", DOCUMENTS[:2])).fingerprint


@pytest.mark.parametrize(
    ("length", "stride", "want"),
    [
        (4, None, [[1, 2, 3, 9], [4, 5, 6, 7]]),
        (4, 3, [[1, 2, 3, 9], [9, 4, 5, 6]]),
        (3, None, [[1, 2, 3], [9, 4, 5], [6, 7, 8]]),
        (9, 1, [[1, 2, 3, 9, 4, 5, 6, 7, 8]]),
        (10, None, []),
        (1, 8, [[1], [8]]),
    ],
)
def test_windows_run_over_the_whole_row(tmp_path: Path, length: int, stride: int | None, want: list[list[int]]) -> None:
    source = TokenWindows(write(tmp_path / "a.tokens"), length, stride)
    assert len(source) == len(want)
    assert [record["input_ids"].tolist() for record in source] == want
    if want:
        assert source[0]["input_ids"].dtype == np.int64
        first = (len(want) - 1) * (stride or length)
        assert source.where(-1) == f"{tmp_path}/a.tokens, tokens {first} to {first + length - 1}"


def test_windows_of_nothing_are_refused_and_the_cut_is_in_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    for length, stride in ((0, None), (2, 0)):
        with pytest.raises(DataError, match="must be at least 1"):
            TokenWindows(path, length, stride)
    prints = {TokenWindows(path, length, stride).fingerprint for length in (2, 3) for stride in (1, 2)}
    assert len(prints) == 4
