"""Splits are disjoint and complete, keep their ratios, and do not move when rows are appended."""

import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.data.order.splits import SPLITS, Split, SplitName, SplitSource

ratios = st.lists(st.sampled_from([0, 1, 2, 4, 95, 0.5, 0.25]), min_size=3, max_size=3).filter(any)


def rows(length: int, ratios: Any, which: Any, key: int = 0) -> list[int]:
    return list(Split(length, ratios, which, key))


@settings(max_examples=60)
@given(st.integers(0, 700), ratios, st.integers(0, 5))
def test_every_row_is_in_one_split(length: int, ratios: list[float], key: int) -> None:
    together = [row for which in SPLITS for row in rows(length, ratios, which, key)]
    assert sorted(together) == list(range(length))


@settings(max_examples=40)
@given(st.integers(0, 300), st.integers(0, 300), ratios)
def test_appended_rows_move_none(length: int, more: int, ratios: list[float]) -> None:
    for which in SPLITS:
        longer = set(rows(length + more, ratios, which))
        assert {row for row in longer if row < length} == set(rows(length, ratios, which))


@settings(max_examples=25)
@given(st.integers(0, 250), ratios)
def test_a_row_knows_its_split(length: int, ratios: list[float]) -> None:
    for which in SPLITS:
        split = Split(length, ratios, which)
        assert [row for row in range(length) if row in split] == sorted(split)


@pytest.mark.parametrize(("length", "sizes"), [(100, [95, 4, 1]), (1000, [950, 40, 10]), (10**12, None)])
def test_whole_periods_have_the_ratios_exactly(length: int, sizes: list[int] | None) -> None:
    assert [len(Split(length, (95, 4, 1), which)) for which in SPLITS] == (
        sizes or [length * part // 100 for part in (95, 4, 1)]
    )


def test_a_long_source_is_split_without_a_list() -> None:
    split = Split(10**15, (95, 4, 1), "test")
    assert sys.getsizeof(split._offsets) + sys.getsizeof(split._last_offsets) < 10_000
    assert all(split[index] in split for index in (0, 1, 10**12, len(split) - 1))


@settings(max_examples=40)
@given(st.integers(0, 500), ratios, st.sampled_from(SPLITS))
def test_all_rows_at_once_are_those_one_by_one(length: int, ratios: list[float], which: SplitName) -> None:
    split = Split(length, ratios, which)
    assert split.rows().tolist() == list(split)


def test_a_tiny_source_may_leave_a_split_empty() -> None:
    assert sorted(len(Split(1, (1, 1, 1), which)) for which in SPLITS) == [0, 0, 1]


def test_rows_of_a_split_are_spread_and_do_not_keep_step() -> None:
    """Data that repeats every hundred rows must not put one kind of row into the test split alone."""
    offsets = {row % 100 for row in rows(20_000, (95, 4, 1), "test")}
    assert len(offsets) > 70


def test_another_key_is_another_split() -> None:
    assert rows(1000, (9, 1, 0), "valid", 0) != rows(1000, (9, 1, 0), "valid", 1)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ((1, 2), "give three"),
        ((1, 2, 3, 4), "give three"),
        ((0, 0, 0), "all weights are 0"),
        ((-1, 1, 1), "negative"),
        (("a", 1, 1), "finite number"),
        ((1, 1e-9, 0), "finer than one in 1,000,000"),
    ],
)
def test_ratios_that_are_none_are_refused(ratios: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Split(10, ratios, "train")


class Letters:
    fingerprint = "letters"

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"letter": chr(ord("a") + index)}

    def where(self, index: int) -> str:
        return f"letters:{index}"


def test_a_split_of_a_source_is_a_source() -> None:
    sources = [SplitSource(Letters(), Split(26, (2, 1, 1), which)) for which in SPLITS]
    letters = [source[index]["letter"] for source in sources for index in range(len(source))]
    assert sorted(letters) == [chr(ord("a") + index) for index in range(26)]
    assert sources[1].where(0) == f"letters:{sources[1].split[0]}"
    assert len({source.fingerprint for source in sources}) == 3
    with pytest.raises(IndexError):
        sources[2][len(sources[2])]
