"""What a worker does: from the number of a step to a batch.

A step has one global batch: the next `global_batch_size` samples of the order. It is cut into accumulation * world_size
slices of equal size; micro-batch m of rank r is slice m * world_size + r. So the global batch is the same for every
number of ranks, and two micro-batches on one rank read what two ranks read in one.

Each sample carries its number in the run as `sample_ids`, and so does a batch that is a dict, `[b]` int64: what is done
to a sample at random is a function of it (`data/objectives`), and a report can name records.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from swissarmy.data.loading.bucketing import Bucketing, bucket
from swissarmy.data.order.permutation import derive_key
from swissarmy.data.order.sample_order import Order, Places
from swissarmy.data.source import DataError, RecordError, Source

Indices = NDArray[np.int64]
Samples = list[Mapping[str, Any]]
Collate = Callable[[Samples], Any]
OnBadRecord = Literal["error", "skip"]


_BLOCK = 1024
"""Samples: finding so many places in the order takes hardly longer than finding a few."""


class LoaderError(DataError):
    """A batch could not be made: a worker died or hung, or reading a record failed in an unforeseen way."""


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who reads what of a global batch."""

    global_batch_size: int
    """Samples of a step, over all ranks and micro-batches."""
    accumulation: int = 1
    """Micro-batches of a step on each rank."""
    rank: int = 0
    """This process."""
    world_size: int = 1
    """How many processes share the global batch."""

    def slice_of(self, micro: int, size: int) -> slice:
        """Which samples of a global batch this rank reads in a micro-batch; slices of an unfull one may be empty."""
        slices, number = self.accumulation * self.world_size, micro * self.world_size + self.rank
        return slice(size * number // slices, size * (number + 1) // slices)


class Ask(NamedTuple):
    """What the main process asks a worker for."""

    step: int
    micro: int
    streamed: Mapping[int, Mapping[str, Any]]
    """Samples that came from streams, which only the main process reads, by their place in the slice."""


class Located(NamedTuple):
    """Where the samples of a micro-batch are."""

    numbers: Indices
    """`[n]`, of the samples."""
    places: Places
    """In the order."""
    rows: Indices
    """`[n]`, which row of its part each is."""


class Fetched(NamedTuple):
    """What a worker gives back."""

    batch: Any
    skipped: list[str]
    """What was wrong with each record that another one stands in for."""
    problem: DataError | None
    """Why there is no batch."""


@final
@dataclass(frozen=True, kw_only=True)
class Batches(Dataset[Fetched]):
    """Batches by `Ask`. It travels to workers, so its parts must."""

    parts: Sequence[Source | None]
    """Where samples are; `None` for a stream."""
    order: Order
    """Which sample is where."""
    collate: Collate
    """Makes a batch of samples."""
    layout: Layout
    """Who reads what."""
    on_bad_record: OnBadRecord = "error"
    """`skip`: in training, take the next row of the part's permutation instead; in evaluation, leave it out."""
    max_bad_records: int = 0
    """How many rows in a row may be skipped."""
    bucketing: Bucketing | None = None
    """Whether samples are sorted by length."""
    _latest_window: dict[int, Indices] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was arranged last, as all batches of a window need it."""
    _latest_block: dict[tuple[int, int], Located] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was located last, by step and micro-batch."""

    def __getitem__(self, ask: Ask) -> Fetched:
        """One micro-batch of this rank.

        Raises:
            LoaderError: Something failed that is no fault of the data.
        """
        skipped: list[str] = []
        try:
            samples = self._samples(ask, skipped)
            return Fetched(_numbered(self.collate(samples), samples), skipped, None)
        except RecordError as error:
            return Fetched(None, skipped, RecordError(f"{error}{_worker()}"))
        except LoaderError:
            raise
        except DataError as error:
            return Fetched(None, skipped, DataError(f"{error}{_worker()}"))
        except Exception as error:
            raise LoaderError(f"cannot collate{_worker()}: {type(error).__name__}: {error}") from error

    def samples_of(self, step: int) -> Indices:
        """The numbers of the samples of a step's global batch, in order."""
        size = self.layout.global_batch_size
        if self.bucketing is None:
            return self._numbers(step * size, size)
        window, place = divmod(step, self.bucketing.window)
        return self._arranged(window, self.bucketing)[place * size : (place + 1) * size]

    def describe(self, step: int, micro: int) -> str:
        """Which records a micro-batch has, for errors: the first and the last."""
        numbers = self._own(step, micro)
        if not numbers.size:
            return "no records"
        ends = self.order.places(numbers[[0, -1]])
        first, last = (self._where(ends, index) for index in range(2))
        return first if first == last else f"{first} to {last}"

    def _numbers(self, start: int, count: int) -> Indices:
        end = start + count if self.order.num_samples is None else min(start + count, self.order.num_samples)
        return np.arange(start, max(start, end), dtype=np.int64)

    def _own(self, step: int, micro: int) -> Indices:
        numbers = self.samples_of(step)
        return numbers[self.layout.slice_of(micro, len(numbers))]

    def _arranged(self, window: int, bucketing: Bucketing) -> Indices:
        """The samples of a window of batches, sorted by length."""
        if window not in self._latest_window:
            size = self.layout.global_batch_size
            numbers = self._numbers(window * bucketing.window * size, bucketing.window * size)
            places = self.order.places(numbers)
            rows, lengths = self.order.rows(places), np.empty(len(numbers), np.int64)
            for part in np.unique(places.parts):
                here = places.parts == part
                lengths[here] = bucketing.lengths[part][rows[here]]
            self._latest_window.clear()
            self._latest_window[window] = numbers[bucket(lengths, size, derive_key(bucketing.seed, window))]
        return self._latest_window[window]

    def _located(self, step: int, micro: int) -> Located:
        """Where this rank's samples of a micro-batch are; those of the steps around it are found along with them."""
        if (step, micro) not in self._latest_block:
            steps = max(1, _BLOCK * self.layout.world_size // self.layout.global_batch_size)
            block = range(step // steps * steps, step // steps * steps + steps)
            asked = list(itertools.product(block, range(self.layout.accumulation)))
            numbers = [self._own(*each) for each in asked]
            places = self.order.places(np.concatenate(numbers))
            ends = np.cumsum([len(each) for each in numbers])[:-1]
            parts, passes, positions, rows = (np.split(each, ends) for each in (*places, self.order.rows(places)))
            found = map(Located, numbers, map(Places, parts, passes, positions), rows)
            self._latest_block.clear()
            self._latest_block.update(zip(asked, found, strict=True))
        return self._latest_block[step, micro]

    def _samples(self, ask: Ask, skipped: list[str]) -> Samples:
        numbers, places, rows = self._located(ask.step, ask.micro)
        samples = (
            ask.streamed[index] if index in ask.streamed else self._sample(places, index, row, skipped)
            for index, row in enumerate(rows.tolist())
        )
        numbered = zip(samples, numbers, strict=True)
        return [{**sample, "sample_ids": number} for sample, number in numbered if sample is not None]

    def _sample(self, places: Places, index: int, row: int, skipped: list[str]) -> Mapping[str, Any] | None:
        """The sample at a place, or what stands in for it: a function of the data, whoever asks, and whenever."""
        source = self._source(places, index)
        for ahead in range(1, self.max_bad_records + 2):
            try:
                return source[row]
            except RecordError as error:
                if self.on_bad_record == "error":
                    raise
                skipped.append(str(error))
            except DataError:
                raise
            except Exception as error:
                raise LoaderError(f"{source.where(row)}{_worker()}: {type(error).__name__}: {error}") from error
            if self.order.num_samples is not None:
                return None
            row = self._row(places, index, ahead)
        raise RecordError(f"{skipped[-1]} (and no good record among {self.max_bad_records} that came after it)")

    def _source(self, places: Places, index: int) -> Source:
        source = self.parts[int(places.parts[index])]
        assert source is not None, "streams are read by the main process"
        return source

    def _row(self, places: Places, index: int, ahead: int = 0) -> int:
        parts, passes, positions = (values[index : index + 1] for values in places)
        return int(self.order.rows(Places(parts, passes, positions + ahead))[0])

    def _where(self, places: Places, index: int) -> str:
        source = self.parts[int(places.parts[index])]
        return "a stream" if source is None else source.where(self._row(places, index))


def _numbered(batch: Any, samples: Samples) -> Any:
    """A batch that says which samples it has, where it is a dict and does not say so already."""
    if not isinstance(batch, dict) or "sample_ids" in batch:
        return batch
    return {**batch, "sample_ids": torch.tensor([int(each["sample_ids"]) for each in samples], dtype=torch.int64)}


def _worker() -> str:
    """In a message: who says this."""
    info = get_worker_info()
    return "" if info is None else f" (worker {info.id} of {info.num_workers})"
