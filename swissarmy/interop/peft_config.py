"""`adapter_config.json` of PEFT: the fields that this library understands, by method; any other must be empty."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, final

from swissarmy.core.config import Config
from swissarmy.core.errors import CheckpointError

PASSED_OVER = frozenset(
    """
    peft_type peft_version auto_mapping base_model_name_or_path revision task_type inference_mode fan_in_fan_out bias
    megatron_core qalora_group_size runtime_config loftq_config eva_config corda_config lora_ga_config
    init_ia3_weights init_weights encoder_hidden_size prefix_projection prompt_tuning_init prompt_tuning_init_text
    tokenizer_name_or_path tokenizer_kwargs encoder_reparameterization_type encoder_num_layers encoder_dropout
    modules_to_save
    """.split()
)
"""Fields that are read elsewhere, or that say nothing about what the tensors do."""
NEUTRAL_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base model's weights as they are."""
MAX_PATTERN, MAX_REPEATS = 500, 3
"""The longest regular expression of a file that is tried, and how many repetitions it may have: more could hang."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig(Config):
    """The fields of an adapter of one method, with PEFT's defaults."""

    @classmethod
    def read(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """From the content of the file.

        Raises:
            CheckpointError: A field that changes the result and is not understood.
            ConfigError: A value of the wrong kind.
        """
        known = {own.name for own in fields(cls)}
        strange = {key: value for key, value in values.items() if key not in known | PASSED_OVER and value}
        if strange:
            shown = ", ".join(f"{key}={value!r}" for key, value in strange.items())
            raise CheckpointError(f"{where}: {shown}: not supported, and it would change what the model computes.")
        return cls.from_dict({key: value for key, value in values.items() if key in known}, where=where)


@dataclass(frozen=True, kw_only=True)
class PeftTargetsConfig(PeftConfig):
    """The fields of a method that changes modules."""

    target_modules: tuple[str, ...] | str | None = None
    """Ends of names of modules, or a regular expression of whole names, or "all-linear"."""
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None

    def problems(self) -> Iterator[str]:
        """Patterns that are none."""
        whole = (self.target_modules, self.exclude_modules)
        for pattern in (each for each in whole if isinstance(each, str) and not _repeats(each)):
            yield from _pattern_problems(pattern)

    def targets(self, path: str) -> bool:
        """Whether PEFT puts an adapter at this module, one inside a layer; no, where the tensors alone can tell."""
        if any(isinstance(each, str) and _repeats(each) for each in (self.target_modules, self.exclude_modules)):
            return False
        if self.exclude_modules is not None and _named(path, self.exclude_modules):
            return False
        if self.target_modules == "all-linear":
            return True
        if self.target_modules is None or not _named(path, self.target_modules):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        wanted = self.layers_to_transform
        layer = _layer_of(path, _as_tuple(self.layers_pattern))
        return layer in (wanted if isinstance(wanted, tuple) else (wanted,))


@final
@dataclass(frozen=True, kw_only=True)
class PeftLoRAConfig(PeftTargetsConfig):
    """The fields of a LoRA adapter."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    alpha_pattern: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterator[str]:
        """Patterns that are none, ranks that are none, a start that changed the base model."""
        yield from super().problems()
        ranks, alphas = [self.r, *self.rank_pattern.values()], [self.lora_alpha, *self.alpha_pattern.values()]
        if not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranks):
            yield "ranks are integers of at least 1"
        if not all(isinstance(alpha, int | float) and not isinstance(alpha, bool) and alpha > 0 for alpha in alphas):
            yield "alphas are numbers above 0"
        if not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout={self.lora_dropout} must be in [0, 1)"
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            yield from _pattern_problems(pattern)
        if self.init_lora_weights not in NEUTRAL_STARTS:
            yield (
                f"init_lora_weights={self.init_lora_weights!r} changed the base model's weights. Let PEFT save it as "
                "plain LoRA: save_pretrained(dir, path_initial_model_for_weight_conversion=...)."
            )

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """The rank and the alpha of one of their modules."""
        return _value(self.rank_pattern, path, self.r), _value(self.alpha_pattern, path, self.lora_alpha)


@final
@dataclass(frozen=True, kw_only=True)
class PeftIA3Config(PeftTargetsConfig):
    """The fields of an IA3 adapter."""

    feedforward_modules: tuple[str, ...] | str | None = None
    """Those of the modules whose input is stretched in place of their output."""

    def problems(self) -> Iterator[str]:
        """Patterns that are none."""
        yield from super().problems()
        if isinstance(self.feedforward_modules, str):
            yield from _pattern_problems(self.feedforward_modules)

    def stretches_input(self, path: str) -> bool:
        """Whether it is the input of a module that is stretched."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, path) is not None
        return any(path.endswith(end) for end in self.feedforward_modules or ())


@final
@dataclass(frozen=True, kw_only=True)
class PeftVeRAConfig(PeftTargetsConfig):
    """The fields of a VeRA adapter."""

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    """Whether A and B are in the file; otherwise they are made from the key."""
    vera_dropout: float = 0.0
    d_initial: float = 0.1


@final
@dataclass(frozen=True, kw_only=True)
class PeftPromptConfig(PeftConfig):
    """The fields of a trained prompt or prefix that say how the one tensor is to be read."""

    num_virtual_tokens: int
    token_dim: int
    num_transformer_submodules: int | None = None
    """How many prompts the tensor holds."""
    num_layers: int | None = None
    num_attention_heads: int | None = None


def _named(path: str, wanted: Sequence[str] | str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == end or path.endswith(f".{end}") for end in wanted)


def _value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, default)


def _layer_of(path: str, lists: Iterable[str]) -> int | None:
    """The first number in a path; where `lists` are given, the first behind one of these names."""
    parts = path.split(".")
    numbers = [(before, int(part)) for before, part in zip(["", *parts], parts, strict=False) if part.isdecimal()]
    wanted = set(lists)
    return next((number for before, number in numbers if not wanted or before in wanted), None)


def _as_tuple(value: Sequence[str] | str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _repeats(pattern: str) -> bool:
    """Whether a regular expression could take for ever."""
    nested = re.search(r"\)[*+{]", pattern) is not None
    return len(pattern) > MAX_PATTERN or nested or len(re.findall(r"[*+{]", pattern)) > MAX_REPEATS


def _pattern_problems(pattern: str) -> Iterator[str]:
    """A regular expression of a file that is none, or that is not tried."""
    if _repeats(pattern):
        yield f"{pattern[:80]!r} repeats too much to be tried: list the modules by name instead"
        return
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{pattern!r} is no regular expression: {error}"
