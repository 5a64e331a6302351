"""Streams over iterables: they resume where they stood, pass after pass."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.stream import Stream, StreamSource


class Plain:
    """Five records each time; counts how many were asked for."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, int]]:
        for number in range(5):
            self.read += 1
            yield {"n": number}


class WithState(Plain):
    """Begins every pass where it was once told to, as some do."""

    def __init__(self) -> None:
        super().__init__()
        self.start = self.place = 0

    def __iter__(self) -> Iterator[dict[str, int]]:
        for number in range(self.start, 5):
            self.read += 1
            self.place = number + 1
            yield {"n": number}

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = self.place = state["place"]


def take(stream: Stream, count: int) -> list[int]:
    """So many records, over the end of a pass."""
    taken: list[int] = []
    while len(taken) < count:
        for record in stream:
            taken.append(record["n"])
            if len(taken) == count:
                break
    return taken


@pytest.mark.parametrize("kind", [Plain, WithState])
@pytest.mark.parametrize("before", [0, 1, 4, 5, 7, 12])
def test_a_stream_resumes_after_any_record(kind: Any, before: int) -> None:
    whole = take(Stream(kind()), 20)
    assert whole == [0, 1, 2, 3, 4] * 4
    first = Stream(kind())
    assert isinstance(first, StreamSource)
    assert take(first, before) == whole[:before]
    state = json.loads(json.dumps(first.state_dict()))
    again = Stream(kind())
    again.load_state_dict(state)
    assert take(again, 20 - before) == whole[before:]


def test_an_iterable_with_a_state_reads_nothing_twice() -> None:
    first, inner = Stream(WithState()), WithState()
    take(first, 3)
    again = Stream(inner)
    again.load_state_dict(first.state_dict())
    assert take(again, 2) == [3, 4]
    assert inner.read == 2


def test_where_names_the_pass_and_the_record() -> None:
    stream = Stream(Plain(), name="numbers")
    take(stream, 7)
    assert stream.where() == "numbers, pass 1, record 1"


def test_a_generator_is_refused() -> None:
    with pytest.raises(DataError, match="generator is an iterator, which is read once"):
        Stream({"n": n} for n in range(3))


def test_records_must_be_mappings() -> None:
    with pytest.raises(RecordError, match="letters, pass 0, record 0: a record is a mapping, not str"):
        next(iter(Stream("abc", name="letters")))  # type: ignore[arg-type]


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(DataError, match=r"no 'given'\. Did you mean 'give'"):
        Stream(Plain()).load_state_dict({"pass": 0, "give": 1, "iterable": None})
    with pytest.raises(DataError, match="another kind of stream"):
        Stream(Plain()).load_state_dict(Stream(WithState()).state_dict())


def test_the_fingerprint_is_what_the_caller_says() -> None:
    said = [
        Stream(Plain(), name=name, fingerprint=print_).fingerprint
        for name, print_ in (("a", "1"), ("b", "1"), ("a", "2"))
    ]
    assert said[0] == said[1] != said[2]
