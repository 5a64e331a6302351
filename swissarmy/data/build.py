"""`build_loaders`: from a config to the loaders of a run."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, cast, final

from swissarmy.core.errors import ConfigError
from swissarmy.data.config import DataConfig
from swissarmy.data.formats import collator_for
from swissarmy.data.loading.batches import Collate
from swissarmy.data.loading.bucketing import Bucketing
from swissarmy.data.loading.loader import Loader
from swissarmy.data.order.blend import Blend, BlendSchedule
from swissarmy.data.order.sample_order import OneByOne, SampleOrder
from swissarmy.data.order.splits import SPLITS, SplitName
from swissarmy.data.order.weights import Weight, drawn_in_proportion_to, parse_stages, parse_weights
from swissarmy.data.prepare import CreateDataset, Prepared, Preparer, create_dataset
from swissarmy.data.samples.function_encoder import Encode, as_encoder
from swissarmy.data.source import Source
from swissarmy.data.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)


@final
@dataclass(frozen=True, kw_only=True)
class Loaders:
    """The loaders of a run; `None` where the config names no data."""

    train: Loader | None
    """Endless, or `num_steps` long."""
    valid: Loader | None
    """Every sample once, each time it is iterated."""
    test: Loader | None
    """The same."""
    plan: tuple[str, ...]
    """What the run will see of each source, in words."""


def build_loaders(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    *,
    global_batch_size: int,
    eval_batch_size: int | None = None,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    num_steps: int | None = None,
    epochs: float | None = None,
    vocab_size: int | None = None,
    num_labels: int | None = None,
    create_dataset: CreateDataset = create_dataset,
    encode: Encode | None = None,
    collate: Collate | None = None,
) -> Loaders:
    """The loaders that a config describes; what they will give is logged.

    Args:
        config: Which data, and what is done with it.
        tokenizer: Makes the ids, where records are text.
        global_batch_size: Samples of a training step, over all ranks and micro-batches.
        eval_batch_size: Samples of an evaluation batch, over all ranks; those of a micro-batch in training when `None`.
        accumulation: Micro-batches of a training step.
        rank: Which of the processes this is.
        world_size: How many processes there are.
        num_steps: How many steps training takes; `None`: it never ends, or as `epochs` says.
        epochs: How many epochs training takes, in place of `num_steps`. In an epoch each source is gone through as
            often as its weight says, or, where weights are shares, as many samples are seen as all sources have.
        vocab_size: How many ids the model knows; those of the tokenizer when `None`.
        num_labels: How many classes the model knows; not looked at when `None`.
        create_dataset: Opens a path of the config.
        encode: Makes a sample of a record, instead of the encoder that the config describes; a function of the record
            will do.
        collate: Makes a batch of samples, instead of the collator that the config describes; it may get an empty list.

    Raises:
        ConfigError: The config does not fit the data, or the tokenizer does not fit the config.
        DataError: A path cannot be read, or there is nothing to train on.
    """
    preparer = Preparer(
        config=config,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        num_labels=num_labels,
        create_dataset=create_dataset,
        encode=as_encoder(encode),
    )
    opened = {number: preparer.open(config.train_data[number]) for number in _drawn(config)}
    loader = partial(_loader, preparer, collate=collate, rank=rank, world_size=world_size)
    plan: list[str] = []

    def train() -> Loader | None:
        if not opened:
            return None
        made = {n: preparer.prepare(config.train_data[n], preparer.split(opened[n], "train")) for n in opened}
        order = _train_order(config, made, global_batch_size)
        steps = num_steps if epochs is None else math.ceil(epochs * _epoch(config, made) / global_batch_size)
        plan.extend(_uses(made, order, global_batch_size, steps))
        return loader(
            list(made.values()),
            order,
            global_batch_size=global_batch_size,
            accumulation=accumulation,
            num_steps=steps,
            bucketing=_bucketing(preparer, made),
        )

    def evaluation(name: SplitName, paths: Sequence[str]) -> Loader | None:
        if not paths and not (opened and _ratio(config, name)):
            return None
        split = [(config.train_data[n], preparer.split(source, name)) for n, source in opened.items()]
        records = [(path, preparer.open(path)) for path in paths] or split
        made = [preparer.prepare(path, source) for path, source in records if not _is_empty(source)]
        order = OneByOne([_known_length(each) for each in made])
        size = eval_batch_size or global_batch_size // accumulation
        plan.append(f"{name}: {order.num_samples:,} samples, each once, in batches of {size}")
        if not order.num_samples:
            _LOG.warning("%s: the split leaves no sample to evaluate on", name)
        return loader(made, order, global_batch_size=size)

    made = train(), evaluation("valid", config.valid_data), evaluation("test", config.test_data)
    for line in plan:
        _LOG.info("%s", line)
    return Loaders(train=made[0], valid=made[1], test=made[2], plan=tuple(plan))


def _loader(
    preparer: Preparer,
    made: Sequence[Prepared],
    order: SampleOrder | OneByOne,
    *,
    collate: Collate | None,
    **options: Any,
) -> Loader:
    config = preparer.config
    return Loader(
        [each.samples for each in made],
        order,
        collate or _collator(config, made, preparer.tokenizer),
        fingerprint=_fingerprint(made, preparer.tokenizer_fingerprint),
        num_workers=config.num_workers,
        prefetch=config.prefetch,
        pin_memory=config.pin_memory,
        worker_timeout=config.worker_timeout,
        on_bad_record=config.on_bad_record,
        max_bad_records=config.max_bad_records,
        **options,
    )


def _stages(config: DataConfig) -> Iterator[tuple[int, Sequence[Weight]]]:
    """From which step on which weights hold."""
    yield 0, config.train_data_weights or [1] * len(config.train_data)
    yield from parse_stages(config.train_data_weights_schedule)


def _drawn(config: DataConfig) -> list[int]:
    """The train data that has weight at some time, by number."""
    if not config.train_data:
        return []
    by_source = zip(*(parse_weights(weights) for _, weights in _stages(config)), strict=True)
    return [number for number, weights in enumerate(by_source) if any(weights)]


def _train_order(config: DataConfig, made: dict[int, Prepared], global_batch_size: int) -> SampleOrder:
    lengths, mean = [each.length for each in made.values()], config.train_data_weights_mean
    stages = [
        (step * global_batch_size, Blend(drawn_in_proportion_to([weights[n] for n in made], lengths, mean)))
        for step, weights in _stages(config)
    ]
    blend = BlendSchedule(stages) if len(stages) > 1 else stages[0][1]
    return SampleOrder(lengths, blend, seed=config.seed, shuffle=config.shuffle)


def _bucketing(preparer: Preparer, made: dict[int, Prepared]) -> Bucketing | None:
    config = preparer.config
    if not config.bucketing_window:
        return None
    lengths = [preparer.lengths(cast(Source, each.samples)) for each in made.values()]  # the config refuses streams
    return Bucketing(lengths=lengths, window=config.bucketing_window, seed=config.seed)


def _collator(config: DataConfig, made: Sequence[Prepared], tokenizer: Tokenizer | None) -> Collate:
    """What makes batches of samples of all sources; with none, of no samples.

    Raises:
        ConfigError: Their samples do not go into one batch.
    """
    if not made:
        return list
    first = collator_for(made[0].record_format, config, tokenizer)
    for each in made[1:]:
        if collator_for(each.record_format, config, tokenizer) != first:
            formats = f"{made[0].path} is {made[0].record_format!r} and {each.path} is {each.record_format!r}"
            raise ConfigError(f"samples of these formats cannot share a batch: {formats}.")
    return first


def _fingerprint(made: Sequence[Prepared], tokenizer: str) -> dict[str, str]:
    """What must not change when training is resumed; paths may."""
    sources = {f"source {number}": each.records.fingerprint for number, each in enumerate(made, 1)}
    encodings = {f"encoding of source {number}": each.encoding for number, each in enumerate(made, 1)}
    return {**sources, "tokenizer": tokenizer, **encodings}


def _ratio(config: DataConfig, name: SplitName) -> bool:
    """Whether some of the train data is split off for this."""
    return config.split is not None and parse_weights(config.ratios)[SPLITS.index(name)] > 0


def _is_empty(source: Any) -> bool:
    return isinstance(source, Source) and not len(source)


def _epoch(config: DataConfig, made: dict[int, Prepared]) -> Fraction:
    """How many samples an epoch has, with the weights that hold at the start."""
    weights = parse_weights(next(_stages(config))[1])
    repeats = config.train_data_weights_mean == "repeats"
    return Fraction(sum(_known_length(each) * (weights[n] if repeats else 1) for n, each in made.items()))


def _known_length(made: Prepared) -> int:
    """How many samples there are, to evaluate on or to count epochs by.

    Raises:
        ConfigError: It is a stream.
    """
    if made.length is None:
        raise ConfigError(f"{made.path} is a stream; evaluation and epochs need data of known length.")
    return made.length


def _uses(
    made: dict[int, Prepared], order: SampleOrder, global_batch_size: int, num_steps: int | None
) -> Iterator[str]:
    """How much of each source a run will see."""
    if num_steps is None:
        yield f"train: steps of {global_batch_size} samples, without end"
        return
    total = num_steps * global_batch_size
    yield f"train: {num_steps:,} steps of {global_batch_size} samples, {total:,} in all"
    for each, use in zip(made.values(), order.uses(total), strict=True):
        of = "a stream" if each.length is None else f"{use.epochs:.2f} epochs of {each.length:,}"
        yield f"train: {each.path}: {use.samples:,} samples ({100 * use.share:.2f} %), {of}"
