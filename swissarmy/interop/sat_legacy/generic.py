"""Any other old model: its backbone, as the plain backbone of this library."""

import re
from collections.abc import Mapping
from typing import Any, Final

from swissarmy.core.weight_map import WeightMap
from swissarmy.interop.sat_legacy.facts import DECODER, TEXT, BackboneFacts
from swissarmy.interop.sat_legacy.layout import DEFAULT_EPSILON, Checkpoint, Found, backbone_rules

ACTIVATIONS: Final[Mapping[str, str]] = {
    "chatglm2": "silu",
    "chatglm3": "silu",
    "chatglm4": "silu",
    "mixtral": "silu",
    "clip": "quick_gelu",
    "eva_clip": "gelu",
}
"""Of families; all others have SAT's own, the tanh approximation of GELU."""

_SEES_EVERYTHING = re.compile(r"eva_clip (?!.*text_).*|clip (.*\.)?image_encoder\.|\S+ (.*\.)?encoder\.")
"""A family, and what the names of one of its Transformers begin with, where that one looks ahead."""


def parts_of(checkpoint: Checkpoint) -> list[str]:
    """What the names of each Transformer in the checkpoint start with; `[""]` for a plain model.

    A Transformer inside a mixin (a vision encoder in front of a decoder) is that mixin's.
    """
    tail = "transformer.layers.0.attention.query_key_value.weight"
    found = [name.removesuffix(tail) for name in checkpoint.source.names() if name.endswith(tail)]
    return [""] if "" in found else [prefix for prefix in found if "mixins." not in prefix]


def generic(checkpoint: Checkpoint, family: str, prefix: str) -> Found:
    """The plain backbone of one part, with nothing but what is under `transformer.`."""
    own = {"decoder.": DECODER, "text_encoder.": TEXT}.get(prefix, "")
    facts = checkpoint.facts(prefix=prefix, arguments=own)
    arguments = checkpoint.arguments.for_part(own)
    causal = _SEES_EVERYTHING.fullmatch(f"{family} {prefix}") is None
    backbone = _backbone(facts) | {
        "activation": arguments.get("activation", str, ACTIVATIONS.get(family, "gelu_new")),
        "causal": arguments.get("causal", bool, causal),
    }
    if family == "gpt_neo":
        backbone["attention_scale"] = 1.0  # its scores are not scaled
    rules = backbone_rules(facts, cross_norms=checkpoint.cross_norms)
    config = {"model_type": "swissarmy", "architectures": ["BaseModel"], "backbone": backbone}
    return Found(config=config, weights=WeightMap(rules=tuple(rules)))


def _backbone(facts: BackboneFacts) -> dict[str, Any]:
    post = facts.order == "post"
    return {
        "num_layers": facts.num_layers,
        "hidden_size": facts.hidden_size,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": facts.num_key_value_heads,
        "head_dim": facts.head_dim,
        "intermediate_size": facts.intermediate_size,
        "vocab_size": facts.vocab_size,
        "max_sequence_length": facts.max_sequence_length,
        "gated_mlp": facts.gated,
        "query_key_value_bias": facts.query_key_value_bias,
        "attention_output_bias": facts.attention_output_bias,
        "mlp_bias": facts.mlp_bias,
        "norm": "layer" if facts.norm_bias else "rms",
        "norm_epsilon": facts.epsilon or DEFAULT_EPSILON,
        "norm_placement": facts.order,
        "embedding_norm": post,
        "final_norm": facts.final_norm and not post,
        "cross_attention": facts.cross_attention,
    }
