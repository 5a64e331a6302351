"""GPT-2: activation, inner width, unscaled attention, untied head; every head."""

from typing import Any

import transformers
from transformers import GPT2Config

from tests.parity.reference import Case, Inputs, token_inputs


def inputs(config: Any) -> list[Inputs]:
    return token_inputs(config, causal=True)


def case(name: str, architecture: str = "GPT2LMHeadModel", **changes: Any) -> Case:
    sizes = {
        "n_layer": 3,
        "n_embd": 48,
        "n_head": 4,
        "vocab_size": 99,
        "n_positions": 32,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    return Case(f"gpt2-{name}", lambda: getattr(transformers, architecture)(GPT2Config(**sizes | changes)), inputs)


CASES = [
    case("plain"),
    case("relu and a narrow MLP", activation_function="relu", n_inner=40),
    case("unscaled attention, large epsilon", scale_attn_weights=False, layer_norm_epsilon=1e-2),
    case("untied, exact gelu, odd head", tie_word_embeddings=False, activation_function="gelu", n_embd=60, n_head=4),
    case("base", "GPT2Model"),
    case("sequence classification", "GPT2ForSequenceClassification", num_labels=5),
    case("token classification", "GPT2ForTokenClassification", num_labels=3),
    case("question answering", "GPT2ForQuestionAnswering"),
]
