"""The order of samples: without replacement, fresh each pass, endless, and found directly."""

import math
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.data.order.blend import Blend, BlendSchedule
from swissarmy.data.order.sample_order import OneByOne, Order, Places, SampleOrder

GOLDEN = [(0, 0, 1), (0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 1, 0), (0, 1, 4), (1, 1, 2)]
"""Made by this code; a change of it changes the order of every run that is resumed."""


def visits(order: Order, start: int, number: int) -> list[tuple[int, int, int]]:
    """Part, pass and row of samples."""
    places = order.places(np.arange(start, start + number))
    return list(zip(places.parts.tolist(), places.passes.tolist(), order.rows(places).tolist(), strict=True))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 100), st.booleans())
def test_each_pass_gives_every_row_of_a_part_once(lengths: list[int], seed: int, shuffle: bool) -> None:
    order = SampleOrder(lengths, Blend(lengths), seed=seed, shuffle=shuffle)
    seen = visits(order, 0, 3 * sum(lengths))
    for part, length in enumerate(lengths):
        for turn in range(3):
            rows = [row for p, t, row in seen if (p, t) == (part, turn)]
            assert sorted(rows) == list(range(length))
            assert shuffle or rows == list(range(length))


def test_every_pass_part_and_seed_has_its_own_order() -> None:
    orders = set()
    for seed in range(3):
        seen = visits(SampleOrder([50, 50], Blend([1, 1]), seed=seed), 0, 300)
        orders |= {tuple(row for p, t, row in seen if (p, t) == (part, turn)) for part in (0, 1) for turn in range(3)}
    assert len(orders) == 18


@settings(max_examples=20)
@given(st.integers(0, 10**12))
def test_it_may_be_read_from_anywhere(start: int) -> None:
    order = SampleOrder([1000, 30], Blend([3, 1]), seed=1)
    assert visits(order, start, 60)[20:] == visits(order, start + 20, 40)


def test_the_order_is_the_same_in_every_version() -> None:
    assert visits(SampleOrder([5, 3], Blend([5, 3]), seed=7), 5, 8) == GOLDEN


def test_rows_past_the_end_of_a_pass_begin_again_in_the_same_pass() -> None:
    order = SampleOrder([5], Blend([1]), seed=7)
    twice = order.rows(Places(np.zeros(10, np.int64), np.full(10, 3), np.arange(10))).tolist()
    assert twice[:5] == twice[5:]
    assert sorted(twice[:5]) == [0, 1, 2, 3, 4]


def test_how_much_of_each_part_a_run_sees() -> None:
    uses = SampleOrder([10, 100, None], Blend([2, 1, 1])).uses(400)
    assert [use.samples for use in uses] == [200, 100, 100]
    assert [use.share for use in uses] == [0.5, 0.25, 0.25]
    assert [use.epochs for use in uses[:2]] == [20, 1]
    assert math.isnan(uses[2].epochs)


def test_a_schedule_orders_samples_too() -> None:
    order = SampleOrder([10, 10], BlendSchedule([(0, Blend([1, 0])), (15, Blend([0, 1]))]))
    assert [part for part, _, _ in visits(order, 0, 30)] == [0] * 15 + [1] * 15


def test_an_empty_part_is_refused_only_if_it_is_drawn_from() -> None:
    with pytest.raises(ConfigError, match="parts 1 are empty"):
        SampleOrder([5, 0], Blend([1, 1]))
    assert {part for part, _, _ in visits(SampleOrder([5, 0], Blend([1, 0])), 0, 50)} == {0}
    with pytest.raises(ConfigError, match="a blend of 2 parts cannot order 3"):
        SampleOrder([5, 5, 5], Blend([1, 1]))


def test_memory_does_not_grow_with_the_source() -> None:
    peaks, sizes = [], []
    for length in (10**4, 10**8, 10**15):
        tracemalloc.start()
        order = SampleOrder([length, length], Blend([2, 1]), seed=1)
        visits(order, 5 * length, 100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(sys.getsizeof(order.__dict__))
    assert max(peaks) < min(peaks) + 100_000
    assert len(set(sizes)) == 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
@settings(max_examples=30)
def test_evaluation_gives_every_row_once_in_order(lengths: list[int]) -> None:
    order = OneByOne(lengths)
    wanted = [(part, 0, row) for part, length in enumerate(lengths) for row in range(length)]
    assert visits(order, 0, order.num_samples) == wanted
