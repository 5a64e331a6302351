"""Every family at a size that runs in milliseconds, and an input for it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.models._family import build_model

_DECODER = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_ENCODER = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 5,
}

TINY_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "bert": {**_ENCODER, "architectures": ["BertForMaskedLM"]},
    "deit": {**_VISION, "architectures": ["DeiTForImageClassification"]},
    "gemma3_text": {**_DECODER, "sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "gpt2": {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": _DECODER,
    "roberta": {**_ENCODER, "architectures": ["RobertaForMaskedLM"]},
    "swissarmy": {
        "backbone": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": 61,
            "max_sequence_length": 64,
        }
    },
    "t5": {
        "vocab_size": 61,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
    "vit": {**_VISION, "architectures": ["ViTForImageClassification"]},
}
"""A small configuration of each family, without dropout; a vocabulary of 61, width 32, 2 layers, 4 heads."""


def tiny_model(family: str, *, seed: int = 0, scale: float = 8.0, **changes: Any) -> Model:
    """A tiny model in evaluation mode, with random weights large enough that every part of it shows in the output.

    Args:
        family: A `model_type`.
        seed: Decides the weights.
        scale: How much larger than at the start of training the matrices are.
        **changes: Fields of the configuration.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model({"model_type": family, **TINY_CONFIGS[family], **changes})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_inputs(model: Model, *, batch: int = 2, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Keywords to call a tiny model with: token ids, or ids for both sides, or pixels."""
    generator = torch.Generator().manual_seed(seed)

    def ids(size: int) -> Tensor:
        return torch.randint(3, 61, (batch, size), generator=generator)

    if not isinstance(model, BaseModel):
        return {"input_ids": ids(length + 2), "decoder_input_ids": ids(length)}
    if "pixel_values" in model.accepted:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    return {"input_ids": ids(length)}
