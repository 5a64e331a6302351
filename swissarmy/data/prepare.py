"""From a path to samples: opened, split, encoded, and no longer than they may be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, final

from swissarmy.core.errors import ConfigError
from swissarmy.data.config import DataConfig, RecordFormat
from swissarmy.data.formats import encoder_for, format_of
from swissarmy.data.order.splits import Split, SplitName, SplitSource
from swissarmy.data.samples.examples import Encoder, Examples, Sample
from swissarmy.data.samples.lengths import Lengths, count_lengths
from swissarmy.data.samples.offset_tokenizer import tokenizer_fingerprint
from swissarmy.data.samples.packing import Packed
from swissarmy.data.samples.pieces import Pieces, TooLong
from swissarmy.data.source import DataError, RecordError, Source, digest
from swissarmy.data.sources.open import HUB, extension_of, open_source, open_stream
from swissarmy.data.sources.stream import MappedStream, StreamSource
from swissarmy.data.sources.wrapped import as_source
from swissarmy.data.tokenizer import Tokenizer

AnySource = Source | StreamSource
CreateDataset = Callable[[str, DataConfig], Any]
"""From a path of the config to a source, a stream, or any map-style `torch.utils.data.Dataset`."""


def create_dataset(path: str, config: DataConfig) -> AnySource:
    """The source of a path, by its extension; for data of your own kind give `build_loaders` another such function.

    Raises:
        ConfigError: Files of numbers are named, and not which numbers.
        DataError: There is nothing, or nothing that can be read.
    """
    if config.streaming and path.startswith(HUB) and path in config.train_data:
        return open_stream(path)
    match extension_of(path):
        case ".txt":
            return open_source(path, unit=config.text_unit)
        case ".bin" if config.binary_dtype is None:
            raise ConfigError(f"{path}: its records are plain numbers: give binary_dtype and binary_shape.")
        case ".bin":
            return open_source(path, dtype=config.binary_dtype, shape=config.binary_shape, field=config.binary_field)
    return open_source(path)


class Prepared(NamedTuple):
    """A source that is ready for a loader."""

    path: str
    """As the config has it."""
    records: AnySource
    """What was opened."""
    samples: AnySource
    """What batches are made of."""
    record_format: RecordFormat
    """What records are."""
    encoding: str
    """A fingerprint of how samples are made of records."""

    @property
    def length(self) -> int | None:
        """How many samples there are; `None` for a stream."""
        return None if isinstance(self.samples, StreamSource) else len(self.samples)


@final
@dataclass(frozen=True, kw_only=True)
class Preparer:
    """Prepares paths as a config says."""

    config: DataConfig
    """What is to be done."""
    tokenizer: Tokenizer | None = None
    """Makes the ids, where records are text."""
    vocab_size: int | None = None
    """How many ids the model knows; those of the tokenizer when `None`."""
    num_labels: int | None = None
    """How many classes the model knows, where records have one."""
    create_dataset: CreateDataset = create_dataset
    """Opens a path."""
    encode: Encoder | None = None
    """Makes a sample of a record, instead of the encoder that the config describes."""
    _encoders: dict[RecordFormat, Encoder | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    """One for each format, however many sources there are: each holds a copy of the tokenizer."""

    def open(self, path: str) -> AnySource:
        """The records of a path.

        Raises:
            DataError: There are none.
        """
        dataset = self.create_dataset(path, self.config)
        if isinstance(dataset, StreamSource):
            return dataset
        source = as_source(dataset)
        if not len(source):
            raise DataError(f"{path} is empty: there is no record in it")
        return source

    def split(self, source: AnySource, name: SplitName) -> AnySource:
        """The rows of a train source that belong to a split; all, where nothing is split.

        Raises:
            ConfigError: A stream is to be split.
        """
        if self.config.split is None:
            return source
        if isinstance(source, StreamSource):
            raise ConfigError("a stream has no row numbers to split by: give valid_data and test_data of their own.")
        return SplitSource(source, Split(len(source), self.config.ratios, name, self.config.split_seed))

    def prepare(self, path: str, records: AnySource) -> Prepared:
        """Records as samples.

        Raises:
            ConfigError: The config or the tokenizer does not fit the records.
            DataError: There are no records.
        """
        if not isinstance(records, StreamSource) and not len(records):
            raise DataError(f"{path}: split={self.config.split!r} leaves none of its few records to train on")
        record_format = self._format(records)
        encode = self.encode or self._encoder(record_format)
        if encode is None:
            return Prepared(path, records, records, record_format, "none")
        encoding = digest(encode.fingerprint, self.config.sequence_length, self.config.too_long, self.config.packing)
        if isinstance(records, StreamSource):
            stream = MappedStream(records, partial(self._sample, encode), encoding)
            return Prepared(path, records, stream, record_format, encoding)
        return Prepared(path, records, self._fitted(self._examples(records, encode)), record_format, encoding)

    def lengths(self, samples: Source) -> Lengths:
        """The tokens of each sample."""
        if isinstance(samples, Pieces):
            return samples.token_counts().astype("int32")
        return count_lengths(
            samples,
            num_workers=self.config.num_workers,
            max_bad_records=self.config.max_bad_records if self.config.on_bad_record == "skip" else 0,
            cache_folder=self._cache_folder,
        )

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer, which takes a moment to write out."""
        return "none" if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer)

    def _format(self, records: AnySource) -> RecordFormat:
        if self.config.record_format != "auto" or self.encode is not None:
            return self.config.record_format
        return format_of(*self._first_record(records), self.config)

    def _encoder(self, record_format: RecordFormat) -> Encoder | None:
        if record_format not in self._encoders:
            self._encoders[record_format] = encoder_for(record_format, self.config, self.tokenizer)
        return self._encoders[record_format]

    def _first_record(self, records: AnySource) -> tuple[Mapping[str, Any], str]:
        """The first record that can be read, and where it stands."""
        if isinstance(records, StreamSource):
            state = records.state_dict()
            record, where = next(iter(records)), records.where()
            records.load_state_dict(state)
            return record, where
        skipped = self.config.max_bad_records if self.config.on_bad_record == "skip" else 0
        for index in range(min(len(records) - 1, skipped)):
            try:
                return records[index], records.where(index)
            except RecordError:
                continue  # whoever reads it later counts it
        last = min(len(records) - 1, skipped)
        return records[last], records.where(last)

    def _examples(self, records: Source, encode: Encoder) -> Examples:
        known = None if self.tokenizer is None else len(self.tokenizer)
        vocab_size = known if self.vocab_size is None else self.vocab_size
        examples = partial(Examples, records, encode, vocab_size=vocab_size, num_labels=self.num_labels)
        too_long = self.config.too_long
        if too_long == "split" or too_long == "drop":
            return examples()
        return examples(max_length=self.config.sequence_length, truncation=too_long)

    def _fitted(self, examples: Examples) -> Source:
        """Samples that are no longer than they may be, in rows if they are to be packed."""
        length = self.config.sequence_length
        too_long: TooLong = "drop" if self.config.too_long == "drop" else "split"
        if self.config.packing and length is not None:
            lengths, folder = self.lengths(examples), self._cache_folder
            key = self.config.seed
            return Packed(examples, length, key=key, too_long=too_long, lengths=lengths, cache_folder=folder)
        if self.config.too_long in ("split", "drop") and length is not None:
            return Pieces(examples, length, too_long=too_long, lengths=self.lengths(examples))
        return examples

    def _sample(self, encode: Encoder, record: Mapping[str, Any], where: str) -> Sample:
        """The sample of a record that has no number."""
        return self._examples(_OneRecord(record, where), encode)[0]

    @property
    def _cache_folder(self) -> Path | None:
        return None if self.config.cache_folder is None else Path(self.config.cache_folder)


@final
@dataclass(frozen=True)
class _OneRecord:
    """A record of a stream, as a source."""

    record: Mapping[str, Any]
    place: str
    fingerprint: str = ""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.record

    def where(self, index: int) -> str:
        return self.place
