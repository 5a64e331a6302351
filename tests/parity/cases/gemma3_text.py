"""Gemma 3: window and layer pattern, grouped heads, head size, rope per kind of layer, soft cap; every head."""

from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers import Gemma3TextConfig

from tests.parity.reference import Case, Inputs, token_inputs


def inputs(config: Any) -> list[Inputs]:
    *others, dense = token_inputs(config, causal=True, length=13)
    return [*others, _windowed(dense, config.sliding_window)]


def _windowed(dense: Inputs, window: int) -> Inputs:
    """A dense mask replaces the reference's windows, and is narrowed by ours."""
    mask = dense.theirs["attention_mask"]
    near = ~torch.tril(torch.ones(mask.shape[-2:], dtype=torch.bool), diagonal=-window)
    masks = {"full_attention": mask, "sliding_attention": mask & near}
    return replace(dense, theirs={**dense.theirs, "attention_mask": masks})


def case(name: str, architecture: str = "Gemma3ForCausalLM", **changes: Any) -> Case:
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "initializer_range": 0.1,
    }
    return Case(
        f"gemma3-{name}", lambda: getattr(transformers, architecture)(Gemma3TextConfig(**sizes | changes)), inputs
    )


CASES = [
    case("plain"),
    case(
        "one key-value head, no window in the first layer",
        num_key_value_heads=1,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    case(
        "biases, heads of 10, other scale and epsilon",
        attention_bias=True,
        head_dim=10,
        query_pre_attn_scalar=7,
        rms_norm_eps=1e-2,
    ),
    case(
        "linear rope in full layers",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
        },
    ),
    case("logit soft cap, silu", final_logit_softcapping=3.0, hidden_activation="silu"),
    case("untied", tie_word_embeddings=False),
    case("base", "Gemma3TextModel"),
    # Small weights: the reference sums the gradients of its norms in float32, which shows at 1e-9 when they are large.
    case("sequence classification", "Gemma3TextForSequenceClassification", num_labels=5, initializer_range=0.05),
]
