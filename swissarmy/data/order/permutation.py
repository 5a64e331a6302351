"""Shuffling without a list: a keyed bijection of `range(length)` that takes no memory, however long the range is.

A Feistel network over a grid that is barely larger than the range (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002): an index is a cell of `rows x columns`; each round adds to one coordinate a hash of the other. What
lands outside the range is sent through again until it is inside (cycle walking), which is rare, as the grid is nearly
square. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), in 64-bit integers alone, so that the
order is the same on every machine and in every version.
"""

import hashlib
import math
from typing import Final, final, overload

import numpy as np
from numpy.typing import NDArray

from swissarmy.core.errors import ConfigError

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS: Final = 16
"""Enough for ranges of three or four, where few bits of each hash count; large ranges would do with eight."""
MAX_LENGTH: Final = 2**62

_HALF: Final = np.uint64(32)
_ROUND_KEYS: Final = np.array([number * 0x9E3779B97F4A7C15 % 2**64 for number in range(1, ROUNDS + 1)], np.uint64)
"""SplitMix64's steps: multiples of the golden ratio."""


@final
class Permutation:
    """A shuffle of `range(length)`: `permutation[i]` is the i-th index of the shuffled order.

    Args:
        length: How many indices there are, from 0 to 2**62.
        key: Which of the shuffles; `derive_key` makes one of anything.

    Raises:
        ConfigError: The length is out of range.
    """

    def __init__(self, length: int, key: int) -> None:
        if not 0 <= length <= MAX_LENGTH:
            raise ConfigError(f"length={length} must be from 0 to 2**62.")
        self.length = length
        self.key = key

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"Permutation(length={self.length}, key={self.key:#018x})"

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: Indices) -> Indices: ...
    def __getitem__(self, index: int | Indices) -> int | Indices:
        """The shuffled index at a place, or at each of several places (any shape).

        Raises:
            IndexError: A place is outside `range(length)`.
        """
        mapped = permute(np.atleast_1d(np.asarray(index, np.int64)), self.length, self.key)
        return mapped if isinstance(index, np.ndarray) else int(mapped[0])

    @overload
    def place_of(self, index: int) -> int: ...
    @overload
    def place_of(self, index: Indices) -> Indices: ...
    def place_of(self, index: int | Indices) -> int | Indices:
        """The inverse: where in the shuffled order an index stands.

        Raises:
            IndexError: An index is outside `range(length)`.
        """
        mapped = permute(np.atleast_1d(np.asarray(index, np.int64)), self.length, self.key, inverse=True)
        return mapped if isinstance(index, np.ndarray) else int(mapped[0])


def permute(places: Indices, length: int | Indices, key: int | Words, *, inverse: bool = False) -> Indices:
    """What `Permutation`s do, many of them at once if wanted.

    Args:
        places: Any shape, each in the `range` of its length.
        length: One for all, or an array of the shape of `places`.
        key: The same.
        inverse: Undo it instead.

    Raises:
        IndexError: A place is outside its range.
    """
    lengths = np.broadcast_to(np.asarray(length, np.int64), places.shape)
    if ((places < 0) | (places >= lengths)).any():
        raise IndexError(f"a place is outside range({length}): {places.min()} to {places.max()}")
    keys = np.broadcast_to(np.asarray(key, np.uint64), places.shape)
    mapped = _scramble(places, keys, lengths, inverse)
    while (outside := mapped >= lengths).any():
        mapped[outside] = _scramble(mapped[outside], keys[outside], lengths[outside], inverse)
    return mapped


def _scramble(cells: Indices, keys: Words, lengths: Indices, inverse: bool) -> Indices:
    """All rounds, once, over the grids."""
    sides = _grids(lengths)
    coordinates = list(np.divmod(cells.astype(np.uint64), sides[1]))
    round_keys = mix(keys + _ROUND_KEYS.reshape(-1, *[1] * keys.ndim))
    for number in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        moved = number % 2
        side = sides[moved]
        step = ((mix(coordinates[1 - moved] ^ round_keys[number]) >> _HALF) * side) >> _HALF  # from 0 to side - 1
        coordinates[moved] = (coordinates[moved] + (side - step if inverse else step)) % side
    mapped: Indices = (coordinates[0] * sides[1] + coordinates[1]).astype(np.int64)
    return mapped


def _grids(lengths: Indices) -> tuple[Words, Words]:
    """Rows and columns of a nearly square grid with room for each range.

    The rows are even in number: sums over two odd sides would only ever make even permutations.
    """
    different, which = np.unique(lengths, return_inverse=True)
    rows = [2 * (math.isqrt(max(length - 1, 0)) // 2 + 1) for length in different.tolist()]
    columns = [max(1, -(-length // side)) for length, side in zip(different.tolist(), rows, strict=True)]
    shaped = which.reshape(lengths.shape)
    return np.array(rows, np.uint64)[shaped], np.array(columns, np.uint64)[shaped]


def mix(words: Words) -> Words:
    """SplitMix64's finaliser: a bijection of 64-bit words after which every bit depends on every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from anything, such as `derive_key(seed, "order", part)`; the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
