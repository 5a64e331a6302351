"""`generate` and `stream`, with a tokenizer of one character a token, and with the real Gemma."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import swissarmy as sat
from swissarmy.testing import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "gemma3_270m.json"


class Letters:
    """Ids 0 to 60 as letters; 60 ends a text."""

    eos_token_ids = (60,)

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


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "swissarmy", "t5"])
def test_streamed_pieces_are_the_generated_text_and_batches_are_their_rows(family: str) -> None:
    model = tiny_model(family)
    prompts = ["HELLO", "A", "WORLDS"]
    texts = sat.generate(model, Letters(), prompts, max_new_tokens=8)
    assert len(texts) == 3
    for prompt, text in zip(prompts, texts, strict=True):
        assert "".join(sat.stream(model, Letters(), prompt, max_new_tokens=8)) == text
        assert sat.generate(model, Letters(), prompt, max_new_tokens=8) == [text]


def test_nothing_to_generate_gives_nothing() -> None:
    model = tiny_model("gpt2")
    assert sat.generate(model, Letters(), ["A", "B"], max_new_tokens=0) == ["", ""]
    assert sat.generate(model, Letters(), []) == []
    assert list(sat.stream(model, Letters(), "A", max_new_tokens=0)) == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"), [("", {}, "has no tokens"), ("A", {"max_new_tokens": -1}, "-1")]
)
def test_bad_prompts_are_named(prompt: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(sat.HookCallError, match=message):
        sat.generate(tiny_model("gpt2"), Letters(), prompt, **options)


def test_gemma_continues_as_the_reference_and_its_logits_agree(gemma_gguf: Path) -> None:
    """Measured with transformers 5.23 on the same dequantised weights; see the file's `model` field."""
    golden = json.loads(GOLDEN.read_text())
    model = sat.load(gemma_gguf)
    for prompt in golden["prompts"]:
        ids = torch.tensor(prompt["ids"])
        with torch.no_grad():
            logits = model(ids[None])[0][0]
        top = torch.tensor(prompt["top5_ids"])
        torch.testing.assert_close(logits.gather(1, top), torch.tensor(prompt["top5_logits"]), rtol=0, atol=1e-3)
        torch.testing.assert_close(logits.logsumexp(-1), torch.tensor(prompt["logsumexp"]), rtol=0, atol=1e-3)
        filled, _ = sat.fill_sequence(model, torch.cat((ids, torch.full((64,), -1))))
        assert filled[0, len(ids) :].tolist() == prompt["output_ids"]
