"""Shuffles without a list: bijections, the same everywhere, and as random as a shuffle should be."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.data.order.permutation import Permutation, derive_key, permute

GOLDEN_10 = [2, 5, 7, 4, 0, 9, 6, 3, 8, 1]
GOLDEN_LONG = [925092835723, 684729270427, 961130634908]
GOLDEN_KEY = 7929320714995366324
"""They were made by this code; a change of them changes the order of every run that is resumed."""

keys = st.integers(0, 2**64 - 1)


def shuffled(length: int, key: int) -> list[int]:
    return Permutation(length, key)[np.arange(length)].tolist()


@settings(max_examples=60)
@given(st.integers(0, 3000), keys)
@example(0, 0)
@example(1, 5)
@example(2, 2**64 - 1)
def test_it_is_a_bijection_for_any_length_and_key(length: int, key: int) -> None:
    permutation = Permutation(length, key)
    assert sorted(shuffled(length, key)) == list(range(length))
    assert permutation.place_of(permutation[np.arange(length)]).tolist() == list(range(length))


@settings(max_examples=60)
@given(st.integers(1, 2**62), keys, st.data())
def test_it_is_inverted_at_any_place_of_a_range_too_long_to_list(length: int, key: int, data: st.DataObject) -> None:
    permutation = Permutation(length, key)
    place = data.draw(st.integers(0, length - 1))
    assert 0 <= permutation[place] < length
    assert permutation.place_of(permutation[place]) == place


def test_orders_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert shuffled(10, 0) == GOLDEN_10
    assert Permutation(10**12, 7)[np.array([0, 1, 10**12 - 1])].tolist() == GOLDEN_LONG
    assert derive_key(1, "order", 2) == GOLDEN_KEY


def test_keys_of_different_things_differ() -> None:
    assert len({derive_key(1, 23), derive_key(12, 3), derive_key("1", 23), derive_key("123"), derive_key(123)}) == 5


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_of_a_few_is_about_equally_likely(length: int) -> None:
    number = 6000
    of_each_key = np.array([derive_key(key) for key in range(number)], np.uint64)
    columns = [permute(np.full(number, place), length, of_each_key) for place in range(length)]
    counts = Counter(zip(*(column.tolist() for column in columns), strict=True))
    expected = number / math.factorial(length)
    degrees = math.factorial(length) - 1
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == math.factorial(length)
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("length", [7, 30, 100, 1000])
def test_every_index_is_about_equally_likely_at_every_place(length: int) -> None:
    number = 3000
    of_each_key = np.array([derive_key(key) for key in range(number)], np.uint64)
    for place in (0, 1, length // 2, length - 1):
        counts = np.bincount(permute(np.full(number, place), length, of_each_key), minlength=length)
        chi_square = ((counts - number / length) ** 2 / (number / length)).sum()
        assert chi_square < length - 1 + 4 * math.sqrt(2 * (length - 1))


def test_neighbours_are_torn_apart() -> None:
    order = Permutation(1_000_000, 3)[np.arange(20_000)]
    assert (np.abs(np.diff(order)) == 1).sum() < 5
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.04


@pytest.mark.parametrize("length", [2, 10, 100])
def test_other_keys_give_other_orders(length: int) -> None:
    assert len({tuple(shuffled(length, key)) for key in range(200)}) == min(200, math.factorial(length))


def test_it_takes_no_memory() -> None:
    assert sys.getsizeof(Permutation(2**62, 1).__dict__) == sys.getsizeof(Permutation(2, 1).__dict__)


@pytest.mark.parametrize("place", [-1, 10])
def test_a_place_outside_is_an_error(place: int) -> None:
    with pytest.raises(IndexError, match=r"range\(10\)"):
        Permutation(10, 0)[place]


@pytest.mark.parametrize("length", [-1, 2**62 + 1])
def test_a_length_that_cannot_be_is_refused(length: int) -> None:
    with pytest.raises(ConfigError, match=f"length={length}"):
        Permutation(length, 0)
