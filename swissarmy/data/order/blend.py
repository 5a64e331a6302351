"""Which part a sample comes from, when several are blended by weight.

Parts with shares p are drawn so that among the first n samples, for every n, each part has its ideal number n * p
rounded down or rounded up: never a whole sample away, for any number of parts, without an error that grows. Such
sequences exist (Tijdeman, "The Chairman Assignment Problem", 1980), but the usual ways to one start at sample 0. Here
any sample is found directly:

- The j-th draw of a part has a window: not before (j - 1) / p samples have gone by, and before j / p have. Counts are
  right if every draw falls into its window.
- Samples come in blocks at least as long as any window. At a border between two blocks some windows are open, and which
  of their draws have been made depends on the border alone. They are chosen so that the block before the border need
  not draw ahead of time, and, among all such choices, so that windows which close early come first (`_drawn_already`).
- Inside a block the open window that closes first is drawn from first, which meets all deadlines if they can be met.

Blocks are at most `MAX_BLOCK` long. Parts so rare that their windows are longer are blended among themselves, and the
draws of all of them are spread evenly over the samples. Then a part is within one sample of its share of its group's
draws, which moves the counts of common parts by up to half a sample, and those of rare ones by up to one.

All of it is in whole numbers of any size. Windows that do not start at sample 0 differ from the ideal by less than
twice as much; less than one is impossible there for most weights (Fraenkel's conjecture says for which).
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Final, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from swissarmy.core.errors import ConfigError
from swissarmy.data.order.weights import Weight, parse_weights

Indices = NDArray[np.int64]

MIN_BLOCK: Final = 1024
MAX_BLOCK: Final = 65536
"""Samples of a block, which is what finding one sample costs at most."""


@final
class Blend:
    """An endless sequence of parts in exact proportion to their weights.

    Args:
        weights: One for each part; see `parse_weights`. A part of weight 0 is never drawn.

    Raises:
        ConfigError: A weight is negative or not a number, or all are 0.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        exact = parse_weights(weights)
        total = sum(exact)
        self.shares = tuple(weight / total for weight in exact)
        """The share of each part; they sum to 1."""
        drawn = [part for part, share in enumerate(self.shares) if share]
        common = [part for part in drawn if self.shares[part] * MAX_BLOCK >= 1]
        self._common = common or drawn
        self._rare = sorted(set(drawn) - set(self._common))
        self._common_turns = _Turns([self.shares[part] for part in self._common])
        self._rare_blend = Blend([self.shares[part] for part in self._rare]) if self._rare else None
        self._rare_share = sum((self.shares[part] for part in self._rare), Fraction(0))

    def __len__(self) -> int:
        return len(self.shares)

    def __repr__(self) -> str:
        return f"Blend([{', '.join(map(str, self.shares))}])"

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        """Which part each sample comes from, and which of the draws from that part it is, counted from 0.

        Args:
            samples: `[n]`, numbers from 0, in any order; neighbours are found together.
        """
        parts, draws = np.empty_like(samples), np.empty_like(samples)
        before = self._rare_before(samples)
        is_rare = self._rare_before(samples + 1) > before
        for group, blend, here, turns in (
            (self._common, self._common_turns, ~is_rare, samples - before),
            (self._rare, self._rare_blend, is_rare, before),
        ):
            if blend is not None and here.any():
                members, draws[here] = blend.locate(turns[here])
                parts[here] = np.array(group, np.int64)[members]
        return parts, draws

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first samples come from each part."""
        counts = [0] * len(self)
        rare = int(self._rare_before(np.array([num_samples], np.int64))[0])
        for part, count in zip(self._common, self._common_turns.counts(num_samples - rare), strict=True):
            counts[part] = count
        for part, count in zip(self._rare, self._rare_blend.counts(rare) if self._rare_blend else (), strict=True):
            counts[part] = count
        return counts

    def _rare_before(self, samples: Indices) -> Indices:
        """How many of the first samples are of rare parts: their share, rounded to the nearest."""
        if self._rare_blend is None:
            return np.zeros_like(samples)
        share, unit = self._rare_share.numerator, self._rare_share.denominator
        return np.array([(2 * sample * share + unit) // (2 * unit) for sample in samples.tolist()], np.int64)


class _Open(NamedTuple):
    """A window with a border inside: a share of `units`, of which `fraction` of a draw is due at the border."""

    member: int
    units: int
    fraction: int


@final
class _Turns:
    """What `Blend` does, for shares that are at least one in `MAX_BLOCK` of their sum."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        total = sum(shares)
        relative = [share / total for share in shares]
        self.unit = math.lcm(*(share.denominator for share in relative))
        self.units = [int(share * self.unit) for share in relative]
        self.block = max(MIN_BLOCK, -(self.unit // -min(self.units)))
        self._latest: tuple[int, Indices, Indices] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        members, draws = np.empty_like(samples), np.empty_like(samples)
        blocks = samples // self.block
        for block in np.unique(blocks):
            here = blocks == block
            members_of_block, draws_of_block = self._block(int(block))
            offsets = samples[here] - block * self.block
            members[here], draws[here] = members_of_block[offsets], draws_of_block[offsets]
        return members, draws

    def counts(self, num_samples: int) -> list[int]:
        block, offset = divmod(num_samples, self.block)
        inside = np.bincount(self._block(block)[0][:offset], minlength=len(self.units))
        return [before + int(more) for before, more in zip(self._counts_before(block), inside, strict=True)]

    def _block(self, block: int) -> tuple[Indices, Indices]:
        """Member and draw of each sample of a block; the latest is kept."""
        if self._latest[0] != block:
            counts = self._counts_before(block)
            members, draws = np.empty(self.block, np.int64), np.empty(self.block, np.int64)
            for offset, member in enumerate(self._earliest_deadline_first(block)):
                members[offset], draws[offset] = member, counts[member]
                counts[member] += 1
            self._latest = (block, members, draws)
        return self._latest[1:]

    def _earliest_deadline_first(self, block: int) -> Iterator[int]:
        waiting = sorted(self._windows(block), reverse=True)
        is_open: list[tuple[int, int]] = []
        for sample in range(block * self.block, (block + 1) * self.block):
            while waiting and waiting[-1][0] <= sample:
                heapq.heappush(is_open, waiting.pop()[1:])
            deadline, member = heapq.heappop(is_open)
            assert sample < deadline, "borders are chosen so that no draw comes too late"
            yield member

    def _windows(self, block: int) -> Iterator[tuple[int, int, int]]:
        """For each draw in a block: the first sample that it may be, that which it may no longer be, the member."""
        end = (block + 1) * self.block
        ranges = zip(self._counts_before(block), self._counts_before(block + 1), self.units, strict=True)
        for member, (first, stop, units) in enumerate(ranges):
            for draw in range(first, stop):
                yield draw * self.unit // units, min(end, -((draw + 1) * self.unit // -units)), member

    def _counts_before(self, block: int) -> list[int]:
        """How many draws each member has behind it at the start of a block."""
        whole_and_fraction = [divmod(block * self.block * units, self.unit) for units in self.units]
        counts = [whole for whole, _ in whole_and_fraction]
        is_open = [
            _Open(member, units, fraction)
            for member, (units, (_, fraction)) in enumerate(zip(self.units, whole_and_fraction, strict=True))
            if fraction
        ]
        for member in _drawn_already(is_open, self.unit):
            counts[member] += 1
        return counts


def _drawn_already(is_open: Sequence[_Open], unit: int) -> Iterator[int]:
    """The members whose draw is made before a border that lies in its window.

    The windows are laid end to end along a line, those that opened last first, each as long as its fraction, and the
    line is cut into whole pieces. If each piece is matched to one window that overlaps it, no draw was made ahead of
    time. Windows are taken in the order in which they close, if there still is such a matching; so at every deadline as
    many draws as possible have been made (a greedy choice in a transversal matroid). By Hall's theorem that is enough
    for the deadlines of the block that follows: the fractions themselves show that some choice is.

    A window overlaps one piece, or two neighbours. So pieces that windows join form runs, and a run of n pieces can be
    matched to n windows: the n - 1 that join it and one more, after which it is full.
    """
    pieces, start = dict[int, tuple[int, int]](), 0
    for window in sorted(is_open, key=lambda window: (Fraction(window.fraction, window.units), window)):
        end = start + window.fraction
        pieces[window.member] = (start // unit, (end - 1) // unit)
        start = end
    leaders = list(range(start // unit))
    is_full = [False] * len(leaders)
    for window in sorted(is_open, key=lambda window: (Fraction(unit - window.fraction, window.units), window)):
        first, last = (_leader(leaders, piece) for piece in pieces[window.member])
        if not (is_full[first] and is_full[last]):
            leaders[first] = last
            is_full[last] = first == last or is_full[first] or is_full[last]
            yield window.member


def _leader(leaders: list[int], piece: int) -> int:
    """Which piece stands for the run that a piece is in."""
    while leaders[piece] != piece:
        leaders[piece] = piece = leaders[leaders[piece]]
    return piece


@final
class BlendSchedule:
    """Blends that follow each other; a part goes on drawing where it was.

    Args:
        stages: The sample from which each blend holds, rising from 0, and the blend.

    Raises:
        ConfigError: The first stage does not begin at 0, the stages do not rise, or their parts differ in number.
    """

    def __init__(self, stages: Sequence[tuple[int, Blend]]) -> None:
        self.starts = np.array([start for start, _ in stages], np.int64)
        self.blends = [blend for _, blend in stages]
        if not stages or self.starts[0] != 0 or (np.diff(self.starts) <= 0).any():
            raise ConfigError(f"stages begin at {self.starts.tolist()}; they must rise from 0.")
        if len({len(blend) for blend in self.blends}) > 1:
            raise ConfigError(f"stages blend {[len(blend) for blend in self.blends]} parts; all must blend the same.")
        drawn = [blend.counts(int(size)) for blend, size in zip(self.blends, np.diff(self.starts), strict=False)]
        self._drawn_before = np.cumsum([[0] * len(self), *drawn], axis=0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.blends[0])

    def __repr__(self) -> str:
        stages = zip(self.starts.tolist(), self.blends, strict=True)
        return "; ".join(f"from sample {start} {blend}" for start, blend in stages)

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        """As `Blend.locate`."""
        parts, draws = np.empty_like(samples), np.empty_like(samples)
        stages = np.searchsorted(self.starts, samples, side="right") - 1
        for stage in np.unique(stages):
            here = stages == stage
            parts[here], inside = self.blends[stage].locate(samples[here] - self.starts[stage])
            draws[here] = inside + self._drawn_before[stage, parts[here]]
        return parts, draws

    def counts(self, num_samples: int) -> list[int]:
        """As `Blend.counts`."""
        stage = max(0, int(np.searchsorted(self.starts, num_samples, side="right")) - 1)
        inside = self.blends[stage].counts(num_samples - int(self.starts[stage]))
        return [int(before) + more for before, more in zip(self._drawn_before[stage], inside, strict=True)]
