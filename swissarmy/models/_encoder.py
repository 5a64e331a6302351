"""What BERT and the encoders that followed it share: configuration, backbone, heads, and names of tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import Rule, WeightMap, same
from swissarmy.mixins.heads import ClassificationHeadMixin, MLMHeadMixin
from swissarmy.mixins.learned_positions import LearnedPositionsMixin
from swissarmy.mixins.token_types import TokenTypesMixin
from swissarmy.models._family import FamilyConfig, with_parts

HEAD = "mixins.head"
LAYER = "transformer.layers.{i}"


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(FamilyConfig):
    """The fields of `config.json` that BERT-like encoders share."""

    ignored = frozenset(
        {
            "directionality",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
            "output_past",
            "eos_token_ids",
            "_num_labels",
            "sbert_ce_default_activation_function",
            "sentence_transformers",
        }
    )
    renamed: ClassVar[Mapping[str, str]] = {"is_decoder": "causal"}

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | None = None
    position_embedding_type: Literal["absolute"] = "absolute"
    causal: bool = False
    """Their `is_decoder`."""
    add_pooling_layer: bool = True
    """Whether a base model has the pooler; `load(..., overrides={"add_pooling_layer": False})` where it was not saved.
    No field of theirs."""

    @property
    def task(self) -> str:
        """The architecture's name without the family's: `Model`, `ForMaskedLM`."""
        return self.architecture[len(self.model_type) :]

    @property
    def head_dropout(self) -> float:
        """Dropout before a classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


def build_encoder(
    config: EncoderConfig, head: BaseMixin, *, vocab_size: int, position_offset: int | None = None
) -> BaseModel:
    """The backbone, token types, positions, and a head.

    Args:
        config: The family's configuration.
        head: What is made of the last hidden states.
        vocab_size: How many token ids.
        position_offset: The padding token, where positions are counted from after it, as in RoBERTa.
    """
    backbone = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=vocab_size,
        padding_id=config.pad_token_id,
        max_sequence_length=config.max_position_embeddings - (0 if position_offset is None else position_offset + 1),
        activation=config.hidden_act,
        norm_epsilon=config.layer_norm_eps,
        norm_placement="post",
        embedding_norm=True,
        final_norm=False,
        causal=config.causal,
        embedding_dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        hidden_dropout=config.hidden_dropout_prob,
        initializer_range=config.initializer_range,
        scale_residual_init=False,
    )
    positions = LearnedPositionsMixin(config.max_position_embeddings, config.hidden_size, padding_id=position_offset)
    token_types = TokenTypesMixin(config.type_vocab_size, config.hidden_size)
    return with_parts(backbone, {"token-types": token_types, "positions": positions, "head": head})


def lm_head(config: EncoderConfig, vocab_size: int, activation: str) -> MLMHeadMixin:
    """The head of a masked (or causal) language model."""
    return MLMHeadMixin(
        config.hidden_size,
        vocab_size,
        activation=activation,
        eps=config.layer_norm_eps,
        tied=config.tie_word_embeddings,
    )


def pooled_classifier(config: EncoderConfig, labels: int, dropout: float) -> ClassificationHeadMixin:
    """The pooler, dropout, and a classifier."""
    return ClassificationHeadMixin(config.hidden_size, labels, activation="tanh", dropout=dropout, input_dropout=0.0)


def token_classifier(config: EncoderConfig, labels: int, dropout: float) -> ClassificationHeadMixin:
    """A classifier of each token."""
    return ClassificationHeadMixin(config.hidden_size, labels, pooling="tokens", dropout=dropout)


def base_prefix(config: EncoderConfig) -> str:
    """What their names start with: nothing in a checkpoint of the base model."""
    return "" if config.task == "Model" else f"{config.model_type}."


def lm_rules(config: EncoderConfig, *, dense: str, norm: str, output: str, ours: str = HEAD) -> tuple[Rule, ...]:
    """The rules of a language-model head; untied, theirs adds the bias of the decoder and not the one beside it."""
    bias = f"{output}.bias" if config.tie_word_embeddings else f"{output}.decoder.bias"
    return (
        same(f"{dense}.{{p}}", f"{ours}.dense.{{p}}"),
        same(f"{norm}.{{p}}", f"{ours}.norm.{{p}}"),
        same(bias, f"{ours}.bias"),
        same(f"{output}.decoder.weight", f"{ours}.decoder.weight"),
    )


def encoder_weights(config: EncoderConfig, *, heads: Mapping[str, tuple[Rule, ...]], lm_output: str) -> WeightMap:
    """The map of a BERT-like encoder.

    Args:
        config: The family's configuration.
        heads: The rules of the head for each task; a checkpoint may hold heads of other tasks.
        lm_output: Where the language-model head keeps its bias and its decoder.
    """
    prefix, base = f"{config.model_type}.", base_prefix(config)
    theirs = f"{base}encoder.layer.{{i}}"
    buffers = [f"{start}embeddings.{name}" for start in ("", prefix) for name in ("position_ids", "token_type_ids")]
    poolers = [f"{start}pooler.dense.{{p}}" for start in ("", prefix)]
    bias, decoder = f"{lm_output}.bias", f"{lm_output}.decoder"
    tied = {f"{decoder}.weight": f"{base}embeddings.word_embeddings.weight", f"{decoder}.bias": bias}
    predicts = any(rule.theirs == f"{decoder}.weight" for rule in heads[config.task])
    return WeightMap(
        prefix=prefix,
        rules=(
            same(f"{base}embeddings.word_embeddings.weight", "transformer.word_embeddings.weight"),
            same(f"{base}embeddings.position_embeddings.weight", "mixins.positions.table.weight"),
            same(f"{base}embeddings.token_type_embeddings.weight", "mixins.token-types.table.weight"),
            same(f"{base}embeddings.LayerNorm.{{p}}", "transformer.embedding_norm.{p}"),
            same(f"{theirs}.attention.self.query.{{p}}", f"{LAYER}.attention.query.{{p}}"),
            same(f"{theirs}.attention.self.key.{{p}}", f"{LAYER}.attention.key.{{p}}"),
            same(f"{theirs}.attention.self.value.{{p}}", f"{LAYER}.attention.value.{{p}}"),
            same(f"{theirs}.attention.output.dense.{{p}}", f"{LAYER}.attention.output.{{p}}"),
            same(f"{theirs}.attention.output.LayerNorm.{{p}}", f"{LAYER}.attention_residual.output_norm.{{p}}"),
            same(f"{theirs}.intermediate.dense.{{p}}", f"{LAYER}.mlp.up.{{p}}"),
            same(f"{theirs}.output.dense.{{p}}", f"{LAYER}.mlp.down.{{p}}"),
            same(f"{theirs}.output.LayerNorm.{{p}}", f"{LAYER}.mlp_residual.output_norm.{{p}}"),
            *heads[config.task],
        ),
        ignored=(*buffers, *poolers, bias, f"{decoder}.bias", *(r.theirs for rules in heads.values() for r in rules)),
        duplicates=tied if predicts and config.tie_word_embeddings else {},
        copies={} if config.tie_word_embeddings else {bias: f"{decoder}.bias"},
        aliases={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    )
