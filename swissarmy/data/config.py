"""`DataConfig`: which data a run reads, how it is blended, split, encoded, packed and loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from swissarmy.core.config import Config
from swissarmy.core.errors import ConfigError
from swissarmy.data.order.splits import SPLITS, SplitName, period_of
from swissarmy.data.order.weights import Weight, WeightsMean, parse_stages, parse_weights

RecordFormat = Literal["auto", "text", "completion", "chat", "tokens", "seq2seq", "classification", "images", "samples"]
CAUSAL_FORMATS = ("auto", "text", "completion", "chat", "tokens")
"""Formats whose samples are one sequence of tokens, which can be packed, cut and split."""


NO_DATA: Final = "there is no data: give train_data, valid_data or test_data."


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """The data of a run; paths are files, folders, patterns such as `data/*.jsonl`, or `hf:owner/name` on the hub.

    Valid and test data are either files of their own or, with `split`, parts of the train data, each for itself: with
    `split="98,0,2"` and `valid_data` the test rows come from the train data and the valid rows do not.
    """

    train_data: tuple[str, ...] = ()
    """What to train on; each path is one source."""
    train_data_weights: tuple[float, ...] | None = None
    """A weight for each source, 0 to leave it out; all the same when `None`."""
    train_data_weights_mean: WeightsMean = "repeats"
    """`repeats`: a source counts as length * weight samples; `share`: weights are shares, whatever the lengths."""
    train_data_weights_schedule: tuple[str, ...] = ()
    """Other weights from a step on, each as `STEP: WEIGHT WEIGHT ...`, such as `1000: 1 3`."""
    streaming: bool = False
    """Whether train data on the hub is read as a stream and not kept on the disk; its weight must mean a `share`."""
    valid_data: tuple[str, ...] = ()
    """What to evaluate on during training."""
    test_data: tuple[str, ...] = ()
    """What to evaluate on at the end."""
    split: str | None = None
    """How each train source is split into train, valid and test: `95,4,1`, in any unit. A row stays in its split when
    rows are appended."""
    split_seed: int = 0
    """Which of the possible splits; apart from `seed`, so that another order does not train on test rows."""

    record_format: RecordFormat = "auto"
    """What records are; `auto` goes by the fields of the first. `samples`: they are encoded already."""
    text_unit: Literal["line", "paragraph", "file"] = "line"
    """What a record of a `.txt` file is."""
    binary_dtype: str | None = None
    """The type of the numbers in `.bin` files, as NumPy writes it: `uint16`, `<f4`, ..."""
    binary_shape: tuple[int, ...] = ()
    """The shape of a record of a `.bin` file; a single value when empty."""
    binary_field: str = "data"
    """What a record of a `.bin` file calls its numbers: the name of the `tokens_field` or `image_field`, or another."""
    text_field: str = "text"
    """Where `text` and `classification` have their text."""
    text_pair_field: str | None = None
    """Where `classification` has the second text of a pair."""
    prompt_field: str = "prompt"
    """Where `completion` has what is given."""
    completion_field: str = "completion"
    """Where `completion` has what is to be predicted."""
    messages_field: str = "messages"
    """Where `chat` has the conversation."""
    tokens_field: str = "input_ids"
    """Where `tokens` has the ids."""
    source_field: str = "source"
    """Where `seq2seq` has what the encoder reads."""
    target_field: str = "target"
    """Where `seq2seq` has what the decoder is to give."""
    source_prefix: str = ""
    """What `seq2seq` puts before every source."""
    image_field: str = "image"
    """Where `images` has the picture."""
    label_field: str = "label"
    """Where `classification` and `images` have the class."""
    label_names: tuple[str, ...] = ()
    """The classes in order, where records name them."""
    train_on_prompt: bool = False
    """Whether `completion` predicts the prompt as well."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """What `chat` predicts: every answer of the assistant, the last one, or all."""
    append_eos: bool | None = None
    """Whether `text` and `completion` end with the end token; where the tokenizer has one when `None`."""
    image_size: tuple[int, ...] | None = None
    """Height and width of `images`; in training the model's when `None`, elsewhere 224 224."""
    image_mean: tuple[float, ...] | None = None
    """What is taken off each channel of `images`, whose values are 0 to 1; 0.5 when `None`."""
    image_std: tuple[float, ...] | None = None
    """What each channel is then divided by; 0.5 when `None`."""
    image_crop: bool = False
    """Whether `images` keep their proportions, and lose what sticks out, instead of being stretched."""

    sequence_length: int | None = None
    """The most tokens of a sample; the length of a row when packing. In training as many as the model takes when
    `None`, elsewhere no limit."""
    truncation: Literal["right", "left", "error", "split", "drop"] | None = None
    """What happens to longer ones: the end to cut off, an error, several samples of it, or none. `None`: `split` when
    packing, `right` otherwise."""
    packing: bool = False
    """Whether samples share rows of `sequence_length` tokens; they do not see each other."""
    bucketing_window: int = 0
    """How many global batches are sorted by length together, so that little is padding; 0 for none."""
    padding_side: Literal["right", "left"] = "right"
    """Where padding goes."""
    pad_to_multiple: int = 1
    """What the length of padded batches is rounded up to."""

    shuffle: bool = True
    """Whether training goes through each source in a new random order each time."""
    seed: int = 0
    """Decides the order."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Whether a record that cannot be read ends the run, or is logged and passed over."""
    max_bad_records: int = 100
    """How many may be skipped before the run ends all the same."""
    num_workers: int = 0
    """Processes that read ahead, on each rank; 0 for none."""
    prefetch: int = 2
    """How many batches each worker reads ahead."""
    pin_memory: bool = True
    """Whether batches are put where accelerators copy from faster; without one it changes nothing."""
    worker_timeout: float = 600.0
    """Seconds to wait for a batch before the run ends with an error; 0 for no limit."""
    cache_folder: str | None = None
    """Where the lengths of samples and the plan of packed rows are kept; they are made anew each time when `None`."""

    def problems(self) -> Iterator[str]:
        """Sizes out of range, weights that fit nothing, and settings that contradict each other."""
        if not (self.train_data or self.valid_data or self.test_data):
            yield NO_DATA
        yield from self._wrong_sizes()
        yield from self._wrong_weights()
        yield from self._wrong_splits()
        yield from self._contradictions()

    @property
    def ratios(self) -> tuple[str, ...]:
        """The ratios of `split`, as text; all goes to train when there is none."""
        return ("1", "0", "0") if self.split is None else tuple(ratio.strip() for ratio in self.split.split(","))

    @property
    def too_long(self) -> Literal["right", "left", "error", "split", "drop"]:
        """`truncation`, or what stands for it."""
        return self.truncation or ("split" if self.packing else "right")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of `images`, filled in."""
        height, width = self.image_size or (224, 224)
        return len(self.image_mean or self.image_std or "RGB"), height, width

    def _wrong_sizes(self) -> Iterator[str]:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # not `<`: NaN is wrong as well
                yield f"{name}={value} must be at least {least}."
        for name in ("seed", "split_seed"):
            if not 0 <= getattr(self, name) < 2**63:
                yield f"{name}={getattr(self, name)} must be from 0 to 2**63 - 1."
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            yield f"image_size={self.image_size} must be a height and a width."
        if self.image_std is not None and not all(scale > 0 for scale in self.image_std):
            yield f"image_std={self.image_std} must be above 0."
        if self.image_mean and self.image_std and len(self.image_mean) != len(self.image_std):
            yield f"image_mean has {len(self.image_mean)} channels and image_std {len(self.image_std)}."

    def _wrong_weights(self) -> Iterator[str]:
        try:
            stages = parse_stages(self.train_data_weights_schedule, title="train_data_weights_schedule:")
        except ConfigError as error:
            yield str(error)
            return
        given: dict[str, Sequence[Weight]] = {f"train_data_weights from step {step}:": text for step, text in stages}
        if self.train_data_weights is not None:
            given["train_data_weights:"] = self.train_data_weights
        for title, weights in given.items():
            try:
                parse_weights(weights, title=title)
            except ConfigError as error:
                yield str(error)
            if len(weights) != len(self.train_data):
                yield f"{title} {len(weights)} weights for {len(self.train_data)} train_data; each needs one."

    def _wrong_splits(self) -> Iterator[str]:
        if self.split is None:
            return
        if not self.train_data:
            yield "split has nothing to split: it is train_data that is split."
        try:
            sizes = dict(zip(SPLITS, period_of(self.ratios), strict=True))
        except ConfigError as error:
            yield str(error)
            return
        if not sizes["train"]:
            yield f"split={self.split!r} leaves nothing to train on; give the files as valid_data or test_data."
        own: dict[SplitName, tuple[str, ...]] = {"valid": self.valid_data, "test": self.test_data}
        for name, paths in own.items():
            if paths and sizes[name]:
                yield f"split={self.split!r} makes {name} data and {name}_data gives it: set that ratio to 0."

    def _contradictions(self) -> Iterator[str]:
        is_causal = self.record_format in CAUSAL_FORMATS
        if self.packing and self.sequence_length is None:
            yield "packing needs a sequence_length."
        if self.packing and not is_causal:
            yield f"packing is for sequences of tokens, not for record_format={self.record_format!r}."
        if self.packing and self.bucketing_window:
            yield "bucketing_window has no use with packing: all rows are equally long."
        if self.truncation in ("split", "drop", "error") and self.sequence_length is None:
            yield f"truncation={self.truncation!r} needs a sequence_length."
        if self.truncation in ("split", "drop") and not is_causal:
            yield f"truncation={self.truncation!r} is not for record_format={self.record_format!r}."
        if self.streaming and (
            self.packing or self.bucketing_window or self.split or self.truncation in ("split", "drop")
        ):
            yield "streaming does not go with packing, bucketing, split, or truncation by `split` or `drop`."
        if self.streaming and self.train_data_weights_mean == "repeats":
            yield "streaming needs train_data_weights_mean='share': a stream has no length to repeat."


_LEAST = {
    "sequence_length": 1,
    "bucketing_window": 0,
    "pad_to_multiple": 1,
    "max_bad_records": 0,
    "num_workers": 0,
    "prefetch": 1,
    "worker_timeout": 0,
}
