"""What `sat train` takes: all of `TrainConfig`, and what is code elsewhere: a model, its mixins, an objective."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Self, final

import tyro

from swissarmy.cli.command import OF_THE_COMMAND_LINE, Options
from swissarmy.cli.config_file import read_value
from swissarmy.cli.loading import Dtype, Quantize
from swissarmy.core.errors import ConfigError
from swissarmy.data.config import NO_DATA, RecordFormat
from swissarmy.data.objectives.options import Objective
from swissarmy.training.config import TrainConfig

_OF_THIS_CALL = (*OF_THE_COMMAND_LINE, "dry_run", "world_size", "json")
"""What is not written beside the run."""
_FORMATS: Final[Mapping[Objective, RecordFormat]] = {
    "seq2seq": "seq2seq",
    "classification": "classification",
    "image_classification": "images",
}


@dataclass(frozen=True, kw_only=True)
class ModelChoice(Options):
    """Which model trains, and what is added to it."""

    model: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Where to start: a Hugging Face folder, a .gguf file, or the name of a model on the hub."""
    model_config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Or a config.json, for a model with new weights."""
    override: tuple[str, ...] = ()
    """Fields of the model's configuration to change, as FIELD=VALUE: `num_labels=3`."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of parameters that the checkpoint lacks and that start anew: `classifier.*`, `mixins.head.*`."""
    dtype: Dtype | None = None
    """The precision of the weights; as stored when left out (float32 for GGUF, and for new ones)."""
    quantize: Quantize | None = None
    """Hold the weights in so many bits, under mixins that train (QLoRA); each process has them whole."""
    tokenizer: str | None = None
    """A checkpoint or a folder with a tokenizer; the model's own when left out."""
    objective: Objective = "causal_lm"
    """What the model learns: which loss, and what is done to the samples for it."""

    mixins: Annotated[Mapping[str, Mapping[str, Any]], tyro.conf.Suppress] = field(default_factory=dict)
    """In a config file: mixins to add, by name; each has its `type`, a mixin of the library, and that one's options."""
    mixin: tuple[str, ...] = ()
    """Mixins to add, each as `"lora: {type: LoRAMixin, r: 8}"` (in a file: `mixins:`). They alone train then."""
    lora_rank: int | None = None
    """Add LoRA of this rank, under the name `lora`."""
    lora_alpha: float | None = None
    """Its scale; twice the rank when left out."""
    prefix_len: int | None = None
    """Add prefix-tuning with so many positions, under the name `prefix`."""

    def problems(self) -> Iterator[str]:
        """A model that is missing or there twice, and texts that say nothing."""
        if (self.model is None) == (self.model_config is None):
            yield "give either model (a checkpoint to start from) or model_config (for new weights)."
        for name in ("lora_rank", "prefix_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}={value} must be at least 1."
        if self.lora_alpha is not None and self.lora_rank is None:
            yield "lora_alpha has no meaning without lora_rank."
        if self.quantize is not None and self.model is None:
            yield "quantize reduces the weights of a checkpoint: give model."
        if self.quantize is not None and not (self.mixins or self.mixin or self.lora_rank or self.prefix_len):
            yield f"quantize='{self.quantize}' leaves weights that cannot train: add a mixin, such as lora_rank=8."
        yield from self._wrong_texts()

    @property
    def overrides(self) -> dict[str, Any]:
        """`override`, by field."""
        pairs = (text.partition("=") for text in self.override)
        return {name: read_value(value, f"override.{name}") for name, _, value in pairs}

    @property
    def wanted_mixins(self) -> dict[str, Mapping[str, Any]]:
        """All that is to be added, by name: from the file, from `--mixin`, and from the flags of their own."""
        return {name: mixin for _, mixins in self._by_origin() for name, mixin in mixins.items()}

    def _by_origin(self) -> Iterator[tuple[str, Mapping[str, Mapping[str, Any]]]]:
        """Mixins by name, and what asks for them."""
        yield "mixins", self.mixins
        for text in self.mixin:
            yield f"mixin {text!r}", _mapping(text)
        if self.lora_rank is not None:
            alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
            yield "lora_rank", {"lora": {"type": "LoRAMixin", "r": self.lora_rank, "alpha": alpha}}
        if self.prefix_len is not None:
            yield "prefix_len", {"prefix": {"type": "PrefixTuningMixin", "prefix_len": self.prefix_len}}

    def _repeated_mixins(self) -> Iterator[str]:
        origins: dict[str, str] = {}
        for origin, mixins in self._by_origin():
            for name in mixins:
                if name in origins:
                    yield f"{origins[name]} and {origin} both add a mixin '{name}': leave one out, or rename one."
                origins[name] = origin

    def _wrong_texts(self) -> Iterator[str]:
        for text in self.override:
            if not text.partition("=")[1] or not text.partition("=")[0].isidentifier():
                yield f"override {text!r} is not FIELD=VALUE."
        try:
            yield from self._repeated_mixins()
        except ConfigError as error:
            yield str(error)


@final
@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig, ModelChoice):
    """The flags, and keys of the config file."""

    dry_run: bool = False
    """Train nothing: check the plan, and print memory, arithmetic and communication of a step."""
    world_size: int = 1
    """For how many processes, in a dry run."""
    json: bool = False
    """Print the dry run as a JSON object."""

    def problems(self) -> Iterator[str]:
        """What the config and the choice of the model have to say."""
        yield from (problem for problem in TrainConfig.problems(self) if not (self.dry_run and problem == NO_DATA))
        yield from ModelChoice.problems(self)
        if not self.dry_run and (self.world_size != 1 or self.json):
            yield "world_size and json are of a dry run: add dry_run, or leave them out."
        if self.world_size < 1:
            yield f"world_size={self.world_size} must be at least 1."
        if self.quantize is not None and self.shard * self.sharing_size > 1:
            yield "quantize and processes that share the weights exclude each other: leave shard and the others at 1."
        if self.quantize is not None and self.dry_run:
            yield "quantize is not counted by a dry run: leave it out."

    def with_trainable(self, added: Sequence[str]) -> Self:
        """The same, with the mixins that were added as what trains, unless it says what does."""
        if not added or self.trainable:
            return self
        return self.replace(trainable=tuple(f"mixins.{name}" for name in added))

    def with_record_format(self) -> Self:
        """The same, with the format of records that the objective is for, where there is but one."""
        return (
            self.replace(record_format=_FORMATS.get(self.objective, "auto")) if self.record_format == "auto" else self
        )

    def to_save(self) -> dict[str, Any]:
        """What a config file can hold."""
        return {name: value for name, value in self.to_dict().items() if name not in _OF_THIS_CALL}


def _mapping(text: str) -> dict[str, Mapping[str, Any]]:
    """A mixin as it stands on the command line.

    Raises:
        ConfigError: It is something else than a name and a mapping.
    """
    named = read_value(text, "mixin")
    if isinstance(named, dict) and len(named) == 1 and all(isinstance(each, dict) for each in named.values()):
        return named
    raise ConfigError(f'mixin {text!r} is not as in "lora: {{type: LoRAMixin, r: 8}}".')
