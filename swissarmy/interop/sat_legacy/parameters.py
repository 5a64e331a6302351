"""Our parameters inside an old checkpoint: which rows of which old tensor each of them is.

The reader is a `TensorSource` under our names. It reads slices without the rest, so that each rank of a
tensor-parallel run can take its own share of every parameter straight from the old files, however many these are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from swissarmy.core.errors import CheckpointError, nearest
from swissarmy.interop.sat_legacy.merge import MergedSource
from swissarmy.interop.tensor_source import allocate

ZEROS: Final = ""
"""In place of the name of an old tensor: the parameter is new, and zero."""


@final
@dataclass(frozen=True)
class Place:
    """Where a parameter lies: rows of an old tensor, one stretch after the other."""

    theirs: str
    rows: tuple[tuple[int, int], ...]
    shape: torch.Size


@final
class ParameterSource:
    """Tensors of an old checkpoint under our names; a `TensorSource` that also reads slices.

    Args:
        merged: The old tensors, whole.
        places: Where each of ours is.
        dtype: Of those that the checkpoint does not have.
    """

    def __init__(self, merged: MergedSource, places: Mapping[str, Place], dtype: torch.dtype) -> None:
        self._merged, self._places, self._dtype = merged, dict(places), dtype

    def names(self) -> tuple[str, ...]:
        """Our names."""
        return tuple(self._places)

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole parameter."""
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The precision."""
        place = self._place(name)
        return self._dtype if place.theirs == ZEROS else self._merged.dtype(place.theirs)

    def where(self, name: str) -> str:
        """The name of the file that holds the parameter, or its first share."""
        place = self._place(name)
        return "" if place.theirs == ZEROS else self._merged.where(place.theirs)

    def read(self, name: str) -> torch.Tensor:
        """The whole parameter, contiguous."""
        place = self._place(name)
        if place.theirs == ZEROS:
            return torch.zeros(place.shape, dtype=self._dtype)
        if not self._merged.shape(place.theirs):
            return self._merged.read(place.theirs)
        return self._read_rows(place, place.rows).reshape(place.shape)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Indices `start` to `stop` of dimension `dim`, contiguous; the others are not read.

        Raises:
            CheckpointError: There is no such slice.
        """
        place = self._place(name)
        if not 0 <= dim < len(place.shape) or not 0 <= start <= stop <= place.shape[dim]:
            raise CheckpointError(f"{name} {list(place.shape)} has no slice {start}:{stop} of dimension {dim}")
        if place.theirs == ZEROS:
            return torch.zeros(place.shape, dtype=self._dtype).narrow(dim, start, stop - start).contiguous()
        theirs = self._merged.shape(place.theirs)
        if len(place.shape) != len(theirs):  # one row under a shape of its own
            return self.read(name).narrow(dim, start, stop - start).contiguous()
        if dim == 0:
            return self._read_rows(place, _within(place.rows, start, stop))
        if place.rows == ((0, theirs[0]),):
            return self._merged.read_slice(place.theirs, dim, start, stop).contiguous()
        return self._read_rows(place, place.rows).narrow(dim, start, stop - start).contiguous()

    def description(self) -> dict[str, Any]:
        """Where each parameter comes from, as plain values: equal for sources that read the same."""
        return {
            name: [place.theirs and self._merged.description(place.theirs), place.rows, list(place.shape)]
            for name, place in self._places.items()
        }

    def _read_rows(self, place: Place, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
        if len(ranges) == 1:
            return self._merged.read_slice(place.theirs, 0, *ranges[0])
        tail = self._merged.shape(place.theirs)[1:]
        rows = sum(stop - start for start, stop in ranges)
        whole, done = allocate(self._merged.dtype(place.theirs), torch.Size([rows, *tail])), 0
        for start, stop in ranges:
            whole[done : done + stop - start] = self._merged.read_slice(place.theirs, 0, start, stop)
            done += stop - start
        return whole

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise CheckpointError(f"the checkpoint has no parameter '{name}'.{nearest(name, self._places)}")
        return self._places[name]


def fused_places(
    theirs: str, shape: torch.Size, ours: Mapping[str, torch.Size], *, may_be_cut: bool, heads: int | None
) -> dict[str, Place]:
    """The places of the parameters that one old tensor holds, one after the other.

    Args:
        theirs: The old tensor's name.
        shape: Its shape, merged.
        ours: The shapes of our parameters, in their order in it.
        may_be_cut: Whether rows may be left over at the end (padding of the vocabulary).
        heads: Where each head has its own rows of all parameters, how many heads.

    Raises:
        CheckpointError: The rows do not add up, or are of another width.
    """
    if not shape and len(ours) == 1:
        return {name: Place(theirs, ((0, 0),), size) for name, size in ours.items()}
    rows = [_rows_of(size, shape) for size in ours.values()]
    known = [count for count in rows if count is not None]
    if len(known) != len(rows) or sum(known) > shape[0] or (sum(known) < shape[0] and not may_be_cut):
        want = " + ".join(f"{list(size)} ({name})" for name, size in ours.items())
        raise CheckpointError(f"{theirs}: have {list(shape)}, want {want}")
    if heads is not None and len(known) > 1:
        return _by_head(theirs, ours, known, heads)
    places, start = {}, 0
    for (name, size), count in zip(ours.items(), known, strict=True):
        places[name] = Place(theirs, ((start, start + count),), size)
        start += count
    return places


def _rows_of(size: torch.Size, shape: torch.Size) -> int | None:
    """How many rows of a tensor of this shape make a parameter of that size; `None` if none do."""
    if size[1:] == shape[1:] and len(size) == len(shape):
        return size[0]
    return 1 if size == shape[1:] else None


def _by_head(theirs: str, ours: Mapping[str, torch.Size], rows: list[int], heads: int) -> dict[str, Place]:
    share = [count // heads for count in rows]
    step, places = sum(share), {}
    for index, (name, size) in enumerate(ours.items()):
        first = sum(share[:index])
        starts = [head * step + first for head in range(heads)]
        places[name] = Place(theirs, tuple((start, start + share[index]) for start in starts), size)
    return places


def _within(rows: tuple[tuple[int, int], ...], start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """The stretches that hold elements `start` to `stop` of all of them together."""
    found, before = [], 0
    for first, last in rows:
        low, high = max(start - before, 0), min(stop - before, last - first)
        if low < high:
            found.append((first + low, first + high))
        before += last - first
    return tuple(found) or ((0, 0),)
