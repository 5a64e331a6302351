"""LLaMA 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024): RMS norm, gated MLP, rotary, grouped heads."""

from dataclasses import dataclass
from typing import Any, final

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import WeightMap, same
from swissarmy.mixins.rotary import RotaryMixin
from swissarmy.models._decoder import LAYER, base_prefix, decoder_head, decoder_weights
from swissarmy.models._family import Family, FamilyConfig, Preset
from swissarmy.models._rope import rope_parameters

LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@final
@dataclass(frozen=True, kw_only=True)
class LlamaConfig(FamilyConfig):
    """`config.json` of LLaMA."""

    ignored = frozenset({"pretraining_tp", "rope_interleaved"})

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    classifier_dropout: float | None = None


def build(config: LlamaConfig) -> BaseModel:
    """The backbone, rotary positions, and the head of the architecture."""
    backbone = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        activation=config.hidden_act,
        gated_mlp=True,
        query_key_value_bias=config.attention_bias,
        attention_output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        norm="rms",
        norm_epsilon=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings or config.architecture != "LlamaForCausalLM",
        attention_dropout=config.attention_dropout,
        initializer_range=config.initializer_range,
    )
    rope = rope_parameters(
        config.rope_parameters,
        config.rope_scaling,
        theta=config.rope_theta,
        default_theta=10000.0,
        original_length=config.original_max_position_embeddings,
        where="llama: rope_parameters",
    )
    mixins: dict[str, BaseMixin] = {"rotary": RotaryMixin.for_config(backbone, parameters=(rope,))}
    return BaseModel(backbone, {**mixins, **decoder_head(config, backbone, dropout=config.classifier_dropout)})


def weights(config: LlamaConfig) -> WeightMap:
    """A norm before attention and one before the MLP; the rest as in every decoder of this line."""
    theirs = f"{base_prefix(config)}layers.{{i}}"
    return decoder_weights(
        config,
        norms=(
            same(f"{theirs}.input_layernorm.weight", f"{LAYER}.attention_residual.input_norm.weight"),
            same(f"{theirs}.post_attention_layernorm.weight", f"{LAYER}.mlp_residual.input_norm.weight"),
        ),
    )


FAMILY = Family(
    config=LlamaConfig,
    architectures=(
        "LlamaForCausalLM",
        "LlamaModel",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaForQuestionAnswering",
    ),
    build=build,
    weights=weights,
    presets={
        "llama-2-7b": Preset(config={"max_position_embeddings": 4096}, parameters=6_738_415_616),
        "llama-2-13b": Preset(
            config={
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "max_position_embeddings": 4096,
            },
            parameters=13_015_864_320,
        ),
        "llama-3.1-8b": Preset(
            config={
                "vocab_size": 128256,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_parameters": LLAMA_31_ROPE | {"factor": 8.0},
            },
            parameters=8_030_261_248,
        ),
        "llama-3.2-1b": Preset(
            config={
                "vocab_size": 128256,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 16,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": True,
                "rope_parameters": LLAMA_31_ROPE | {"factor": 32.0},
            },
            parameters=1_235_814_400,
        ),
    },
)
