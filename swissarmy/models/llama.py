"""LLaMA 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024): RMS norm, gated MLP, rotary, grouped heads."""

from dataclasses import dataclass
from typing import final

from swissarmy.backbone.model import BaseModel
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import WeightMap, same
from swissarmy.mixins.rotary import RotaryMixin
from swissarmy.models._decoder import (
    LAYER,
    DecoderConfig,
    base_prefix,
    decoder_backbone,
    decoder_head,
    decoder_weights,
)
from swissarmy.models._family import Family, Preset, with_parts
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
class LlamaConfig(DecoderConfig):
    """`config.json` of LLaMA."""

    ignored = frozenset({"pretraining_tp", "rope_interleaved"})

    hidden_act: str = "silu"
    original_max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    mlp_bias: bool = False
    classifier_dropout: float | None = None


def build(config: LlamaConfig) -> BaseModel:
    """The backbone, rotary positions, and the head of the architecture."""
    backbone = decoder_backbone(config, activation=config.hidden_act, mlp_bias=config.mlp_bias, norm="rms")
    rope = rope_parameters(
        config.rope_parameters,
        config.rope_scaling,
        theta=config.rope_theta,
        default_theta=10000.0,
        original_length=config.original_max_position_embeddings,
        where="llama: rope_parameters",
    )
    mixins: dict[str, BaseMixin] = {"rotary": RotaryMixin.for_config(backbone, parameters=(rope,))}
    return with_parts(backbone, {**mixins, **decoder_head(config, backbone, dropout=config.classifier_dropout)})


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
