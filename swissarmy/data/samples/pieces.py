"""`Pieces`: samples none of which is too long, because long ones are split or left out.

The tokens of every sample are counted once; after that a piece is found by its number, like any record.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from swissarmy.core.config import report
from swissarmy.data.samples.examples import Sample
from swissarmy.data.samples.lengths import Lengths, count_lengths
from swissarmy.data.source import DataError, Source, check_index, digest

Numbers = NDArray[np.int64]
TooLong = Literal["split", "drop"]


class PieceTable(NamedTuple):
    """Documents cut so that each piece fits."""

    documents: Numbers
    """`[pieces]`: which document each is of, in the order of the documents."""
    begins: Numbers
    """`[pieces]`: its first token there."""
    sizes: Numbers
    """`[pieces]`: its tokens."""


@final
class Pieces:
    """Samples of at most `length` tokens.

    Args:
        samples: with `input_ids` and `loss_mask`, such as `Examples`.
        length: the most tokens of a piece.
        too_long: `split` a longer sample into as many as it takes (reading one of them encodes the whole), or `drop`.
        lengths: `count_lengths(samples)`, if it is known already.

    Raises:
        ConfigError: an argument makes no sense.
        DataError: nothing is left.
    """

    def __init__(
        self, samples: Source, length: int, *, too_long: TooLong = "split", lengths: Lengths | None = None
    ) -> None:
        self.samples, self.length, self.too_long = samples, length, too_long
        self._table = cut_up(count_lengths(samples) if lengths is None else lengths, length, too_long)
        if not len(self._table.documents):
            raise DataError(f"of {len(samples)} samples none is left: each is empty or has more than {length} tokens")

    def __len__(self) -> int:
        return len(self._table.documents)

    def __getitem__(self, index: int) -> Sample:
        """A sample, or a piece of one."""
        index = check_index(index, len(self))
        sample = self.samples[int(self._table.documents[index])]
        return piece_of(sample, int(self._table.begins[index]), self.length)

    def token_counts(self) -> Numbers:
        """`[pieces]`: the tokens of each."""
        return self._table.sizes

    @property
    def fingerprint(self) -> str:
        """Of the samples and how they are cut."""
        return digest("pieces", self.samples.fingerprint, self.length, self.too_long)

    def where(self, index: int) -> str:
        """Where the sample stands that a piece is of."""
        return self.samples.where(int(self._table.documents[check_index(index, len(self))]))


def cut_up(lengths: Lengths | Numbers, length: int, too_long: TooLong) -> PieceTable:
    """Which pieces of at most `length` tokens documents of these lengths give; empty ones give none.

    Raises:
        ConfigError: `length` is below 1, or there is no such `too_long`.
    """
    problems = [] if length >= 1 else [f"length={length} must be at least 1"]
    if too_long not in ("split", "drop"):
        problems.append(f"too_long={too_long!r} is neither 'split' nor 'drop'")
    report("Pieces:", problems)
    sizes = np.asarray(lengths, dtype=np.int64)
    if too_long == "drop":
        documents = np.flatnonzero((sizes > 0) & (sizes <= length))
        return PieceTable(documents, np.zeros_like(documents), sizes[documents])
    counts = -(-sizes // length)
    documents = np.repeat(np.arange(len(sizes)), counts)
    first_pieces = np.cumsum(counts) - counts
    begins = (np.arange(len(documents)) - first_pieces[documents]) * length
    return PieceTable(documents, begins, np.minimum(sizes[documents] - begins, length))


def piece_of(sample: Mapping[str, Any], begin: int, length: int) -> Sample:
    """The tokens of a sample from `begin` on, at most `length`; the first has nothing before it and is not scored.

    Raises:
        DataError: the sample is shorter than when it was counted, or none of a causal model.
    """
    if "loss_mask" not in sample:
        raise DataError(f"only samples with input_ids and loss_mask can be cut and packed, not {', '.join(sample)}")
    ids = sample["input_ids"][begin : begin + length]
    if not len(ids):
        raise DataError(f"a sample ends before its token {begin}: the data changed while it was in use")
    loss_mask = sample["loss_mask"][begin : begin + length].copy()
    loss_mask[0] = False
    return {"input_ids": ids, "loss_mask": loss_mask}
