"""RoBERTa: activation, epsilon, head count, widths, token types, positions, untied and causal; every head."""

from typing import Any

import transformers
from transformers import RobertaConfig

from tests.parity.reference import Case, Inputs, encoder_inputs, one_choice


def case(name: str, architecture: str = "RobertaForMaskedLM", **changes: Any) -> Case:
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "vocab_size": 99,
        "max_position_embeddings": 34,
        "type_vocab_size": 1,
        "initializer_range": 0.2,
    }

    def inputs(config: Any) -> list[Inputs]:
        calls = encoder_inputs(config, causal=config.is_decoder)
        return one_choice(calls) if architecture.endswith("MultipleChoice") else calls

    return Case(
        f"roberta-{name}", lambda: getattr(transformers, architecture)(RobertaConfig(**sizes | changes)), inputs
    )


CASES = [
    case("plain"),
    case("relu in the layers, wide MLP, large epsilon", hidden_act="relu", intermediate_size=200, layer_norm_eps=1e-2),
    case("2 heads, 2 token types", num_attention_heads=2, type_vocab_size=2),
    case("untied", tie_word_embeddings=False),
    case("13 positions", max_position_embeddings=13),
    case("padding token 0", pad_token_id=0, max_position_embeddings=12),
    case("causal LM", "RobertaForCausalLM", is_decoder=True),
    case("LM that is not causal", "RobertaForCausalLM"),
    case("base", "RobertaModel"),
    case("sequence classification", "RobertaForSequenceClassification", num_labels=5),
    case("multiple choice", "RobertaForMultipleChoice"),
    case("token classification", "RobertaForTokenClassification", num_labels=3),
    case("question answering", "RobertaForQuestionAnswering"),
]
