"""What LLaMA and the decoders that followed it share: configuration, backbone, heads, and names of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import Rule, WeightMap, same
from swissarmy.mixins.heads import ClassificationHeadMixin, NoHeadMixin
from swissarmy.models._family import FamilyConfig

LAYER = "transformer.layers.{i}"


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(FamilyConfig):
    """The fields of `config.json` that LLaMA-like decoders share; the defaults are LLaMA's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0


def decoder_backbone(config: DecoderConfig, *, activation: str, **options: Any) -> TransformerConfig:
    """The backbone of a LLaMA-like decoder: grouped heads, RMS norms, a gated MLP; `options` are what differs."""
    tied = config.tie_word_embeddings or not config.architecture.endswith("ForCausalLM")
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        activation=activation,
        gated_mlp=True,
        query_key_value_bias=config.attention_bias,
        attention_output_bias=config.attention_bias,
        norm_epsilon=config.rms_norm_eps,
        tie_word_embeddings=tied,
        attention_dropout=config.attention_dropout,
        initializer_range=config.initializer_range,
        **options,
    )


def base_prefix(config: FamilyConfig) -> str:
    """What their names start with: nothing in a checkpoint of the base model."""
    if config.architecture.endswith("ForQuestionAnswering"):
        return "transformer."
    return "model." if "For" in config.architecture else ""


def decoder_head(config: FamilyConfig, backbone: TransformerConfig, *, dropout: float | None) -> dict[str, BaseMixin]:
    """The mixin for what the architecture's name ends with; a causal LM needs none."""

    def classifier(labels: int, **options: object) -> dict[str, BaseMixin]:
        head = ClassificationHeadMixin.for_config(
            backbone, num_labels=labels, padding_id=config.pad_token_id, **options
        )
        return {"head": head}

    match config.architecture.partition("For")[2]:
        case "CausalLM":
            return {}
        case "SequenceClassification":
            return classifier(config.num_labels, pooling="last", bias=False)
        case "TokenClassification":
            return classifier(config.num_labels, pooling="tokens", dropout=0.1 if dropout is None else dropout)
        case "QuestionAnswering":
            return classifier(2, pooling="tokens")
        case _:
            return {"head": NoHeadMixin()}


def decoder_weights(config: FamilyConfig, *, norms: Sequence[Rule]) -> WeightMap:
    """The map of a LLaMA-like decoder; `norms` are the rules of its norms inside a layer."""
    base = base_prefix(config)
    theirs = f"{base}layers.{{i}}"
    head = "qa_outputs" if config.architecture.endswith("ForQuestionAnswering") else "score"
    return WeightMap(
        prefix=base or "model.",
        rules=(
            same(f"{base}embed_tokens.weight", "transformer.word_embeddings.weight"),
            *norms,
            same(f"{theirs}.self_attn.q_proj.{{p}}", f"{LAYER}.attention.query.{{p}}"),
            same(f"{theirs}.self_attn.k_proj.{{p}}", f"{LAYER}.attention.key.{{p}}"),
            same(f"{theirs}.self_attn.v_proj.{{p}}", f"{LAYER}.attention.value.{{p}}"),
            same(f"{theirs}.self_attn.o_proj.{{p}}", f"{LAYER}.attention.output.{{p}}"),
            same(f"{theirs}.mlp.gate_proj.{{p}}", f"{LAYER}.mlp.gate.{{p}}"),
            same(f"{theirs}.mlp.up_proj.{{p}}", f"{LAYER}.mlp.up.{{p}}"),
            same(f"{theirs}.mlp.down_proj.{{p}}", f"{LAYER}.mlp.down.{{p}}"),
            same(f"{base}norm.weight", "transformer.final_norm.weight"),
            same("lm_head.weight", "transformer.lm_head.weight"),
            same(f"{head}.{{p}}", "mixins.head.classifier.{p}"),
        ),
        ignored=(f"{theirs}.self_attn.rotary_emb.inv_freq", f"{base}rotary_emb.inv_freq"),
        duplicates={"lm_head.weight": f"{base}embed_tokens.weight"} if config.tie_word_embeddings else {},
    )
