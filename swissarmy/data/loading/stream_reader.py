"""Streams among the parts of a blend: read in order by the main process of every rank.

Which samples come from a stream is known, so each rank reads the whole stream and keeps what is in its own slices.
Reading runs ahead of the run, as workers are asked in advance: where each stream stood is remembered for every step
that was asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import numpy as np

from swissarmy.data.loading.batches import Ask, Batches
from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.stream import StreamSource

States = dict[int, dict[str, Any]]
"""Where each stream stands, by the number of its part."""


@final
class StreamReader:
    """Reads streams as the blend draws from them.

    Args:
        streams: By the number of the part.
        batches: Which sample is of which part.
        pass_over: What to do with a bad record before the next one is taken; may raise.
    """

    def __init__(
        self, streams: Mapping[int, StreamSource], batches: Batches, pass_over: Callable[[RecordError], None]
    ) -> None:
        self._streams = streams
        self._batches = batches
        self._pass_over = pass_over
        self._passes: dict[int, Iterator[Mapping[str, Any]]] = {}
        self._states: dict[int, States] = {}

    def begin(self, step: int, states: States) -> None:
        """Go to where the streams stand before a step."""
        self._passes.clear()
        for part, stream in self._streams.items():
            stream.load_state_dict(states[part])
        self._states = {step: states}

    def asks(self, step: int) -> Iterator[Ask]:
        """What to ask workers for in a step; the streams are read to its end."""
        samples = self._read(step)
        self._states[step + 1] = self.states()
        layout = self._batches.layout
        for micro in range(layout.accumulation):
            own = range(layout.global_batch_size)[layout.slice_of(micro, layout.global_batch_size)]
            yield Ask(step, micro, {at - own.start: samples[at] for at in own if at in samples})

    def states(self) -> States:
        """Where the streams stand now."""
        return {part: stream.state_dict() for part, stream in self._streams.items()}

    def states_before(self, step: int) -> States:
        """Where the streams stood before a step that was asked for and is not forgotten."""
        return self._states[step]

    def forget_before(self, step: int) -> None:
        """Steps before this one are done."""
        self._states = {number: states for number, states in self._states.items() if number >= step}

    def _read(self, step: int) -> dict[int, Mapping[str, Any]]:
        """The samples of a global batch that come from streams, by their place in it."""
        if not self._streams:
            return {}
        parts = self._batches.order.places(self._batches.samples_of(step)).parts
        return {int(at): self._next(int(parts[at])) for at in np.flatnonzero(np.isin(parts, list(self._streams)))}

    def _next(self, part: int) -> Mapping[str, Any]:
        stream, ends, bad = self._streams[part], 0, 0
        while ends < 2 and bad <= self._batches.max_bad_records:
            try:
                if part not in self._passes:
                    self._passes[part] = iter(stream)
                return next(self._passes[part])
            except StopIteration:
                del self._passes[part]
                ends += 1
            except RecordError as error:
                self._pass_over(error)
                ends, bad = 0, bad + 1
        raise DataError(f"{stream.where()}: the stream has no good records")
