"""How many tokens each sample has: counted once, for packing, splitting and bucketing.

Counting encodes every record, so it takes as long as a pass over the data; workers share it, and a folder keeps it.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from swissarmy.data.samples.array_cache import cached
from swissarmy.data.samples.encoders import TokensEncoder
from swissarmy.data.samples.examples import Examples, length_of
from swissarmy.data.source import CountsTokens, RecordError, Source, digest

Lengths = NDArray[np.int32]

_LOG = logging.getLogger(__name__)
_BLOCK = 1024
"""Samples that a worker counts at a time."""


def count_lengths(
    samples: Source, *, num_workers: int = 0, max_bad_records: int = 0, cache_folder: Path | None = None
) -> Lengths:
    """The tokens of each sample, `[samples]`; 0 for a bad one.

    Args:
        samples: `Examples`, or anything whose records have `input_ids`.
        num_workers: processes that encode; 0 for this one alone.
        max_bad_records: how many bad records to pass over, each with a line in the log.
        cache_folder: keep the counts there under the fingerprint of the samples, and read them if they are there.

    Raises:
        RecordError: there are more bad records than that.
    """
    known = _known(samples)
    if known is not None:
        return known
    name = f"lengths-{digest(samples.fingerprint, max_bad_records)}"
    return cached(cache_folder, name, 1, lambda: [_counted(samples, num_workers, max_bad_records)])[0]


def _known(samples: Source) -> Lengths | None:
    """Without encoding anything, where samples are pieces that were counted, or records are ids already."""
    if isinstance(samples, CountsTokens):
        lengths = samples.token_counts()
        return None if lengths is None else lengths.astype(np.int32)
    if not isinstance(samples, Examples) or not isinstance(samples.encode, TokensEncoder):
        return None
    lengths = samples.source.token_counts() if isinstance(samples.source, CountsTokens) else None
    if lengths is None:
        return None
    return (lengths if samples.cut is None else np.minimum(lengths, samples.cut.max_length)).astype(np.int32)


def _counted(samples: Source, num_workers: int, max_bad_records: int) -> Lengths:
    lengths = np.zeros(len(samples), dtype=np.int32)
    done, bad = 0, 0
    for block, messages in _blocks(samples, num_workers):
        lengths[done : done + len(block)] = block
        done += len(block)
        for message in messages:
            bad += 1
            if bad > max_bad_records:
                more = f" ({bad} bad records, and at most {max_bad_records} are allowed)" if max_bad_records else ""
                raise RecordError(message + more)
            _LOG.warning("left out: %s", message)
    return lengths


def _blocks(samples: Source, num_workers: int) -> Iterator[tuple[Lengths, list[str]]]:
    # a generator of its own: making a loader draws from torch's otherwise, and would change what is random later
    counters = _Counter(samples)
    generator = torch.Generator()
    loader: DataLoader[Any] = DataLoader(
        counters, batch_size=None, num_workers=num_workers, collate_fn=_same, generator=generator
    )
    yield from loader


@final
class _Counter(Dataset[tuple[Lengths, list[str]]]):
    """Block i of the counts, and what was wrong with the bad records in it."""

    def __init__(self, samples: Source) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return -(-len(self.samples) // _BLOCK)

    def __getitem__(self, block: int) -> tuple[Lengths, list[str]]:
        first, stop = block * _BLOCK, min((block + 1) * _BLOCK, len(self.samples))
        lengths, messages = np.zeros(stop - first, dtype=np.int32), []
        for index in range(first, stop):
            try:
                lengths[index - first] = length_of(self.samples[index])
            except RecordError as error:
                messages.append(str(error))
        return lengths, messages


def _same(item: Any) -> Any:
    return item
