"""Span corruption (T5, Raffel et al. 2020): spans are cut out, and the decoder gives them back, one after the other.

    text      Thank you for inviting me to your party last week </s>
    source    Thank you <0> me to your party <1> week </s>
    target    <0> for inviting <1> last </s>

Both end with the end token, and what the decoder reads begins with the padding token, as the published models do it.
Shapes: n tokens of a source, m of a target, k spans.
"""

from dataclasses import dataclass
from itertools import count, takewhile
from typing import Self, final

import numpy as np
from numpy.random import Generator

from swissarmy.core.errors import ConfigError
from swissarmy.data.objectives.draws import even_lengths
from swissarmy.data.objectives.options import ObjectiveOptions
from swissarmy.data.objectives.spans import OUTSIDE, among, scattered_spans, starts_of
from swissarmy.data.objectives.token_kinds import kind_of, special_tokens, token_id
from swissarmy.data.samples.examples import Flags, Ids, Sample
from swissarmy.data.source import DataError
from swissarmy.data.tokenizer import Tokenizer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SpanCorruption:
    """Makes a source and a target of a sample."""

    options: ObjectiveOptions
    """How much is cut out, in spans of which length."""
    sentinels: Ids
    """`[k]`: what stands for each span."""
    special: Flags
    """`[v + 1]`: what is never cut out; a span that it interrupts becomes two."""
    start_id: int
    """What the decoder begins with."""
    end_id: int
    """What source and target end with."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, options: ObjectiveOptions) -> Self:
        """With the tokenizer's sentinels, special tokens and end.

        Raises:
            ConfigError: It has no such sentinels, or nothing to begin or end with.
        """
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise ConfigError(
                "span_corruption: the tokenizer needs a pad_token, to begin targets with, and an eos_token."
            )
        sentinels = _sentinels(tokenizer, options.sentinels)
        special = special_tokens(tokenizer)
        special[sentinels] = True
        start, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        return cls(options=options, sentinels=sentinels, special=special, start_id=start, end_id=end)

    def __call__(self, sample: Sample, random: Generator) -> Sample:
        """`input_ids` `[n]`, `decoder_input_ids` and `labels` `[m]`, the former being the latter one token late.

        Raises:
            DataError: A text has more spans than there are sentinels.
        """
        ids = sample["input_ids"]
        ids = ids[:-1] if ids[-1:].tolist() == [self.end_id] else ids
        free = ~kind_of(self.special, ids)
        share, mean = self.options.mask_probability, self.options.mean_span_length
        spans = among(free, scattered_spans(int(free.sum()), share, mean, random, even_lengths))
        starts, hidden = starts_of(spans), spans != OUTSIDE
        sentinels = self._sentinels(int(starts.sum()))
        source = ids.copy()
        source[starts] = sentinels
        target = np.insert(ids[hidden], np.flatnonzero(starts[hidden]), sentinels)
        labels = np.append(target, self.end_id)
        return {
            "input_ids": np.append(source[~hidden | starts], self.end_id),
            "decoder_input_ids": np.insert(labels[:-1], 0, self.start_id),
            "labels": labels,
        }

    def _sentinels(self, number: int) -> Ids:
        if number > len(self.sentinels):
            raise DataError(
                f"a text has {number} hidden spans, and the tokenizer {len(self.sentinels)} sentinels such as "
                f"{self.options.sentinels.format(0)!r}: shorten texts (sequence_length), or raise mean_span_length."
            )
        return self.sentinels[:number]


def _sentinels(tokenizer: Tokenizer, pattern: str) -> Ids:
    """The ids of as many sentinels as there are."""
    token_id(tokenizer, "sentinels", pattern.format(0))
    found = (tokenizer.token_to_id(pattern.format(number)) for number in count())
    return np.array(list(takewhile(lambda each: each is not None, found)), dtype=np.int64)
