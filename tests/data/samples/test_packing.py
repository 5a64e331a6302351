"""Rows of documents: each token once, nothing over the edge, hardly a gap, and the same every time."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swissarmy.data.samples.encoders import TokensEncoder
from swissarmy.data.samples.examples import Examples
from swissarmy.data.samples.packing import Packed, _placements, best_fit
from swissarmy.data.source import DataError, Source
from tests.data.tiny_data import Tokens

LENGTHS = [5, 3, 12, 1, 4, 4, 2, 8, 6, 3, 9]


def packed(lengths: list[int] = LENGTHS, length: int = 8, **options: Any) -> Packed:
    return Packed(Examples(Tokens(lengths), TokensEncoder()), length, **options)


def documents_of(row: dict[str, Any]) -> list[list[int]]:
    return [row["input_ids"][row["document_ids"] == number].tolist() for number in range(row["document_ids"].max() + 1)]


# Rows


def test_a_row_says_where_its_documents_are() -> None:
    rows = packed()
    assert isinstance(rows, Source)
    for row in rows:
        assert len(row["input_ids"]) <= 8
        assert {len(value) for value in row.values()} == {len(row["input_ids"])}
        assert (np.diff(row["document_ids"]) >= 0).all()
        starts = np.flatnonzero(np.diff(row["document_ids"], prepend=-1))
        assert (row["position_ids"] == np.arange(len(row["input_ids"])) - starts[row["document_ids"]]).all()
        assert (row["loss_mask"] == (row["position_ids"] > 0)).all()
        assert all(value.dtype == np.int64 for name, value in row.items() if name != "loss_mask")


def test_every_token_is_in_one_row_and_pieces_stay_whole() -> None:
    documents = [document for row in packed() for document in documents_of(row)]
    assert all(np.diff(document).max(initial=1) == 1 for document in documents)
    tokens = sorted(token for document in documents for token in document)
    assert tokens == [1000 * number + token for number, length in enumerate(LENGTHS) for token in range(length)]


def test_masked_tokens_stay_masked() -> None:
    source = Tokens([4, 4])
    for record in source.records:
        assert record is not None
        record["loss_mask"] = [1, 0, 1, 1]  # type: ignore[index]
    [row] = Packed(Examples(source, TokensEncoder()), 8)
    assert row["loss_mask"].tolist() == [False, False, True, True] * 2


def test_long_documents_can_be_left_out() -> None:
    tokens = [token for row in packed(too_long="drop") for token in row["input_ids"].tolist()]
    assert {token // 1000 for token in tokens} == {number for number, length in enumerate(LENGTHS) if length <= 8}


def test_a_row_says_which_records_it_has() -> None:
    rows = packed([3, 5], 8)
    assert len(rows) == 1
    assert sorted(rows.where(0).split(" + ")) == ["a.jsonl:1", "a.jsonl:2"]
    assert rows.where(-1) == rows.where(0)
    with pytest.raises(IndexError):
        rows[1]


def test_reading_a_row_reads_its_documents_and_no_others() -> None:
    source = Tokens([3] * 100)
    rows = Packed(Examples(source, TokensEncoder()), 6)
    assert source.reads == 100
    assert len(rows[40]["input_ids"]) == 6
    assert source.reads == 102


# The same every time


def test_packing_is_a_pure_function_of_data_and_key() -> None:
    def contents(key: int) -> list[list[int]]:
        return [row["input_ids"].tolist() for row in packed([4] * 40, key=key)]

    assert contents(3) == contents(3)
    assert contents(3) != contents(4)
    assert packed(key=3).fingerprint == packed(key=3).fingerprint
    variants = [packed(), packed(key=1), packed(length=9), packed(too_long="drop"), packed([*LENGTHS, 1])]
    assert len({each.fingerprint for each in variants}) == 5


def test_rows_of_a_fixed_example_never_change() -> None:
    """Golden: a checkpoint resumes in the middle of these rows."""
    rows = [row["input_ids"].tolist() for row in packed([3, 5, 2, 6, 4, 4], key=7)]
    assert rows == GOLDEN


GOLDEN = [
    [2000, 2001, 3000, 3001, 3002, 3003, 3004, 3005],
    [0, 1, 2, 1000, 1001, 1002, 1003, 1004],
    [4000, 4001, 4002, 4003, 5000, 5001, 5002, 5003],
]


def test_a_kept_index_is_read_instead_of_the_data(tmp_path: Path) -> None:
    source = Tokens(LENGTHS)
    first = Packed(Examples(source, TokensEncoder()), 8, cache_folder=tmp_path)
    reads = source.reads
    again = Packed(Examples(source, TokensEncoder()), 8, cache_folder=tmp_path)
    assert source.reads == reads == len(LENGTHS)
    assert all(isinstance(array, np.memmap) for array in again.index)
    for row, kept in zip(first, again, strict=True):
        assert row["input_ids"].tolist() == kept["input_ids"].tolist()


def test_it_travels_to_a_worker_without_what_is_on_disk(tmp_path: Path) -> None:
    lengths = [1, 2, 3, 4] * 500
    kept, held = packed(lengths, cache_folder=tmp_path), packed(lengths)
    assert len(pickle.dumps(held)) - len(pickle.dumps(kept)) > 8 * 2000
    for rows in (kept, held):
        twin = pickle.loads(pickle.dumps(rows))
        assert len(twin) == len(rows)
        assert twin[5]["input_ids"].tolist() == rows[5]["input_ids"].tolist()


# What cannot be done


def test_nothing_to_pack_is_an_error() -> None:
    with pytest.raises(DataError, match="of 2 documents none is left: each is empty or has more than 8 tokens"):
        packed([9, 10], too_long="drop")


def test_documents_that_grew_since_they_were_counted_are_an_error() -> None:
    samples = Examples(Tokens([5, 5]), TokensEncoder())
    rows = Packed(samples, 8, lengths=np.array([4, 4], dtype=np.int32))
    with pytest.raises(DataError, match=r"10 tokens in a row of 8: the data changed"):
        rows[0]


# Best fit


def greedy_best_fit(sizes: list[int], length: int) -> list[int]:
    """Best-fit-decreasing one piece at a time: the room that is left in each row."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= size
        else:
            rooms.append(length - size)
    return rooms


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=60), key=st.integers(0, 2**64 - 1))
def test_the_histogram_way_fills_rows_as_one_piece_at_a_time_would(sizes: list[int], key: int) -> None:
    order, row_starts = best_fit(np.array(sizes, dtype=np.int64), 30, key)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    rooms = [30 - sum(sizes[piece] for piece in order[start:stop]) for start, stop in pairwise(row_starts)]
    assert sorted(rooms) == sorted(greedy_best_fit(sizes, 30))


def test_rows_of_2048_are_99_percent_full_on_documents_as_they_come() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(5.8, 1.2, size=20_000)).astype(np.int64).clip(1, 2048)
    order, row_starts = best_fit(lengths, 2048, key=0)
    used = np.add.reduceat(lengths[order], row_starts[:-1])
    assert used.max() <= 2048
    assert used.sum() / (2048 * len(used)) > 0.99


def test_the_work_grows_with_the_lengths_and_not_with_the_documents() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(5.8, 1.2, size=20_000)).astype(np.int64).clip(1, 2048)
    counts = np.bincount(lengths, minlength=2049)
    few, many = (list(_placements((times * counts).tolist(), 2048)) for times in (1, 1000))
    assert len(many) < 2 * len(few) < len(lengths)
    placed = np.zeros(2049, dtype=np.int64)
    for placement in many:
        placed[placement.size] += placement.num_rows * placement.per_row
    assert (placed == 1000 * counts).all()
