"""Which row of which part each sample is: a pure function of the seed and the sample's number.

A part is shuffled without replacement; when it is used up it begins again with a new permutation. Nothing is listed, so
sample 10**12 costs what sample 0 costs, and no amount of data takes memory.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, final

import numpy as np
from numpy.typing import NDArray

from swissarmy.core.errors import ConfigError
from swissarmy.data.order.blend import Blend, BlendSchedule
from swissarmy.data.order.permutation import MAX_LENGTH, derive_key, mix, permute

Indices = NDArray[np.int64]


class Places(NamedTuple):
    """Where samples are, each `[n]`."""

    parts: Indices
    """The part."""
    passes: Indices
    """How often the part was gone through before."""
    positions: Indices
    """The place in the order of that pass; `Order.rows` says which row is there."""


class PartUse(NamedTuple):
    """How much of a part a run sees."""

    samples: int
    """How many samples come from it."""
    epochs: float
    """How often each of its rows is seen; `nan` for a stream."""
    share: float
    """Its share of all samples."""


class Order(Protocol):
    """What a loader needs to know of the order of samples."""

    @property
    def num_samples(self) -> int | None:
        """How many there are; `None`: they never end."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """What the order depends on beside the data, by name, for people to read."""
        ...

    def places(self, samples: Indices) -> Places:
        """Where samples `[n]` are."""
        ...

    def rows(self, places: Places) -> Indices:
        """The row of its part that is at each place, `[n]`; positions past the end begin again from the first."""
        ...


@final
class SampleOrder:
    """The endless order of training.

    Args:
        lengths: How many samples each part has; `None` for a stream, which is read in its own order.
        blend: Which part each sample comes from.
        seed: Every seed is another order.
        shuffle: Whether each pass has its own permutation; otherwise rows come as they are in the part.

    Raises:
        ConfigError: A part that is drawn from is empty, or the blend is of another number of parts.
    """

    num_samples = None

    def __init__(
        self, lengths: Sequence[int | None], blend: Blend | BlendSchedule, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        if len(blend) != len(lengths):
            raise ConfigError(f"a blend of {len(blend)} parts cannot order {len(lengths)} parts.")
        empty = [part for part, length in enumerate(lengths) if length == 0]
        blends = blend.blends if isinstance(blend, BlendSchedule) else [blend]
        if drawn := [part for part in empty if any(each.shares[part] for each in blends)]:
            raise ConfigError(f"parts {', '.join(map(str, drawn))} are empty; give them weight 0.")
        self.lengths = tuple(lengths)
        self.blend = blend
        self.seed = seed
        self.shuffle = shuffle
        self._lengths = np.array([MAX_LENGTH if length is None else max(length, 1) for length in lengths], np.int64)
        self._keys = np.array([derive_key(seed, "order", part) for part in range(len(lengths))], np.uint64)

    def places(self, samples: Indices) -> Places:
        """Where samples `[n]` are; a stream is one long pass."""
        parts, draws = self.blend.locate(samples)
        return Places(parts, *np.divmod(draws, self._lengths[parts]))

    def rows(self, places: Places) -> Indices:
        """The row of its part that is at each place, `[n]`; positions past the end begin again from the first."""
        lengths = self._lengths[places.parts]
        positions = places.positions % lengths
        if not self.shuffle:
            return positions
        keys = mix(mix(places.passes.astype(np.uint64)) + self._keys[places.parts])
        return permute(positions, lengths, keys)

    def uses(self, num_samples: int) -> list[PartUse]:
        """How much of each part the first samples are."""
        counts = self.blend.counts(num_samples)
        return [
            PartUse(count, float("nan") if length is None else count / max(length, 1), count / max(num_samples, 1))
            for count, length in zip(counts, self.lengths, strict=True)
        ]

    @property
    def fingerprint(self) -> dict[str, str]:
        """Seed, shuffling, and the share of each part."""
        return {"seed": str(self.seed), "shuffle": str(self.shuffle), "weights": str(self.blend)}


@final
class OneByOne:
    """Every row of every part once, in the order in which they are: for evaluation.

    Args:
        lengths: How many samples each part has.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self._ends = np.cumsum(self.lengths, dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """How many there are in all."""
        return sum(self.lengths)

    @property
    def fingerprint(self) -> dict[str, str]:
        """That it is this order."""
        return {"order": "one by one"}

    def places(self, samples: Indices) -> Places:
        """Where samples `[n]` are."""
        parts = np.searchsorted(self._ends, samples, side="right")
        starts = self._ends - np.array(self.lengths, np.int64)
        return Places(parts, np.zeros_like(samples), samples - starts[parts])

    def rows(self, places: Places) -> Indices:
        """The positions are the rows."""
        return places.positions
