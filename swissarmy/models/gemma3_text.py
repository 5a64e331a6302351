"""Gemma 3, its text model (Gemma Team 2025): sandwich norms, QK-norm, and five windowed layers for each full one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from swissarmy.backbone.model import BaseModel
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import WeightMap, same
from swissarmy.mixins.embedding_scale import EmbeddingScaleMixin
from swissarmy.mixins.qk_norm import QKNormMixin
from swissarmy.mixins.rotary import RotaryMixin
from swissarmy.mixins.sliding_window import SlidingWindowMixin
from swissarmy.mixins.softcap import LogitSoftcapMixin
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

LayerType = Literal["sliding_attention", "full_attention"]


@final
@dataclass(frozen=True, kw_only=True)
class Gemma3TextConfig(DecoderConfig):
    """`config.json` of Gemma 3's text model."""

    ignored = frozenset({"cache_implementation"})
    renamed: ClassVar[Mapping[str, str]] = {"_sliding_window_pattern": "sliding_window_pattern"}

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    pad_token_id: int | None = 0
    rope_local_base_freq: float = 10000.0
    query_pre_attn_scalar: float = 256
    sliding_window: int = 4096
    sliding_window_pattern: int = 6
    layer_types: tuple[LayerType, ...] | None = None
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: None = None
    use_bidirectional_attention: Literal[False] | None = False

    def problems(self) -> Iterator[str]:
        """A pattern of layers that fits their number."""
        yield from super().problems()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            yield f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}"
        if self.sliding_window_pattern < 1 or self.sliding_window < 1:
            yield f"sliding_window={self.sliding_window} and its pattern {self.sliding_window_pattern} must be positive"

    @property
    def layers_with_window(self) -> tuple[bool, ...]:
        """For each layer, whether it sees only a window."""
        if self.layer_types is not None:
            return tuple(kind == "sliding_attention" for kind in self.layer_types)
        return tuple((layer + 1) % self.sliding_window_pattern != 0 for layer in range(self.num_hidden_layers))


def build(config: Gemma3TextConfig) -> BaseModel:
    """The backbone, what Gemma adds to it, and the head of the architecture."""
    backbone = decoder_backbone(
        config,
        activation=config.hidden_activation,
        mlp_bias=False,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        norm="rms_one_plus",
        norm_placement="sandwich",
    )
    windows = config.layers_with_window
    mixins: dict[str, BaseMixin] = {
        "embedding-scale": EmbeddingScaleMixin(config.hidden_size**0.5),
        "rotary": RotaryMixin.for_config(
            backbone,
            parameters=(_rope(config, "full_attention"), _rope(config, "sliding_attention")),
            parameters_of_layer=[int(window) for window in windows],
        ),
        "qk-norm": QKNormMixin.for_config(backbone, kind="rms_one_plus"),
        "sliding-window": SlidingWindowMixin(config.sliding_window, windows),
    }
    mixins |= decoder_head(config, backbone, dropout=None)
    if config.final_logit_softcapping is not None and config.architecture == "Gemma3ForCausalLM":
        mixins["logit-softcap"] = LogitSoftcapMixin(config.final_logit_softcapping)
    return with_parts(backbone, mixins)


def _rope(config: Gemma3TextConfig, kind: LayerType) -> Any:
    full = kind == "full_attention"
    return rope_parameters(
        (config.rope_parameters or {}).get(kind),
        config.rope_scaling if full else None,
        theta=config.rope_theta if full else None,
        default_theta=1_000_000.0 if full else config.rope_local_base_freq,
        where=f"gemma3_text: rope_parameters['{kind}']",
    )


def weights(config: Gemma3TextConfig) -> WeightMap:
    """Norms on both sides of attention and MLP, and on queries and keys; the rest as in every decoder of its line."""
    theirs = f"{base_prefix(config)}layers.{{i}}"
    return decoder_weights(
        config,
        norms=(
            same(f"{theirs}.input_layernorm.weight", f"{LAYER}.attention_residual.input_norm.weight"),
            same(f"{theirs}.post_attention_layernorm.weight", f"{LAYER}.attention_residual.output_norm.weight"),
            same(f"{theirs}.pre_feedforward_layernorm.weight", f"{LAYER}.mlp_residual.input_norm.weight"),
            same(f"{theirs}.post_feedforward_layernorm.weight", f"{LAYER}.mlp_residual.output_norm.weight"),
            same(f"{theirs}.self_attn.q_norm.weight", "mixins.qk-norm.layers.{i}.query.weight"),
            same(f"{theirs}.self_attn.k_norm.weight", "mixins.qk-norm.layers.{i}.key.weight"),
        ),
    )


FAMILY = Family(
    config=Gemma3TextConfig,
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3TextForSequenceClassification"),
    build=build,
    weights=weights,
    presets={
        "gemma-3-270m": Preset(
            config={
                "vocab_size": 262144,
                "hidden_size": 640,
                "intermediate_size": 2048,
                "num_hidden_layers": 18,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "max_position_embeddings": 32768,
                "sliding_window": 512,
            },
            parameters=268_098_176,
        ),
        "gemma-3-1b": Preset(
            config={
                "vocab_size": 262144,
                "hidden_size": 1152,
                "intermediate_size": 6912,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "max_position_embeddings": 32768,
                "sliding_window": 512,
            },
            parameters=999_885_952,
        ),
    },
)
