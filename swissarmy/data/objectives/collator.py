"""`objective_collator`: batches for the objectives that hide something of a text.

What is hidden is a pure function of the seed and of the sample's number in the run. So it is another thing in each
epoch, the same for every number of ranks and workers, and evaluation always asks the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, final, get_args

from numpy.random import Generator

from swissarmy.core.errors import ConfigError, nearest
from swissarmy.data.config import CAUSAL_FORMATS, DataConfig
from swissarmy.data.formats import padding_for
from swissarmy.data.loading.batches import Collate
from swissarmy.data.loading.collate import Batch, Samples, Seq2SeqCollator
from swissarmy.data.objectives.blank_infilling import BlankInfilling, InfillingCollator
from swissarmy.data.objectives.draws import random_numbers
from swissarmy.data.objectives.masked_lm import MaskedCollator, TokenMasking
from swissarmy.data.objectives.options import Objective, ObjectiveOptions
from swissarmy.data.objectives.span_corruption import SpanCorruption
from swissarmy.data.samples.examples import Sample
from swissarmy.data.source import DataError
from swissarmy.data.tokenizer import Tokenizer

Corruption = Callable[[Sample, Generator], Sample]
"""From a sample and its random numbers to what the model is shown, and is to give."""
Parts = tuple[Corruption, Callable[[Samples], Batch]]
"""What corrupts samples, and what collates them."""


@final
@dataclass(frozen=True, kw_only=True)
class CorruptingCollator:
    """Corrupts each sample, and makes a batch of what comes of it."""

    corrupt: Corruption
    """What is done to a sample."""
    collate: Callable[[Samples], Batch]
    """Makes the batch."""
    seed: int
    """Decides what is hidden."""
    fingerprint: Mapping[str, str]
    """What must be the same when a run is resumed: the objective, and its options by name."""

    def __call__(self, samples: Samples) -> Batch:
        """The batch.

        Raises:
            DataError: Samples are no sequences of tokens, or have no number.
        """
        return self.collate([self._corrupted(sample) for sample in samples])

    def _corrupted(self, sample: Mapping[str, Any]) -> Sample:
        for name, meaning in (("input_ids", "tokens"), ("sample_ids", "number in the run, which loaders give")):
            if name not in sample:
                raise DataError(f"a sample with {', '.join(sample) or 'nothing'} has no {name} ({meaning}).")
        return self.corrupt(dict(sample), random_numbers(self.seed, int(sample["sample_ids"])))


def objective_collator(
    objective: Objective, data: DataConfig, tokenizer: Tokenizer | None, options: ObjectiveOptions | None = None
) -> Collate | None:
    """What makes batches for an objective, for `build_loaders` and `train`.

    Args:
        objective: Its name.
        data: How texts are encoded, cut and padded. Its `seed` decides what is hidden too.
        tokenizer: Says what each token is.
        options: How much is hidden, and in what pieces.

    Returns:
        A collator, or `None` where samples stay as they are, and the collator is that of their format.

    Raises:
        ConfigError: There is no such objective, or data, tokenizer and options do not fit it.
    """
    if objective not in get_args(Objective):
        raise ConfigError(f"there is no objective {objective!r}.{nearest(objective, get_args(Objective))}")
    if objective not in _MAKERS:
        return None
    if tokenizer is None:
        raise ConfigError(f"{objective} needs a tokenizer, to know special tokens: give one.")
    _check(objective, data)
    options = options or ObjectiveOptions()
    corrupt, collate = _MAKERS[objective](data, tokenizer, options)
    chosen = {each.name: str(getattr(options, each.name)) for each in fields(ObjectiveOptions)}
    return CorruptingCollator(
        corrupt=corrupt, collate=collate, seed=data.seed, fingerprint={"objective": objective, **chosen}
    )


def _masked_lm(data: DataConfig, tokenizer: Tokenizer, options: ObjectiveOptions) -> Parts:
    padding = padding_for(data, tokenizer)
    if data.packing:
        assert data.sequence_length is not None, "the config refuses packing without it"
        padding = replace(padding, side="right", pad_to_multiple=data.sequence_length)
    return TokenMasking.of(tokenizer, options), MaskedCollator(padding=padding, packed=data.packing)


def _span_corruption(data: DataConfig, tokenizer: Tokenizer, options: ObjectiveOptions) -> Parts:
    return SpanCorruption.of(tokenizer, options), Seq2SeqCollator(padding=padding_for(data, tokenizer))


def _blank_infilling(data: DataConfig, tokenizer: Tokenizer, options: ObjectiveOptions) -> Parts:
    if data.padding_side == "left":
        raise ConfigError("blank_infilling pads on the right: prefixes are counted from the left.")
    collate = InfillingCollator(padding=padding_for(data, tokenizer), block_positions=options.infilling_block_positions)
    return BlankInfilling.of(tokenizer, options, data.sequence_length), collate


_MAKERS: Final[Mapping[str, Callable[[DataConfig, Tokenizer, ObjectiveOptions], Parts]]] = {
    "masked_lm": _masked_lm,
    "span_corruption": _span_corruption,
    "blank_infilling": _blank_infilling,
}


def _check(objective: str, data: DataConfig) -> None:
    pairs = ("classification",) if objective == "masked_lm" else ()
    if data.record_format not in (*CAUSAL_FORMATS, *pairs):
        raise ConfigError(f"{objective} is for texts, not for record_format={data.record_format!r}.")
    if data.packing and objective != "masked_lm":
        raise ConfigError(f"{objective} makes two parts of each text, which are not packed: say truncation='split'.")
