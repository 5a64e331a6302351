"""Masked language modelling (Devlin et al. 2019), masked anew each time a text is seen (Liu et al. 2019).

Of the hidden tokens most become the mask token, some become any token, and some stay: the model cannot know which of
the tokens it sees are right. With whole words hidden, all tokens of a word are, and for each it is drawn anew what it
becomes. The number that is hidden is rounded up or down at random, so that the share is right on average, in short
texts too.
Shapes: n tokens of a text, b samples, s tokens of the longest.
"""

from dataclasses import dataclass
from typing import Self, final

import numpy as np
from numpy.random import Generator

from swissarmy.core.errors import ConfigError
from swissarmy.data.loading.collate import Batch, Padding, Samples
from swissarmy.data.objectives.draws import drawn, rounded
from swissarmy.data.objectives.options import ObjectiveOptions
from swissarmy.data.objectives.token_kinds import kind_of, special_tokens, token_id, word_beginnings
from swissarmy.data.samples.examples import IGNORED, Flags, Ids, Sample
from swissarmy.data.tokenizer import Tokenizer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TokenMasking:
    """Hides tokens, or words, of a sample."""

    options: ObjectiveOptions
    """How many, and what becomes of them."""
    mask_id: int
    """The mask token."""
    special: Flags
    """`[v + 1]`: what is never hidden."""
    begins_word: Flags | None
    """`[v + 1]`: where words begin, if words are hidden."""
    replacements: Ids
    """`[r]`: what may stand for a token at random."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, options: ObjectiveOptions) -> Self:
        """With the tokenizer's mask token, special tokens and words.

        Raises:
            ConfigError: It has no mask token, no other than special ones, or does not say where words begin.
        """
        special = special_tokens(tokenizer)
        if special.all():
            raise ConfigError("masked_lm: all tokens of the tokenizer are special, and none can be hidden.")
        return cls(
            options=options,
            mask_id=mask_token_id(tokenizer, options),
            special=special,
            begins_word=word_beginnings(tokenizer) if options.mask_whole_words else None,
            replacements=np.flatnonzero(~special),
        )

    def __call__(self, sample: Sample, random: Generator) -> Sample:
        """The sample with `input_ids` of which some are hidden, and `targets`: those ids, -100 elsewhere; `[n]`."""
        ids: Ids = sample["input_ids"]
        hidden = self._hidden(self._words(sample), random)
        fate, other = random.random((2, len(ids)))
        input_ids = np.where(hidden & (fate >= self.options.mask_kept), self.mask_id, ids)
        swapped = hidden & (fate >= 1 - self.options.mask_random)
        input_ids[swapped] = self.replacements[(other[swapped] * len(self.replacements)).astype(np.int64)]
        return {**sample, "input_ids": input_ids, "targets": np.where(hidden, ids, IGNORED)}

    def _words(self, sample: Sample) -> Ids:
        """The number of the word that each token is in, `[n]`; -1 for special tokens."""
        ids = sample["input_ids"]
        free = ~kind_of(self.special, ids)
        begins = free.copy()
        if self.begins_word is not None:
            documents = sample.get("document_ids", np.zeros(len(ids)))
            goes_on = np.zeros(len(ids), dtype=np.bool_)
            goes_on[1:] = free[:-1] & (documents[1:] == documents[:-1])
            begins &= kind_of(self.begins_word, ids) | ~goes_on
        return np.where(free, begins.cumsum() - 1, -1)

    def _hidden(self, words: Ids, random: Generator) -> Flags:
        """Which tokens are of the words that are hidden, `[n]`."""
        count = int(words.max(initial=-1)) + 1
        chosen = np.zeros(count + 1, dtype=np.bool_)  # the last is for special tokens
        chosen[drawn(count, rounded(count * self.options.mask_probability, random), random)] = True
        return chosen[words]


@final
@dataclass(frozen=True, kw_only=True)
class MaskedCollator:
    """For encoders: `input_ids`, `targets` and `padding_mask` `[b, s]`, and `token_type_ids` where samples have them.

    Of packed rows, `document_ids` and `position_ids` `[b, s]` in place of the padding mask; padding is document -1.
    """

    padding: Padding
    """How rows are made equally long."""
    packed: bool = False
    """Whether rows have several texts."""

    def __call__(self, samples: Samples) -> Batch:
        """The batch."""
        batch = {
            "input_ids": self.padding.ids(samples, "input_ids"),
            "targets": self.padding.rows(samples, "targets", IGNORED, np.int64),
        }
        if self.packed:
            documents = self.padding.rows(samples, "document_ids", -1, np.int64)
            positions = self.padding.rows(samples, "position_ids", 0, np.int64)
            return batch | {"document_ids": documents, "position_ids": positions}
        if samples and all("token_type_ids" in sample for sample in samples):
            batch["token_type_ids"] = self.padding.rows(samples, "token_type_ids", 0, np.int64)
        return batch | {"padding_mask": self.padding.mask(samples, "input_ids")}


def mask_token_id(tokenizer: Tokenizer, options: ObjectiveOptions) -> int:
    """The id of the token that the options name, or the tokenizer's own.

    Raises:
        ConfigError: There is none.
    """
    if options.mask_token is not None:
        return token_id(tokenizer, "mask_token", options.mask_token)
    return token_id(tokenizer, "mask_token", tokenizer.special_tokens.get("mask_token"), "[MASK]", "<mask>")
