"""Tiny models that adapters of PEFT are put on, and what is compared."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str], tuple[str, ...]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1},
        ["c_attn", "c_proj"],
        ("query", "value", "mlp.up"),
    ),
    "llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        ["q_proj", "v_proj", "gate_proj"],
        ("key", "mlp.*"),
    ),
    "bert": (
        "BertForMaskedLM",
        {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2},
        ["query", "attention.output.dense"],
        ("*",),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"},
        ["q", "v", "wi_0"],
        ("cross_attention.*", "value"),
    ),
    **{
        family: (
            architecture,
            {
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "num_labels": 5,
            },
            ["q_proj", "attention.o_proj", "mlp.fc1"],
            ("value", "mlp.*"),
        )
        for family, architecture in (("vit", "ViTForImageClassification"), ("deit", "DeiTForImageClassification"))
    },
}
"""Architecture, sizes, what PEFT is to target, and what we are."""
PICTURES = ("vit", "deit")


def theirs(folder: Path, family: str) -> Any:
    return getattr(transformers, FAMILIES[family][0]).from_pretrained(folder, dtype=torch.float64).eval()


def logits(model: Any, family: str) -> Tensor:
    if family in PICTURES:
        pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=torch.float64).view(2, 3, 8, 8)
        seen = model(pixel_values=pixels)
        return (seen[0] if isinstance(seen, tuple) else seen.logits).detach()
    ids = torch.arange(14).view(2, 7) * 4 + 3
    decoder = {"decoder_input_ids": ids.flip(1)} if family == "t5" else {}
    result = model(input_ids=ids, **decoder)
    return (result[0] if isinstance(result, tuple) else result.logits).detach()


def close(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
