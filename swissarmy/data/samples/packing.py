"""`Packed`: documents side by side in rows of a fixed length, so that almost nothing of a batch is padding.

The tokens of every document are counted once, and a small index says what is in which row: any row can be read at
once, and resuming costs nothing. Each source is packed for itself, so blending keeps its ratios.

Rows are filled by best-fit-decreasing (Johnson 1973) over the histogram of lengths (Krell et al. 2021): documents of
one length are interchangeable, so the work grows with the number of different lengths and not of documents. Which
document takes which of the places for its length is decided by a keyed permutation.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from swissarmy.data.order.permutation import Permutation, derive_key
from swissarmy.data.samples.array_cache import Arrays, cached
from swissarmy.data.samples.examples import Sample
from swissarmy.data.samples.lengths import Lengths, count_lengths
from swissarmy.data.samples.pieces import Numbers, TooLong, cut_up, piece_of
from swissarmy.data.source import DataError, Source, check_index, digest


@final
class Packed:
    """Rows of at most `length` tokens, each of one document or several.

    A row has `input_ids`, `loss_mask`, `document_ids` (0, 1, ... in the row) and `position_ids` (from 0 on in each
    document), all `[n]`, n <= length. Documents do not see each other in a model that is given
    `natural mask & Documents(document_ids)`, and none is predicted from another, as first tokens are not scored.

    Args:
        samples: with `input_ids` and `loss_mask`, such as `Examples`.
        length: tokens of a row.
        key: decides which documents share a row.
        too_long: `split` a document longer than a row into pieces (reading one of them encodes the whole), or `drop`
            it. To refuse it, give `Examples` a `max_length`.
        lengths: `count_lengths(samples)`, if it is known already.
        cache_folder: keep the index there and read it as memory maps, which workers share.

    Raises:
        ConfigError: an argument makes no sense.
        DataError: there is nothing to pack.
    """

    def __init__(
        self,
        samples: Source,
        length: int,
        *,
        key: int = 0,
        too_long: TooLong = "split",
        lengths: Lengths | None = None,
        cache_folder: Path | None = None,
    ) -> None:
        self.samples, self.length, self.key, self.too_long = samples, length, key, too_long
        self._cache_folder = cache_folder
        self._index: Arrays | None = self._open(lengths)

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be pickled as all that it maps; a worker opens it again instead
        return self.__dict__ if self._cache_folder is None else self.__dict__ | {"_index": None}

    def __len__(self) -> int:
        return len(self.index[0]) - 1

    def __getitem__(self, row: int) -> Sample:
        """What is in a row.

        Raises:
            DataError: its documents are not those that were counted.
        """
        pieces = [piece_of(self.samples[document], begin, self.length) for document, begin in self._contents(row)]
        sizes = [len(piece["input_ids"]) for piece in pieces]
        if sum(sizes) > self.length:
            raise DataError(f"{self.where(row)}: {sum(sizes)} tokens in a row of {self.length}: the data changed")
        return {
            "input_ids": np.concatenate([piece["input_ids"] for piece in pieces]),
            "loss_mask": np.concatenate([piece["loss_mask"] for piece in pieces]),
            "document_ids": np.repeat(np.arange(len(sizes)), sizes),
            "position_ids": np.concatenate([np.arange(size) for size in sizes]),
        }

    @property
    def index(self) -> Arrays:
        """`[rows + 1]`: where the pieces of each row begin; `[pieces]`: their documents; `[pieces]`: their first
        tokens there."""
        if self._index is None:
            self._index = self._open(None)
        return self._index

    @property
    def fingerprint(self) -> str:
        """Of the documents and how they are packed."""
        return digest("packed", self.samples.fingerprint, self.length, self.key, self.too_long)

    def where(self, row: int) -> str:
        """Where the documents of a row stand."""
        return " + ".join(self.samples.where(document) for document, _ in self._contents(row))

    def _contents(self, row: int) -> list[tuple[int, int]]:
        """The document and the first token of each piece in a row."""
        row = check_index(row, len(self))
        row_starts, documents, begins = self.index
        here = slice(int(row_starts[row]), int(row_starts[row + 1]))
        return list(zip(documents[here].tolist(), begins[here].tolist(), strict=True))

    def _open(self, lengths: Lengths | None) -> Arrays:
        def make() -> Arrays:
            counted = count_lengths(self.samples, cache_folder=self._cache_folder) if lengths is None else lengths
            pieces = cut_up(counted, self.length, self.too_long)
            if not len(pieces.documents):
                size = f"each is empty or has more than {self.length} tokens"
                raise DataError(f"of {len(self.samples)} documents none is left: {size}")
            order, row_starts = best_fit(pieces.sizes, self.length, self.key)
            return [row_starts, _compact(pieces.documents[order]), _compact(pieces.begins[order])]

        return cached(self._cache_folder, f"packed-{self.fingerprint}", 3, make)


def best_fit(sizes: Numbers, length: int, key: int) -> tuple[Numbers, Numbers]:
    """Pack pieces into rows by best-fit-decreasing: the longest first, each into the fullest row that has room.

    Args:
        sizes: `[pieces]`, each from 1 to `length`.
        length: the room in a row.
        key: decides which of the pieces of one size goes where.

    Returns:
        `[pieces]`, the pieces row by row, and `[rows + 1]`, where each row begins among them.
    """
    shuffled = Permutation(len(sizes), derive_key("packing", key))[np.arange(len(sizes))]
    by_size = shuffled[np.argsort(sizes[shuffled], kind="stable")]
    counts = np.bincount(sizes, minlength=length + 1)
    next_of_size = np.cumsum(counts) - counts
    rows = np.empty(len(sizes), dtype=np.int64)
    for placed in _placements(counts.tolist(), length):
        start, number = next_of_size[placed.size], placed.num_rows * placed.per_row
        rows[start : start + number] = np.arange(number) // placed.per_row + placed.first_row
        next_of_size[placed.size] += number
    row_starts = np.concatenate(([0], np.cumsum(np.bincount(rows))))
    return by_size[np.argsort(rows, kind="stable")], row_starts


class _Placement(NamedTuple):
    """Pieces of one size that go into rows which were equally full."""

    size: int
    first_row: int
    num_rows: int
    per_row: int


def _placements(counts: list[int], length: int) -> Iterator[_Placement]:
    """Best-fit-decreasing for `counts[size]` pieces of each size, many rows at a time."""
    rows = _OpenRows(length)
    for size in range(length, 0, -1):
        left = counts[size]
        while left:
            room, first_row, num_rows = rows.take(size, wanted=left)
            per_row = room // size
            full = min(num_rows, left // per_row)
            rest = 0 if full == num_rows else left - full * per_row
            left -= full * per_row + rest
            # some rows take all that they can, one may take the rest, and others stay as they were
            for number, each in ((full, per_row), (min(rest, 1), rest), (num_rows - full - min(rest, 1), 0)):
                if number and each:
                    yield _Placement(size, first_row, number, each)
                rows.put(room - each * size, first_row, number)
                first_row += number


@final
class _OpenRows:
    """Rows by the room that is left in them, in stretches of neighbours that are equally full."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._num_rows = 0
        self._stretches: list[list[tuple[int, int]]] = [[] for _ in range(length + 1)]
        self._rooms = 0
        """Bit r is set if a row has room for r tokens: the best fit is the lowest one from `size` on."""

    def take(self, size: int, *, wanted: int) -> tuple[int, int, int]:
        """The fullest rows that have room for `size`, or new ones for `wanted` pieces: room, first row, number."""
        fitting = self._rooms >> size
        if not fitting:
            first_row, number = self._num_rows, -(-wanted // (self._length // size))
            self._num_rows += number
            return self._length, first_row, number
        room = size + (fitting & -fitting).bit_length() - 1
        first_row, number = self._stretches[room].pop()
        if not self._stretches[room]:
            self._rooms ^= 1 << room
        return room, first_row, number

    def put(self, room: int, first_row: int, number: int) -> None:
        """Give back rows that have room for more."""
        if room and number:
            self._stretches[room].append((first_row, number))
            self._rooms |= 1 << room


def _compact(numbers: Numbers) -> NDArray[np.int32 | np.int64]:
    return numbers.astype(np.int32) if numbers.max(initial=0) <= np.iinfo(np.int32).max else numbers
