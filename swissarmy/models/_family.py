"""What a family is, and how one is found by its `model_type`."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, final

import torch

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel, Model, every_mixin
from swissarmy.core.config import Config, report
from swissarmy.core.errors import ConfigError, nearest
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import WeightMap
from swissarmy.nn.starting_values import start_normal

COMMON_IGNORED = frozenset(
    """
    transformers_version _name_or_path name_or_path dtype torch_dtype use_cache return_dict output_attentions
    output_hidden_states chunk_size_feed_forward is_encoder_decoder problem_type finetuning_task task_specific_params
    torchscript use_bfloat16 gradient_checkpointing tokenizer_class prefix label2id auto_map _attn_implementation
    _attn_implementation_autoset attn_implementation return_dict_in_generate output_scores max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    forced_bos_token_id forced_eos_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id
    cross_attention_hidden_size tie_encoder_decoder tf_legacy_loss model_max_length generation_config
    """.split()
)
"""Fields that say nothing about the network: how it was saved, and how others generate with it."""


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(Config):
    """A Hugging Face `config.json`: a field for each that matters, with the reference's default.

    A field that this library supports at one value only has a `Literal` type. Any field that is neither here nor in
    `ignored` is an error, so nothing that changes the network is passed over in silence.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()
    renamed: ClassVar[Mapping[str, str]] = {}
    """Other spellings of fields, and ours."""

    model_type: str
    architectures: tuple[str, ...] | None = None
    """The class that the checkpoint was saved from, which decides on the head."""
    tie_word_embeddings: bool = True
    id2label: dict[str, Any] | None = None
    num_labels: int = 2
    pad_token_id: int | None = None
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    pruned_heads: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Build from a `config.json`'s content.

        Raises:
            ConfigError: Fields that this family does not know, or values that it does not support.
        """
        known = {cls.renamed.get(key, key): value for key, value in values.items()}
        if known.get("id2label") and "num_labels" not in known:
            known["num_labels"] = len(known["id2label"])
        passed_over = (COMMON_IGNORED | cls.ignored) - {own.name for own in fields(cls)}
        return cls.from_dict({key: value for key, value in known.items() if key not in passed_over}, where=where)

    def problems(self) -> Iterator[str]:
        """Heads that were cut out one by one cannot be represented."""
        if self.pruned_heads:
            yield "pruned_heads is not empty: this library keeps all heads of a layer alike"

    @property
    def architecture(self) -> str:
        """The class that the checkpoint was saved from, or the empty string."""
        return self.architectures[0] if self.architectures else ""


C = TypeVar("C", bound=FamilyConfig)


@final
@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published model: what its configuration changes, and how many parameters it has."""

    config: Mapping[str, Any]
    parameters: int


@final
@dataclass(frozen=True, kw_only=True)
class Family(Generic[C]):
    """Everything that this library needs to know of a family."""

    config: type[C]
    architectures: tuple[str, ...]
    """The classes that its checkpoints are saved from; the first is taken where a config names none."""
    build: Callable[[C], Model]
    weights: Callable[[C], WeightMap]
    presets: Mapping[str, Preset]

    def read_config(self, values: Mapping[str, Any], *, where: str) -> C:
        """A validated configuration from a `config.json`'s content."""
        config = self.config.read(values, where=where)
        if not config.architecture:
            config = config.replace(architectures=(self.architectures[0],))
        if config.architecture not in self.architectures:
            report(
                f"{where}:",
                [
                    f"architecture '{config.architecture}' is not supported."
                    f"{nearest(config.architecture, self.architectures)} Supported: {', '.join(self.architectures)}"
                ],
            )
        return config


@final
@dataclass(frozen=True)
class Source:
    """Where a model came from: its family, the configuration, and the file's own content to write back."""

    family: Family[Any]
    config: FamilyConfig
    values: Mapping[str, Any]
    own_names: Mapping[str, torch.Size]
    """The parameters that the family itself made, and their shapes; others belong to mixins added since."""
    own_mixins: frozenset[str]
    """The full names of the mixins that the family itself added."""


def with_parts(backbone: TransformerConfig, parts: Mapping[str, BaseMixin]) -> BaseModel:
    """A backbone and the mixins that make it a family, whose weights start as wide as its own."""
    for part in parts.values():
        start_normal(part, backbone.initializer_range)
    return BaseModel(backbone, parts)


def list_models() -> list[str]:
    """The families, by their `model_type`."""
    folder = str(Path(__file__).parent)
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if not module.name.startswith("_"))


def find_family(model_type: str, *, where: str = "config") -> Family[Any]:
    """The family of that `model_type`.

    Raises:
        ConfigError: There is no such family.
    """
    names = list_models()
    name = model_type.replace("-", "_")
    if name not in names:
        raise ConfigError(
            f"{where}: model_type '{model_type}' is not supported.{nearest(name, names)} "
            f"The families are: {', '.join(names)}."
        )
    family: Family[Any] = importlib.import_module(f"swissarmy.models.{name}").FAMILY
    return family


def build_model(values: Mapping[str, Any], *, where: str = "config") -> Model:
    """A model with new weights from a `config.json`'s content; under `torch.device("meta")`, without weights."""
    if "model_type" not in values:
        raise ConfigError(f"{where}: model_type is missing; it names the family: {', '.join(list_models())}.")
    family = find_family(str(values["model_type"]), where=where)
    config = family.read_config(values, where=where)
    model = family.build(config)
    own_names = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.source = Source(family, config, dict(values), own_names, frozenset(name for name, _ in every_mixin(model)))
    return model
