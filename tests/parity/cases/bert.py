"""BERT: activation, epsilon, head count, widths, token types, positions, untied and causal; every head."""

from typing import Any

import transformers
from transformers import BertConfig

from tests.parity.reference import Case, Inputs, encoder_inputs, one_choice


def case(name: str, architecture: str = "BertForMaskedLM", **changes: Any) -> Case:
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "vocab_size": 99,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
    }

    def inputs(config: Any) -> list[Inputs]:
        calls = encoder_inputs(config, causal=config.is_decoder)
        return one_choice(calls) if architecture.endswith("MultipleChoice") else calls

    return Case(f"bert-{name}", lambda: getattr(transformers, architecture)(BertConfig(**sizes | changes)), inputs)


CASES = [
    case("plain"),
    case("relu, wide MLP, large epsilon", hidden_act="relu", intermediate_size=200, layer_norm_eps=1e-2),
    case("tanh gelu, 6 heads, no dropout", hidden_act="gelu_new", num_attention_heads=6, hidden_dropout_prob=0.0),
    case("untied, 3 token types", tie_word_embeddings=False, type_vocab_size=3),
    case("12 positions, another padding token", max_position_embeddings=12, pad_token_id=2),
    case("no padding token, one layer", pad_token_id=None, num_hidden_layers=1),
    case("causal LM", "BertLMHeadModel", is_decoder=True),
    case("LM that is not causal", "BertLMHeadModel"),
    case("base", "BertModel"),
    case("causal base", "BertModel", is_decoder=True),
    case("pretraining", "BertForPreTraining"),
    case("pretraining, untied", "BertForPreTraining", tie_word_embeddings=False),
    case("next sentence", "BertForNextSentencePrediction"),
    case("sequence classification", "BertForSequenceClassification", num_labels=5),
    case("multiple choice", "BertForMultipleChoice"),
    case("token classification", "BertForTokenClassification", num_labels=3),
    case("question answering", "BertForQuestionAnswering"),
]
