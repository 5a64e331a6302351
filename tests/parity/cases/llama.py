"""LLaMA: grouped heads, odd head size, tied head, biases, every kind of rope scaling; every head."""

from typing import Any

import transformers
from transformers import LlamaConfig

from tests.parity.reference import Case, Inputs, token_inputs


def inputs(config: Any) -> list[Inputs]:
    return token_inputs(config, causal=True)


def case(name: str, architecture: str = "LlamaForCausalLM", **changes: Any) -> Case:
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    return Case(f"llama-{name}", lambda: getattr(transformers, architecture)(LlamaConfig(**sizes | changes)), inputs)


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


CASES = [
    case("plain"),
    case("grouped heads, large epsilon", num_key_value_heads=2, rms_norm_eps=1e-2),
    case("one key-value head, heads of 6, tied", num_key_value_heads=1, head_dim=6, tie_word_embeddings=True),
    case("biases, gelu", attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    case("linear rope", **rope("linear", factor=2.0)),
    case("dynamic rope", max_position_embeddings=8, **rope("dynamic", factor=2.0)),
    case("yarn rope", **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    case(
        "yarn rope, betas",
        **rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=2.0),
    ),
    case(
        "longrope, beyond the trained length",
        **rope(
            "longrope",
            factor=4.0,
            original_max_position_embeddings=8,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            long_factor=[2.0, 2.1, 2.2, 2.3, 2.4, 2.5],
        ),
    ),
    case(
        "llama3 rope",
        **rope("llama3", factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    case("base", "LlamaModel"),
    case("sequence classification", "LlamaForSequenceClassification", num_labels=5),
    case("token classification", "LlamaForTokenClassification", num_labels=3),
    case("question answering", "LlamaForQuestionAnswering"),
]
