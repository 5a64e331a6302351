"""Records that come one after another and have no numbers: what a stream must do, and one over any iterable."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

from swissarmy.core.errors import nearest
from swissarmy.data.source import DataError, RecordError, digest


@runtime_checkable
class StreamSource(Protocol):
    """Records in an order of their own. Its state after a record is what it takes to go on with the next.

    Unlike a `Source` it is read by one process at a time, and where it stands is part of a run's state.
    """

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """One pass, from where the state says to the end; the next call begins the next pass."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands after the record given last, as plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go there; `__iter__` continues with the record after."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the data or the settings change, as far as a stream can know."""
        ...

    def where(self) -> str:
        """Where the record given last stands."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """An iterable that can say where it stands, such as a streamed dataset of `datasets`."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Go there."""
        ...


@final
class Stream:
    """A stream over an iterable of mappings that gives the same records each time it is iterated.

    An iterable with `state_dict` and `load_state_dict` is resumed through them; of any other the records that were
    already given are read again and dropped, which takes time.

    Args:
        iterable: gives a fresh iterator, from the first record, each time; so a generator function's result will not
            do, and a class whose `__iter__` is one will.
        name: stands in errors.
        fingerprint: say what the data is (a version, a date); a stream cannot find out by itself.

    Raises:
        DataError: `iterable` can be read only once.
    """

    def __init__(
        self, iterable: Iterable[Mapping[str, Any]], *, name: str = "stream", fingerprint: str | None = None
    ) -> None:
        if isinstance(iterable, Iterator):
            raise DataError(
                f"{name}: {type(iterable).__name__} is an iterator, which is read once and cannot resume: give an "
                "object whose __iter__ begins anew each time"
            )
        self._iterable = iterable
        self._name = name
        self._fingerprint = digest("stream", fingerprint if fingerprint is not None else name)
        self._start = iterable.state_dict() if isinstance(iterable, Stateful) else None
        self._pass = self._given = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """One pass, from where the state says to the end.

        Raises:
            RecordError: what came is no mapping.
        """
        if isinstance(self._iterable, Stateful) and not self._given:
            self._iterable.load_state_dict(self._start)  # some begin every pass where they were once told to
        already = 0 if isinstance(self._iterable, Stateful) else self._given
        for record in itertools.islice(self._iterable, already, None):
            self._given += 1
            if not isinstance(record, Mapping):
                raise RecordError(f"{self.where()}: a record is a mapping, not {type(record).__name__}")
            yield record
        self._pass, self._given = self._pass + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The passes done, the records given in this one, and the iterable's own state."""
        stands = self._iterable.state_dict() if isinstance(self._iterable, Stateful) else None
        return {"pass": self._pass, "given": self._given, "iterable": stands}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` said.

        Raises:
            DataError: it is no state of such a stream.
        """
        for key in ("pass", "given", "iterable"):
            if key not in state:
                raise DataError(f"{self._name}: the state has no {key!r}.{nearest(key, map(str, state))}")
        if isinstance(self._iterable, Stateful) != (state["iterable"] is not None):
            raise DataError(f"{self._name}: the state is of another kind of stream; begin anew")
        if isinstance(self._iterable, Stateful):
            self._iterable.load_state_dict(state["iterable"])
        self._pass, self._given = state["pass"], state["given"]

    @property
    def fingerprint(self) -> str:
        """Of the name, or of what the caller said it is."""
        return self._fingerprint

    def where(self) -> str:
        """`name, pass 0, record 17`."""
        return f"{self._name}, pass {self._pass}, record {self._given - 1}"


@final
@dataclass(frozen=True)
class MappedStream:
    """A stream of which each record is changed, as into a sample; a record that cannot be is bad, and the next follows.

    Args:
        stream: Records.
        change: Gets a record and where it stands.
        fingerprint_of_change: Changes when the same record gives something else.
    """

    stream: StreamSource
    change: Callable[[Mapping[str, Any], str], Mapping[str, Any]]
    fingerprint_of_change: str

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """One pass, from where the state says to the end; it goes on after a `RecordError`."""
        return map(self._changed, self.stream)  # a generator would end with the first error

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go there."""
        self.stream.load_state_dict(state)

    @property
    def fingerprint(self) -> str:
        """Of the stream and of the change."""
        return digest("mapped", self.stream.fingerprint, self.fingerprint_of_change)

    def where(self) -> str:
        """Where the record given last stands."""
        return self.stream.where()

    def _changed(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.change(record, self.stream.where())
