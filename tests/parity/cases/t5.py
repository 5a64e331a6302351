"""T5: both versions, buckets, head size, depths that differ, activations; every architecture."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, T5Config

from tests.parity.reference import Case, Inputs, source_and_target_inputs, token_inputs

ENCODER_ONLY = ("T5EncoderModel", "T5ForTokenClassification")


def padded_tokens(config: Any) -> list[Inputs]:
    """The calls of `token_inputs` that T5 takes: it has no position ids."""
    return [call for call in token_inputs(config, causal=False) if call.name != "positions"]


def shifted(config: Any) -> list[Inputs]:
    """The source is also the target, and ends with an end token."""
    calls = [call for call in padded_tokens(config) if call.name != "dense mask"]
    for call in calls:
        last = -1 if call.real is None else call.real.long().cumsum(1).argmax(1)
        call.ours["input_ids"][torch.arange(3), last] = config.eos_token_id
    return [Inputs(call.name, call.theirs, call.ours) for call in calls]


def longer(config: Any) -> list[Inputs]:
    return source_and_target_inputs(config, source_length=19, target_length=23)


def both(output: Any) -> Mapping[str, tuple[Tensor, ...]]:
    return {"encoder": output.encoder_hidden_states, "decoder": output.decoder_hidden_states}


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A head of its own, as published checkpoints of version 1.1 have; the reference makes new ones with none."""
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def case(
    name: str,
    architecture: str = "T5ForConditionalGeneration",
    inputs: Callable[[Any], list[Inputs]] | None = None,
    **changes: Any,
) -> Case:
    sizes = {
        "d_model": 48,
        "d_kv": 12,
        "d_ff": 80,
        "num_layers": 3,
        "num_heads": 4,
        "vocab_size": 99,
        "decoder_start_token_id": 0,
    }

    def make() -> PreTrainedModel:
        model: PreTrainedModel = getattr(transformers, architecture)(T5Config(**sizes | changes))
        own_head = changes.get("tie_word_embeddings") is False and architecture == "T5ForConditionalGeneration"
        return untied(model) if own_head else model

    if architecture in ENCODER_ONLY:
        return Case(f"t5-{name}", make, inputs or padded_tokens)
    return Case(f"t5-{name}", make, inputs or source_and_target_inputs, both)


CASES = [
    case("1.0"),
    case("1.1", feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_heads=3, d_kv=16),
    case(
        "few buckets, longer target",
        inputs=longer,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=11,
    ),
    case("gated silu, heads of 7, deeper decoder", feed_forward_proj="gated-silu", d_kv=7, num_decoder_layers=4),
    case(
        "gelu, wide heads, shallow decoder, large epsilon",
        feed_forward_proj="gelu",
        d_kv=20,
        num_decoder_layers=1,
        layer_norm_epsilon=1e-2,
    ),
    case("gated relu, untied", feed_forward_proj="gated-relu", tie_word_embeddings=False),
    case("base", "T5Model", num_decoder_layers=2),
    case("encoder", "T5EncoderModel", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    case("token classification", "T5ForTokenClassification", num_labels=3),
    case("sequence classification", "T5ForSequenceClassification", shifted, num_labels=5),
    case("question answering", "T5ForQuestionAnswering", shifted, feed_forward_proj="gated-gelu"),
]
