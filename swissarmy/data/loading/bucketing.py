"""Length bucketing: batches of samples that are about equally long, so that little of them is padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from swissarmy.data.order.permutation import Permutation, derive_key
from swissarmy.data.source import DataError


@final
@dataclass(frozen=True, kw_only=True)
class Bucketing:
    """Batches of samples that are about equally long, by sorting within windows of whole global batches."""

    lengths: Sequence[NDArray[Any]]
    """The tokens of each sample, for each part: `count_lengths(part)`."""
    window: int = 64
    """How many global batches are sorted together."""
    seed: int = 0
    """Decides the order of the batches in a window."""


def bucket(lengths: ArrayLike, batch_size: int, key: int) -> NDArray[np.int64]:
    """Rearrange a window of samples: sort it by length, cut it into batches, shuffle the batches.

    A pure function: a loader that calls it window by window can begin at any of them.

    Args:
        lengths: `[n]`, of each sample of the window, in the order in which they would be drawn.
        batch_size: samples in a global batch.
        key: decides the order of the batches; another one for each window.

    Returns:
        `[n]`: which sample comes when. What does not fill a batch comes last, as it would have.
    """
    lengths = np.asarray(lengths)
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} must be at least 1")
    by_length = np.argsort(lengths, kind="stable").astype(np.int64)
    num_batches = len(by_length) // batch_size
    if num_batches < 2:
        return by_length
    whole = num_batches * batch_size
    batches = by_length[:whole].reshape(num_batches, batch_size)
    order = Permutation(num_batches, derive_key("bucket", key))[np.arange(num_batches)]
    return np.concatenate((batches[order].ravel(), by_length[whole:]))
