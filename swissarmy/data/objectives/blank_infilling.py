"""Autoregressive blank infilling (GLM, Du et al. 2022): spans are cut out, and given back after the text, shuffled.

    text       x1 x2 x3 x4 x5 x6
    input      x1 x2 [M] x4 [M]  <s> x5 x6  <s> x3          <s>: start, <e>: end, [M]: mask
    targets                       x5 x6 <e>  x3 <e>
    position    0  1  2  3  4      4  4  4   2  2           with block positions; else 0 1 2 3 ...
    in block    0  0  0  0  0      1  2  3   1  2

The text before the spans is seen from everywhere (`PrefixLM`), the spans only from behind.
Hidden are short spans (Poisson lengths; `[MASK]`), or whole sentences (`[sMASK]`), or the end of the text, half of it
or more, as in writing on (`[gMASK]`).
Shapes: n tokens of a row, b samples, s tokens of the longest.
"""

from dataclasses import dataclass
from typing import Self, final

import numpy as np
import torch
from numpy.random import Generator

from swissarmy.core.errors import ConfigError
from swissarmy.data.loading.collate import Batch, Padding, Samples
from swissarmy.data.objectives.draws import drawn, poisson_lengths
from swissarmy.data.objectives.masked_lm import mask_token_id
from swissarmy.data.objectives.options import ObjectiveOptions
from swissarmy.data.objectives.spans import OUTSIDE, among, hidden_tokens, number_of_spans, scattered_spans, starts_of
from swissarmy.data.objectives.token_kinds import kind_of, sentence_ends, special_tokens, token_id
from swissarmy.data.samples.examples import IGNORED, Flags, Ids, Sample
from swissarmy.data.tokenizer import Tokenizer


@final
@dataclass(frozen=True, kw_only=True)
class InfillingTokens:
    """What blank infilling puts into a text."""

    short: int
    """For a short span."""
    sentence: int
    """For sentences."""
    long: int
    """For the end of a text."""
    start: int
    """Before a span that is given back."""
    end: int
    """After it."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, options: ObjectiveOptions) -> Self:
        """Those of GLM's tokenizers, as far as the options name no others.

        Raises:
            ConfigError: The tokenizer lacks one. One mask token does for all lengths.
        """
        mask = mask_token_id(tokenizer, options)
        sentence, long = (tokenizer.token_to_id(token) for token in ("[sMASK]", "[gMASK]"))
        starts = (options.infilling_start_token,) if options.infilling_start_token else ("<|startofpiece|>", "<sop>")
        ends = (options.infilling_end_token,) if options.infilling_end_token else ("<|endofpiece|>", "<eop>")
        return cls(
            short=mask,
            sentence=mask if sentence is None else sentence,
            long=mask if long is None else long,
            start=token_id(tokenizer, "infilling_start_token", *starts),
            end=token_id(tokenizer, "infilling_end_token", *ends),
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class BlankInfilling:
    """Cuts spans out of a sample, and appends them."""

    options: ObjectiveOptions
    """How much is hidden, and in what pieces."""
    tokens: InfillingTokens
    """What is put in."""
    special: Flags
    """`[v + 1]`: what is not hidden, unless it is inside a long end; a span that it interrupts becomes two."""
    ends_sentence: Flags
    """`[v + 1]`: where sentences end."""
    end_ids: tuple[int, ...]
    """Ends of texts, which are left out: each span has an end."""
    longest: int | None
    """The most tokens of a row; of a text so much is cut off at its end that its spans fit in."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, options: ObjectiveOptions, longest: int | None) -> Self:
        """With the tokenizer's mask tokens, special tokens and sentences.

        Raises:
            ConfigError: It lacks some, or rows of `longest` tokens have no room.
        """
        made = cls(
            options=options,
            tokens=InfillingTokens.of(tokenizer, options),
            special=special_tokens(tokenizer),
            ends_sentence=sentence_ends(tokenizer),
            end_ids=tokenizer.eos_token_ids,
            longest=longest,
        )
        if longest is not None and longest - 2 * made._most_spans(longest) < 2:
            raise ConfigError(f"blank_infilling: sequence_length={longest} has no room for a text and its spans.")
        return made

    def __call__(self, sample: Sample, random: Generator) -> Sample:
        """`input_ids`, `targets`, `position_ids` and `block_position_ids` `[n]`, and `prefix_lengths` `[]`."""
        ids = self._text(sample["input_ids"])
        spans, mask_id = self._spans(ids, random)
        starts, seen = starts_of(spans), spans == OUTSIDE
        begins = np.flatnonzero(starts)
        context = np.where(starts, mask_id, ids)[seen | starts]
        places = ((seen | starts).cumsum() - 1)[begins]  # of the masks, in the context
        pieces = np.split(ids[~seen], np.flatnonzero(starts[~seen])[1:]) if len(begins) else []
        order = drawn(len(pieces), len(pieces), random)
        given = [np.insert(pieces[each], 0, self.tokens.start) for each in order]
        wanted = [np.append(pieces[each], self.tokens.end) for each in order]
        lengths = np.array([len(each) for each in given], dtype=np.int64)
        in_block = [np.zeros(len(context), np.int64), *(np.arange(length) + 1 for length in lengths)]
        return {
            "input_ids": np.concatenate([context, *given]),
            "targets": np.concatenate([np.full(len(context), IGNORED), *wanted]),
            "position_ids": self._positions(len(context), np.repeat(places[order], lengths)),
            "block_position_ids": np.concatenate(in_block),
            "prefix_lengths": np.array(len(context)),
        }

    def _text(self, ids: Ids) -> Ids:
        """Without its end token, and with room for its spans."""
        if len(ids) > 1 and ids[-1] in self.end_ids:
            ids = ids[:-1]
        return ids if self.longest is None else ids[: self.longest - 2 * self._most_spans(self.longest)]

    def _most_spans(self, length: int) -> int:
        return number_of_spans(length, self.options.mask_probability, self.options.mean_span_length)

    def _positions(self, context: int, places: Ids) -> Ids:
        if self.options.infilling_block_positions:
            return np.concatenate([np.arange(context), places])
        return np.arange(context + len(places))

    def _spans(self, ids: Ids, random: Generator) -> tuple[Ids, int]:
        """What to hide, `[n]`, and which token stands for it."""
        free, kind = ~kind_of(self.special, ids), random.random()
        if kind < self.options.infilling_long and free.sum() > 1:
            return _long_end(free, random), self.tokens.long
        if kind >= 1 - self.options.infilling_sentences:
            sentences = np.concatenate(([0], kind_of(self.ends_sentence, ids)[:-1].cumsum()))[free]
            if sentences.size and sentences[0] != sentences[-1]:
                return self._limited(among(free, self._sentences(sentences, random))), self.tokens.sentence
        share, mean = self.options.mask_probability, self.options.mean_span_length
        spans = among(free, scattered_spans(int(free.sum()), share, mean, random, poisson_lengths))
        return self._limited(spans), self.tokens.short

    def _sentences(self, sentences: Ids, random: Generator) -> Ids:
        """As many sentences as are needed for the share, and never all, from the sentence of each token."""
        _, numbers, lengths = np.unique(sentences, return_inverse=True, return_counts=True)
        order = drawn(len(lengths), len(lengths) - 1, random)
        before = lengths[order].cumsum() - lengths[order]
        chosen = order[before < hidden_tokens(len(sentences), self.options.mask_probability)]
        return np.where(np.isin(numbers, chosen), numbers, OUTSIDE)

    def _limited(self, spans: Ids) -> Ids:
        """No more spans than a row has room for."""
        if self.longest is None:
            return spans
        return np.where(starts_of(spans).cumsum() <= self._most_spans(self.longest), spans, OUTSIDE)


@final
@dataclass(frozen=True, kw_only=True)
class InfillingCollator:
    """`input_ids`, `targets`, `position_ids` and `padding_mask` `[b, s]`, `prefix_lengths` `[b]`."""

    padding: Padding
    """How rows are made equally long; on the right, as prefixes are counted from the left."""
    block_positions: bool = False
    """Whether there are `block_position_ids` `[b, s]` as well."""

    def __call__(self, samples: Samples) -> Batch:
        """The batch."""
        lengths = [int(sample["prefix_lengths"]) for sample in samples]
        batch = {
            "input_ids": self.padding.ids(samples, "input_ids"),
            "targets": self.padding.rows(samples, "targets", IGNORED, np.int64),
            "position_ids": self.padding.rows(samples, "position_ids", 0, np.int64),
            "padding_mask": self.padding.mask(samples, "input_ids"),
            "prefix_lengths": torch.tensor(lengths, dtype=torch.int64),
        }
        if self.block_positions:
            batch["block_position_ids"] = self.padding.rows(samples, "block_position_ids", 0, np.int64)
        return batch


def _long_end(free: Flags, random: Generator) -> Ids:
    """One span, from somewhere in the first half of the tokens to the last one, `[n]`."""
    places = np.flatnonzero(free)
    begin, last = places[int(random.random() * (len(places) // 2 + 1))], places[-1]
    spans = np.full(len(free), OUTSIDE)
    spans[begin : last + 1] = 0
    return spans
