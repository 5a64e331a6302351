"""Train, valid and test rows of one source: disjoint, complete, and the same however often rows are appended.

Rows come in periods as long as the sum of the ratios (95, 4, 1: a hundred rows). A keyed permutation, turned by another
amount in each period, says which rows of it go where. So every period has the ratios exactly, and the split of a row is
a function of its number alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from swissarmy.core.errors import ConfigError
from swissarmy.data.order.permutation import Permutation, derive_key
from swissarmy.data.order.weights import Weight, parse_weights
from swissarmy.data.source import CountsTokens, Source, check_index, digest

SplitName = Literal["train", "valid", "test"]

SPLITS: Final[tuple[SplitName, ...]] = ("train", "valid", "test")
MAX_PERIOD: Final = 1_000_000


@final
class Split:
    """The rows of one split of a source: `split[i]` is the row that its i-th record is.

    Args:
        source_length: How many rows the source has; any number.
        ratios: How much of them goes to train, valid and test, in any unit (`95, 4, 1`, or `0.9, 0.1, 0`).
        which: The split whose rows these are.
        key: Which of the possible splits; keep it, or rows that were trained on become test rows.

    Raises:
        ConfigError: There are not three ratios, they are no weights, or they are finer than one in a million.
    """

    def __init__(self, source_length: int, ratios: Sequence[Weight], which: SplitName, key: int = 0) -> None:
        sizes = period_of(ratios)
        number = SPLITS.index(which)
        self._first = sum(sizes[:number])
        self.period = sum(sizes)
        self.key = derive_key(key, "split")
        self._offsets = Permutation(self.period, self.key)[np.arange(self._first, self._first + sizes[number])]
        self._whole_periods, self._rest = divmod(source_length, self.period)
        turned = (self._offsets + self._turn(self._whole_periods)) % self.period
        self._last_offsets = turned[turned < self._rest]

    def __len__(self) -> int:
        return self._whole_periods * len(self._offsets) + len(self._last_offsets)

    def __getitem__(self, index: int) -> int:
        """A row of the source.

        Raises:
            IndexError: There is no such record in this split.
        """
        number, size = check_index(index, len(self)), len(self._offsets)
        period, place = divmod(number, size)
        if period >= self._whole_periods:
            return self._whole_periods * self.period + int(self._last_offsets[number - self._whole_periods * size])
        return period * self.period + (int(self._offsets[place]) + self._turn(period)) % self.period

    def rows(self) -> NDArray[np.int64]:
        """All of them, `[len(self)]`: `split[0]`, `split[1]`, ..."""
        turns = np.array([self._turn(period) for period in range(self._whole_periods)], np.int64)
        starts = np.arange(self._whole_periods, dtype=np.int64) * self.period
        whole = starts[:, None] + (self._offsets + turns[:, None]) % self.period
        return np.concatenate((whole.ravel(), self._whole_periods * self.period + self._last_offsets))

    def __contains__(self, row: object) -> bool:
        """Whether a row of the source, or one that is yet to be appended, belongs to this split."""
        if not isinstance(row, int) or row < 0:
            return False
        period, offset = divmod(row, self.period)
        return bool(((self._offsets + self._turn(period)) % self.period == offset).any())

    @property
    def fingerprint(self) -> str:
        """Of the way of splitting; not of the number of rows."""
        return digest("split", self.period, self.key, self._first, len(self._offsets))

    def _turn(self, period: int) -> int:
        """By how much the pattern is turned in a period, so that it falls in step with nothing in the data."""
        return derive_key(self.key, period) % self.period


def period_of(ratios: Sequence[Weight]) -> list[int]:
    """Ratios as the smallest whole numbers: how many rows of a period each split gets.

    Raises:
        ConfigError: There are not three, they are no weights, or their sum is above `MAX_PERIOD`.
    """
    exact = parse_weights(ratios, title="split:")
    if len(exact) != len(SPLITS):
        raise ConfigError(f"split: {len(exact)} ratios; give three, for train, valid and test, such as 95, 4, 1.")
    unit = math.lcm(*(ratio.denominator for ratio in exact))
    whole = [int(ratio * unit) for ratio in exact]
    divisor = math.gcd(*whole)
    sizes = [size // divisor for size in whole]
    if sum(sizes) > MAX_PERIOD:
        raise ConfigError(
            f"split: the ratios {', '.join(map(str, ratios))} are finer than one in {MAX_PERIOD:,}; round."
        )
    return sizes


@final
class SplitSource:
    """One split of a source, as a source."""

    def __init__(self, source: Source, split: Split) -> None:
        self.source = source
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The record of a row.

        Raises:
            RecordError: It is bad.
        """
        return self.source[self.split[index]]

    def token_counts(self) -> NDArray[np.integer[Any]] | None:
        """`[records]`, the tokens of each, where the source knows them; see `CountsTokens`."""
        lengths = self.source.token_counts() if isinstance(self.source, CountsTokens) else None
        return None if lengths is None else lengths[self.split.rows()]

    @property
    def fingerprint(self) -> str:
        """Of the source and of the way it is split."""
        return digest("split", self.source.fingerprint, self.split.fingerprint)

    def where(self, index: int) -> str:
        """Where the record stands in the source."""
        return self.source.where(self.split[index])
