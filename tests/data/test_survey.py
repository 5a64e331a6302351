"""What is found in a source."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swissarmy.data.sources.jsonl import JsonlSource
from swissarmy.data.survey import Duplicates, histogram, summary, survey, texts_of


def test_everything_in_a_file_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "four"}\n{\n{"text": "six ab", "n": 1}\n{"n": 2}\n')
    ticks: list[None] = []
    found = survey(JsonlSource(path), tick=lambda: ticks.append(None))
    assert (found.records, len(ticks)) == (4, 4)
    assert [(index, line.split(": ")[0]) for index, line in found.bad.items()] == [(1, f"{path}:2")]
    assert found.fields == Counter({("text", "str"): 2, ("n", "int"): 2})
    assert (found.lengths.tolist(), found.in_tokens, found.characters) == ([4, 6], False, 10)


def test_samples_are_counted_in_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "four"}\n{"text": "sixsix"}\n')
    found = survey(
        JsonlSource(path),
        encode=lambda record, where: {"input_ids": np.array([len(record["text"])] * 2)},
        tick=lambda: None,
    )
    assert (found.lengths.tolist(), found.in_tokens, found.characters) == ([2, 2], True, 10)
    assert found.uses == Counter({4: 2, 6: 2})


@given(st.lists(st.integers(0, 4), max_size=12))
def test_duplicates_are_paired_with_the_first_of_their_kind(values: list[int]) -> None:
    duplicates = Duplicates()
    for value in values:
        duplicates.add({"n": value})
    want = [(values.index(value), place) for place, value in enumerate(values) if values.index(value) < place]
    assert duplicates.pairs() == want


@given(st.lists(st.integers(0, 100_000), max_size=40))
def test_every_length_is_in_one_range_of_the_histogram(lengths: list[int]) -> None:
    ranges = histogram(lengths)
    assert len(ranges) <= 17
    for (_, end, _), (start, _, _) in pairwise(ranges):
        assert start == end + 1
    assert [count for *_, count in ranges] == [sum(a <= n <= b for n in lengths) for a, b, _ in ranges]
    assert sum(count for *_, count in ranges) == len(lengths)


def test_a_summary_is_of_values_that_occur() -> None:
    assert summary([]) == {}
    assert summary(list(range(1, 101))) == {
        "total": 5050,
        "mean": pytest.approx(50.5),
        "min": 1,
        "25%": 25,
        "50%": 50,
        "75%": 75,
        "95%": 95,
        "99%": 99,
        "max": 100,
    }


def test_texts_are_found_at_any_depth() -> None:
    assert list(texts_of({"a": "1", "b": [{"c": "2"}, 3, ("4",)], "d": None})) == ["1", "2", "4"]
