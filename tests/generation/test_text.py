"""`generate` and `stream`, with a tokenizer of one character a token, and with the real Gemma."""

import json
from pathlib import Path

import pytest
import torch

import swissarmy as sat
from swissarmy.generation import stopping
from swissarmy.testing import tiny_model
from tests.generation.helpers import Letters

GOLDEN = Path(__file__).parents[1] / "golden" / "gemma3_270m.json"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "swissarmy", "t5"])
def test_streamed_pieces_are_the_generated_text_and_batches_are_their_rows(family: str) -> None:
    model = tiny_model(family)
    prompts = ["HELLO", "A", "WORLDS"]
    texts = sat.generate(model, Letters(60), prompts, max_new_tokens=8)
    assert len(texts) == 3
    for prompt, text in zip(prompts, texts, strict=True):
        assert "".join(sat.stream(model, Letters(60), prompt, max_new_tokens=8)) == text
        assert sat.generate(model, Letters(60), prompt, max_new_tokens=8) == [text]


def test_nothing_to_generate_gives_nothing() -> None:
    model = tiny_model("gpt2")
    assert sat.generate(model, Letters(60), ["A", "B"], max_new_tokens=0) == ["", ""]
    assert sat.generate(model, Letters(60), []) == []
    assert list(sat.stream(model, Letters(60), "A", max_new_tokens=0)) == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"), [("", {}, "has no tokens"), ("A", {"max_new_tokens": -1}, "-1")]
)
def test_bad_prompts_are_named(prompt: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(sat.HookCallError, match=message):
        sat.generate(tiny_model("gpt2"), Letters(60), prompt, **options)


def test_a_bar_shows_on_a_terminal_only_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = tiny_model("gpt2"), ["HELLO", "A"]
    texts = sat.generate(model, Letters(60), prompts, max_new_tokens=8)
    assert sat.generate(model, Letters(60), prompts, max_new_tokens=8, progress=True) == texts
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    strategies = [
        sat.GreedyStrategy(),
        sat.BeamSearchStrategy(2),
        sat.ContrastiveStrategy(),
        sat.PromptLookupStrategy(),
    ]
    for strategy in strategies:
        plain = sat.generate(model, Letters(60), prompts, max_new_tokens=8, strategy=strategy, stop="never")
        assert capsys.readouterr().err == ""
        options = {"max_new_tokens": 8, "strategy": strategy, "stop": "never", "progress": True}
        assert sat.generate(model, Letters(60), prompts, **options) == plain
        out, err = capsys.readouterr()
        assert out == ""
        assert "generating" in err


def test_stop_strings_and_a_time_limit_hold_for_contrastive_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, strategy = tiny_model("gpt2", scale=4.0), ["HELLO", "A"], sat.ContrastiveStrategy(0.6, 4)
    full = sat.generate(model, Letters(60), prompts, max_new_tokens=10, strategy=strategy)
    stop = [full[0][3:5], full[1][2]]
    cut = sat.generate(model, Letters(60), prompts, max_new_tokens=10, strategy=strategy, stop=stop)
    for text, whole in zip(cut, full, strict=True):
        places = [whole.find(each) for each in stop if each in whole]
        assert whole.startswith(text)
        assert len(text) <= min(places)
    ticks = iter(range(1000))
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(ticks))
    (made,) = sat.generate_with_logprobs(model, Letters(60), "HELLO", max_new_tokens=10, max_time=4, strategy=strategy)
    assert made.finish_reason == "time"
    assert 0 < len(made.text) < 10
    assert full[0].startswith(made.text)
    with pytest.raises(sat.HookCallError, match="only at the end"):
        list(sat.stream(model, Letters(60), "A", strategy=strategy))


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
