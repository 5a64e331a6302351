"""Batches of equal lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swissarmy.data.loading.bucketing import bucket
from swissarmy.data.source import DataError


@given(lengths=st.lists(st.integers(1, 50), max_size=60), batch_size=st.integers(1, 9), key=st.integers(0, 2**64 - 1))
def test_it_is_a_permutation_into_batches_that_are_ranges_of_length(
    lengths: list[int], batch_size: int, key: int
) -> None:
    order = bucket(lengths, batch_size, key)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    ordered = [lengths[index] for index in order]
    assert order.tolist() == bucket(np.array(lengths, dtype=np.int32), batch_size, key).tolist()
    whole = len(lengths) // batch_size * batch_size
    batches = sorted(ordered[start : start + batch_size] for start in range(0, whole, batch_size))
    assert [length for batch in batches for length in batch] + sorted(ordered[whole:]) == sorted(lengths)


def test_batches_come_in_another_order_for_another_key() -> None:
    lengths = list(range(64))
    orders = {tuple(bucket(lengths, 8, key)[::8].tolist()) for key in range(20)}
    assert len(orders) > 15
    assert all(sorted(order) == list(range(0, 64, 8)) for order in orders)


def test_samples_of_one_length_keep_their_order() -> None:
    assert bucket([5, 3, 5, 3], 4, 0).tolist() == [1, 3, 0, 2]


def test_what_fills_no_batch_comes_last() -> None:
    assert bucket([9, 1, 5, 3, 7], 2, 0)[-1] == 0


def test_padding_shrinks() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(5, 1, size=512)).astype(np.int64)

    def padding(order: np.ndarray[tuple[int], np.dtype[np.int64]]) -> int:
        return int((lengths[order].reshape(-1, 16).max(axis=1) * 16).sum() - lengths.sum())

    assert padding(bucket(lengths, 16, 0)) < padding(np.arange(512)) / 5


def test_a_batch_has_at_least_one_sample() -> None:
    with pytest.raises(DataError, match="batch_size=0"):
        bucket([1], 0, 0)
