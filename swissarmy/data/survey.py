"""What is in a source, found by reading all of it: bad records, fields, lengths, tokens and duplicates."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import numpy.typing as npt

from swissarmy.data.samples.examples import length_of
from swissarmy.data.source import RecordError, Source
from swissarmy.data.sources.wrapped import content_hash

Numbers = npt.NDArray[np.int64]
Encode = Callable[[Mapping[str, Any], str], Mapping[str, Any]]
"""From a record, and where it stands, to a sample."""


@final
@dataclass(kw_only=True)
class Survey:
    """What was found in one source."""

    records: int = 0
    """All of them, bad ones included."""
    bad: dict[int, str] = field(default_factory=dict)
    """What is wrong with each bad record, beginning with where it stands, by its number."""
    fields: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many records have a field of this name and type."""
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    """Of each good record, in tokens if they are known, otherwise in characters; none for records without text."""
    in_tokens: bool = False
    """Whether that is tokens."""
    characters: int = 0
    """Of all text."""
    uses: Counter[int] = field(default_factory=Counter)
    """How often each token id occurs."""

    def add(self, record: Mapping[str, Any], where: str, encode: Encode | None) -> None:
        """Take a good record in.

        Raises:
            RecordError: it cannot be encoded, and is bad after all.
        """
        sample = record if encode is None else encode(record, where)
        characters = sum(map(len, texts_of(record)))
        self.in_tokens = self.in_tokens or "input_ids" in sample
        if "input_ids" in sample:
            self.lengths.append(length_of(sample))
            self.uses.update(np.asarray(sample["input_ids"]).tolist())
        elif characters:
            self.lengths.append(characters)
        self.characters += characters
        self.fields.update((name, type(value).__name__) for name, value in record.items())


@final
@dataclass
class Duplicates:
    """Finds equal records by a hash of 8 bytes each."""

    hashes: "array[int]" = field(default_factory=lambda: array("Q"))

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the next record in."""
        self.hashes.append(int(content_hash(record)[:16], 16))

    def pairs(self) -> list[tuple[int, int]]:
        """For each record that repeats another, the number of the first of its kind and its own."""
        hashes = np.frombuffer(self.hashes, np.uint64) if self.hashes else np.empty(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        repeats = np.concatenate([[False], hashes[order][1:] == hashes[order][:-1]])[: len(order)]
        first = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))
        pairs = zip(order[first[repeats]].tolist(), order[repeats].tolist(), strict=True)
        return sorted(pairs, key=lambda pair: pair[1])


def survey(
    source: Source, *, encode: Encode | None = None, duplicates: Duplicates | None = None, tick: Callable[[], None]
) -> Survey:
    """Read every record.

    Args:
        source: what to read.
        encode: makes samples, to find out about tokens.
        duplicates: takes in the good records, in their order.
        tick: is called after each record.
    """
    found = Survey(records=len(source))
    for index in range(len(source)):
        try:
            record = source[index]
            found.add(record, source.where(index), encode)
        except RecordError as error:
            found.bad[index] = str(error)
        else:
            if duplicates is not None:
                duplicates.add(record)
        tick()
    return found


def texts_of(value: object) -> Iterator[str]:
    """Every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def summary(lengths: Sequence[int]) -> dict[str, int | float]:
    """The total, the mean, and what so many hundredths of the lengths do not exceed; empty for none."""
    if not lengths:
        return {}
    values = np.asarray(lengths)
    least, *middle, most = np.percentile(values, [0, 25, 50, 75, 95, 99, 100], method="inverted_cdf").tolist()
    hundredths = dict(zip(("25%", "50%", "75%", "95%", "99%"), middle, strict=True))
    return {"total": int(values.sum()), "mean": float(values.mean()), "min": least, **hundredths, "max": most}


def histogram(lengths: Sequence[int], bins: int = 16) -> list[tuple[int, int, int]]:
    """`(from, up to and including, how many)`: at most so many ranges, each by the same factor longer."""
    if not lengths:
        return []
    values = np.asarray(lengths)
    edges = np.geomspace(max(1, values.min()), values.max() + 1, bins + 1)
    starts = np.unique(np.append(np.floor(edges[:-1]).astype(np.int64), values.min()))
    counts = np.diff(np.append(np.searchsorted(np.sort(values), starts), len(values)))
    ends = np.append(starts[1:] - 1, values.max())
    return list(zip(starts.tolist(), ends.tolist(), counts.tolist(), strict=True))
