"""Several sources as one, such as the shards of a data set."""

import copy
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, final

import numpy as np
import numpy.typing as npt

from swissarmy.data.source import CountsTokens, Source, check_index, digest

_MOST_OPEN = 128
"""Parts; each open one holds a file or two, of which a process may have about a thousand."""


@final
class Concatenated:
    """The records of several sources, one source after another.

    Args:
        parts: what is opened of them is closed again when many others were read since.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self._opened: OrderedDict[int, Source] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """The parts alone."""
        return {"parts": self.parts, "_opened": OrderedDict()}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """A record of one of the parts."""
        part, number = self._find(index)
        return part[number]

    def where(self, index: int) -> str:
        """Where the part says."""
        part, number = self._find(index)
        return part.where(number)

    def token_counts(self) -> npt.NDArray[np.integer[Any]] | None:
        """`[records]`, the tokens of each, where all parts know them; see `CountsTokens`."""
        known = [part.token_counts() for part in map(copy.copy, self.parts) if isinstance(part, CountsTokens)]
        lengths = [each for each in known if each is not None]
        return np.concatenate(lengths) if lengths and len(lengths) == len(self.parts) else None

    @cached_property
    def fingerprint(self) -> str:
        """Of the parts and their order."""
        return digest("Concatenated", [part.fingerprint for part in self.parts])

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        # a copy is open for as long as it takes to count
        return tuple(accumulate(len(copy.copy(part)) for part in self.parts))

    def _find(self, index: int) -> tuple[Source, int]:
        number = check_index(index, len(self))
        place = bisect_right(self._ends, number)
        return self._open(place), number - (self._ends[place - 1] if place else 0)

    def _open(self, place: int) -> Source:
        part = self._opened.pop(place, None)
        self._opened[place] = part = copy.copy(self.parts[place]) if part is None else part
        if len(self._opened) > _MOST_OPEN:
            self._opened.popitem(last=False)
        return part
