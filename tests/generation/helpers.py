"""What several tests of generation share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.testing import tiny_model

WITH_REFERENCE = ["gpt2", "llama", "gemma3_text", "t5"]


class Letters:
    """Ids 0 to 60 as characters; `end` ends a text."""

    def __init__(self, *end: int) -> None:
        self.eos_token_ids = end

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("A") + index) for index in ids)

    def stream(self) -> "Letters":
        return self

    def put(self, token_id: int) -> str:
        return self.decode([token_id])

    def end(self) -> str:
        return ""


def here_and_in_transformers(family: str, folder: Path, *, scale: float = 4.0) -> tuple[Model, Any]:
    """The tiny model of a family, as ours and as `transformers`' own, in float64."""
    tiny_model(family, scale=scale).save_pretrained(folder)
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    return sat.load(folder, dtype=torch.float64), kind.from_pretrained(folder, dtype=torch.float64).eval()


def until_end(tokens: torch.Tensor, start: int, ends: Sequence[int]) -> list[list[int]]:
    """Rows up to their first end token: what fills a row after it differs between libraries."""
    result = []
    for row in tokens.tolist():
        stops = [index for index in range(start, len(row)) if row[index] in ends]
        result.append(row[: stops[0] + 1] if stops else row)
    return result


def adapted(family: str) -> Model:
    """A model with prefix-tuning and LoRA, both of which change what it says."""
    model = tiny_model(family, scale=4.0)
    torch.manual_seed(0)
    model.add_mixin("prefix-tuning", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, r=2, targets=("attention.*", "mlp.*")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model.double()
