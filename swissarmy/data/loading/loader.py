"""`Loader`: batches as a pure function of the seed and the step.

The global order of samples is the same for every number of ranks that divides the global batch, and for any number of
workers; `batches.py` says which samples a rank reads. So a checkpoint needs the step alone, and no time to get there.
"""

import logging
import multiprocessing
import os
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from multiprocessing.connection import wait
from typing import Any, Final, final

import torch
from torch.utils.data import DataLoader

from swissarmy.core.config import report
from swissarmy.data.loading.batches import Ask, Batches, Collate, Fetched, Layout, LoaderError, OnBadRecord
from swissarmy.data.loading.bucketing import Bucketing
from swissarmy.data.loading.stream_reader import StreamReader
from swissarmy.data.order.sample_order import Order
from swissarmy.data.source import DataError, RecordError, Source
from swissarmy.data.sources.stream import StreamSource

_LOG = logging.getLogger(__name__)
_ABSENT: Final = "nothing"
_BATCH: Final = "global batch size"


class FingerprintError(DataError):
    """Data or settings are not those of the checkpoint; the message says which."""


@final
class Loader:
    """An iterable of micro-batches: `accumulation` of them for each step.

    With an endless order (training), iterating goes on where it was, up to `num_steps`; a step counts as done when its
    last micro-batch is given, and one that was broken off begins again. With a finite order (evaluation) each iteration
    gives every sample once, and every rank the same number of batches, of which the last may be smaller, or empty on
    some ranks.

    Args:
        parts: Samples, or streams of samples.
        order: Which sample is where.
        collate: Makes a batch of a list of samples; the list may be empty in evaluation. What it says of itself in
            `fingerprint` must be the same when the run is resumed.
        global_batch_size: Samples of a step, over all ranks and micro-batches.
        accumulation: Micro-batches of a step.
        rank: Which of the processes this is.
        world_size: How many processes share each global batch.
        num_steps: Where training ends; `None`: never.
        fingerprint: What must be the same when the run is resumed, by name, beside the order and the batch size; the
            fingerprints of the parts when omitted.
        num_workers: Processes that read ahead; 0 for none.
        prefetch: How many micro-batches each worker reads ahead.
        pin_memory: Whether batches are in page-locked memory, from where they are copied to an accelerator faster.
        worker_timeout: Seconds to wait for a batch before giving up; 0 for no limit.
        on_bad_record: `error`, or `skip`: each is logged once. In training the next row of the part's permutation
            stands in for it (for a stream: the next record); in evaluation it is left out.
        max_bad_records: How many different records may be skipped on a rank, counted from where the run was started.
        bucketing: Whether batches are of samples of similar length.

    Raises:
        ConfigError: The arguments do not fit each other.
    """

    def __init__(
        self,
        parts: Sequence[Source | StreamSource],
        order: Order,
        collate: Collate,
        *,
        global_batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_steps: int | None = None,
        fingerprint: Mapping[str, str] | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        worker_timeout: float = 0.0,
        on_bad_record: OnBadRecord = "error",
        max_bad_records: int = 100,
        bucketing: Bucketing | None = None,
    ) -> None:
        layout = Layout(
            global_batch_size=global_batch_size, accumulation=accumulation, rank=rank, world_size=world_size
        )
        streams = {number: part for number, part in enumerate(parts) if isinstance(part, StreamSource)}
        strangers = [part for part in parts if not isinstance(part, Source | StreamSource)]
        report("Loader:", _problems(layout, order, strangers, bool(streams), bucketing))
        self.batches = Batches(
            parts=[part if isinstance(part, Source) else None for part in parts],
            order=order,
            collate=collate,
            layout=layout,
            on_bad_record=on_bad_record,
            max_bad_records=max_bad_records,
            bucketing=bucketing,
        )
        self.step = 0
        """How many steps are done."""
        self.num_steps = num_steps if order.num_samples is None else -(-order.num_samples // global_batch_size)
        """At which step it ends; `None`: never."""
        self.bad_records: list[str] = []
        """What is wrong with the records that were skipped."""
        if fingerprint is None:
            fingerprint = {f"source {number}": part.fingerprint for number, part in enumerate(parts, 1)}
        self._fingerprint = {
            **order.fingerprint,
            _BATCH: str(global_batch_size),
            "bucketing": "off" if bucketing is None else f"windows of {bucketing.window}, seed {bucketing.seed}",
            **fingerprint,
            **getattr(collate, "fingerprint", {}),
        }
        self._num_workers, self._prefetch, self._timeout = num_workers, prefetch, worker_timeout
        self._pin_memory = pin_memory and torch.accelerator.is_available()
        self._reader = StreamReader(streams, self.batches, self._pass_over)
        self._reader.begin(0, self._reader.states())

    def __iter__(self) -> Iterator[Any]:
        """This rank's micro-batches, from the first of the current step on.

        Raises:
            RecordError: A record is bad, or too many are.
            LoaderError: A worker died or hung, or something failed that is no fault of the data.
        """
        if self.batches.order.num_samples is None:
            self._reader.begin(self.step, self._reader.states_before(self.step))
        else:
            self.step = 0
            self._reader.begin(0, {})
        fetched = iter(self._data_loader(self._asks(self.step)))
        last = self.batches.layout.accumulation - 1
        try:
            for place in self._places(self.step):
                batch = self._unpacked(_next(fetched), place)
                if place[1] == last:
                    self.step = place[0] + 1
                    self._reader.forget_before(self.step)
                yield batch
        finally:
            del fetched  # ends the workers

    def state_dict(self) -> dict[str, Any]:
        """The step, what the data must be when the run is resumed, and where streams stand: plain values."""
        streams = {str(part): state for part, state in self._reader.states_before(self.step).items()}
        return {"step": self.step, "fingerprint": dict(self._fingerprint), "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_data_change: bool = False) -> None:
        """Go to where `state_dict` said, whatever the number of ranks, micro-batches and workers was.

        Args:
            state: From `state_dict`.
            allow_data_change: Go to that step although data or settings changed, and log what did.

        Raises:
            FingerprintError: They changed.
            DataError: `state` is no such state.
        """
        if missing := {"step", "fingerprint", "streams"} - set(state):
            raise DataError(f"the loader's state has no {', '.join(sorted(missing))}.")
        if not isinstance(state["step"], int) or state["step"] < 0:
            raise DataError(f"the loader's state has step={state['step']!r}, which is no number of steps.")
        changes = list(_changes(state["fingerprint"], self._fingerprint))
        if changes and not allow_data_change:
            lines = "\n  - ".join([f"the data is not that of the checkpoint at step {state['step']}:", *changes])
            raise FingerprintError(f"{lines}\nTo go on all the same, allow the data change (--allow-data-change).")
        for change in changes:
            _LOG.warning("resuming at step %d although the data changed: %s", state["step"], change)
        was, now_size = state["fingerprint"].get(_BATCH), self._fingerprint[_BATCH]
        if was != now_size:
            _LOG.warning(
                "the order of the samples goes on at number %d: steps are counted, and before they had %s samples each",
                state["step"] * int(now_size),
                was,
            )
        now = self._reader.states()
        states = {part: state["streams"].get(str(part), now[part]) for part in now}
        self.step = state["step"]
        self._reader.begin(self.step, states)

    def _places(self, first_step: int) -> Iterator[tuple[int, int]]:
        """Step and micro-batch of all that is to be given."""
        return ((step, micro) for step in self._steps(first_step) for micro in range(self.batches.layout.accumulation))

    def _asks(self, first_step: int) -> Iterator[Ask]:
        return chain.from_iterable(map(self._reader.asks, self._steps(first_step)))

    def _steps(self, first: int) -> Iterable[int]:
        return count(first) if self.num_steps is None else range(first, self.num_steps)

    def _data_loader(self, asks: Iterator[Ask]) -> "DataLoader[Fetched]":
        has_workers = self._num_workers > 0
        return DataLoader(
            self.batches,
            sampler=asks,
            batch_size=None,
            collate_fn=_same,  # type: ignore[arg-type]  # a batch is fetched whole
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if has_workers else None,
            pin_memory=self._pin_memory,
            timeout=self._timeout if has_workers else 0,
            worker_init_fn=_end_with_parent if has_workers else None,
            generator=torch.Generator(),  # its own: the default one belongs to the model, and resumes with it
        )

    def _unpacked(self, fetched: Fetched, place: tuple[int, int]) -> Any:
        for message in fetched.skipped:
            self._note(message)
        if isinstance(fetched.problem, LoaderError):
            where = f"step {place[0]}, micro-batch {place[1]} ({self.batches.describe(*place)})"
            raise LoaderError(f"{where}: {fetched.problem}") from fetched.problem.__cause__
        if fetched.problem is not None:
            raise fetched.problem
        return fetched.batch

    def _pass_over(self, error: RecordError) -> None:
        if self.batches.on_bad_record == "error":
            raise error
        self._note(str(error))

    def _note(self, message: str) -> None:
        if message in self.bad_records:
            return
        self.bad_records.append(message)
        _LOG.warning("skipped: %s", message)
        if len(self.bad_records) > self.batches.max_bad_records:
            raise RecordError(f"{message}; there are more than max_bad_records={self.batches.max_bad_records} like it")


def _problems(
    layout: Layout, order: Order, strangers: Sequence[object], has_streams: bool, bucketing: Bucketing | None
) -> Iterator[str]:
    for stranger in strangers:
        yield f"{type(stranger).__name__} is neither a source nor a stream; `as_source` makes one of a dataset."
    if min(layout.global_batch_size, layout.accumulation, layout.world_size) < 1:
        yield f"global_batch_size, accumulation and world_size must be at least 1: {layout}."
    else:
        yield from sharing_problems(layout.global_batch_size, layout.accumulation, layout.world_size)
    if not 0 <= layout.rank < max(layout.world_size, 1):
        yield f"rank={layout.rank} is none of 0 to {layout.world_size - 1}."
    if order.num_samples is not None and layout.accumulation != 1:
        yield f"accumulation={layout.accumulation} makes no sense for an order that ends."
    if has_streams and order.num_samples is not None:
        yield "a stream has no length, and so no order that ends."
    if has_streams and bucketing is not None:
        yield "samples of a stream cannot be bucketed: their lengths are not known before."


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """A line for each entry that differs."""
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if was != now:
            yield f"{name} was {was} and is {now}"


def _next(fetched: Iterator[Fetched]) -> Fetched:
    """What comes next, or the problem with it.

    A traceback would keep the iterator, and so its workers, for as long as somebody keeps the exception; and workers
    that outlive their loader are inherited by those of the next, which then hang.
    """
    try:
        return next(fetched)
    except DataError as error:
        traceback.clear_frames(error.__traceback__)
        return Fetched(None, [], error)
    except RuntimeError as error:  # what torch raises for a worker that died or hangs
        traceback.clear_frames(error.__traceback__)
        return Fetched(None, [], LoaderError(str(error)))


def sharing_problems(global_batch_size: int, accumulation: int, world_size: int) -> Iterator[str]:
    """A line if a global batch does not divide evenly."""
    slices = world_size * accumulation
    if global_batch_size % slices:
        below = global_batch_size // slices * slices
        near = f"{below} or {below + slices}" if below else str(slices)
        yield (
            f"global_batch_size={global_batch_size} cannot be shared by {world_size} ranks in {accumulation} "
            f"micro-batches; {near} can."
        )


def _end_with_parent(worker: int) -> None:
    """End this worker when the process that it reads for dies, by SIGKILL too.

    torch's own workers look at their parent's number for that, which is that of a server where processes are started by
    one (`forkserver`, from Python 3.14 on for all): a killed run left them behind.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch(sentinel: int) -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _same(fetched: Fetched) -> Fetched:
    return fetched
