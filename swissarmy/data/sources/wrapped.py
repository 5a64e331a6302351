"""Any map-style `torch.utils.data.Dataset`, or anything else with a length and records by number, as a source."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch

from swissarmy.data.source import DataError, RecordError, Source, check_index, digest

_SAMPLED = 8


@runtime_checkable
class MapStyle(Protocol):
    """What a map-style dataset has."""

    def __len__(self) -> int:
        """The number of records."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One record."""
        ...


@final
class Wrapped:
    """A dataset as a source.

    Args:
        dataset: gives the same record for the same number, or one that is augmented anew each time.
        fields: names for the values of records that are tuples, such as `("image", "label")`; one name for records
            that are single values. Not needed for mappings.
        fingerprint: say what the data is. When omitted, it is the length and the content of a few records; those that
            come out differently each time count only by their types and shapes.
        name: stands in errors; the class when omitted.
    """

    def __init__(
        self, dataset: MapStyle, *, fields: Sequence[str] = (), fingerprint: str | None = None, name: str | None = None
    ) -> None:
        self.dataset = dataset
        self._fields = tuple(fields)
        self._given = fingerprint
        self._name = type(dataset).__name__ if name is None else name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One record.

        Raises:
            RecordError: it is no mapping, and does not fit `fields`.
        """
        number = check_index(index, len(self))
        record = self.dataset[number]
        if isinstance(record, Mapping):
            return record
        values = record if isinstance(record, tuple | list) and len(self._fields) != 1 else (record,)
        if len(values) != len(self._fields):
            raise RecordError(
                f"{self.where(number)}: a record is a mapping, not a {type(record).__name__}: return a dict, or give "
                f"Wrapped(dataset, fields=...) with the names of its values"
            )
        return dict(zip(self._fields, values, strict=True))

    def where(self, index: int) -> str:
        """`MyDataset[17]`."""
        return f"{self._name}[{check_index(index, len(self))}]"

    @cached_property
    def fingerprint(self) -> str:
        """What the caller said, or that of a few records."""
        if self._given is not None:
            return digest("Wrapped", self._given, self._fields)
        places = sorted({(len(self) - 1) * place // (_SAMPLED - 1) for place in range(_SAMPLED)}) if len(self) else []
        return digest("Wrapped", len(self), [self._print(place) for place in places])

    def _print(self, place: int) -> str:
        first, again = (content_hash(self[place]) for _ in range(2))
        return first if first == again else content_hash(self[place], values=False)


def as_source(dataset: object) -> Source:
    """A source as it is, anything else `Wrapped`.

    Raises:
        DataError: it has no length, or no records by number.
    """
    if isinstance(dataset, Source):
        return dataset
    if not isinstance(dataset, MapStyle):
        raise DataError(
            f"{type(dataset).__name__} has no length and no records by number; for one that gives records one after "
            "another use Stream"
        )
    return Wrapped(dataset)


def content_hash(value: object, *, values: bool = True) -> str:
    """A short hash of nested mappings and sequences of arrays, tensors and plain values.

    Of any other object it is the type alone; without `values` also of what is in arrays and scalars.
    """
    content = hashlib.blake2b(digest_size=16)
    for piece in _pieces(value, values):
        content.update(len(piece).to_bytes(8, "little") + piece)
    return content.hexdigest()


def _pieces(value: object, values: bool) -> Iterator[bytes]:
    yield type(value).__name__.encode()
    if isinstance(value, Mapping):
        for key in value:
            yield str(key).encode("utf-8", "surrogatepass")
            yield from _pieces(value[key], values)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _pieces(item, values)
    elif isinstance(value, np.ndarray | np.generic | torch.Tensor):
        yield json.dumps([str(value.dtype), list(value.shape)]).encode()
        if values:
            yield _bytes_of(value)
    elif values and isinstance(value, str | bytes | int | float | bool):
        yield repr(value).encode()


def _bytes_of(value: "np.ndarray[Any, Any] | np.generic | torch.Tensor") -> bytes:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return value.tobytes()
