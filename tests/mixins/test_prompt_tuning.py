"""Prompt tuning: a prompt does what tokens with its embeddings would, and the caller does not see it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.testing import tiny_inputs, tiny_model
from tests.mixins.method_cases import check_saving, close, logits, with_method

PROMPT = [7, 11, 5]


def prompted(family: str) -> Any:
    """A model whose prompt has the embeddings of three tokens."""
    model: Any = tiny_model(family).double()
    mixin = sat.PromptTuningMixin.for_model(model, prompt_len=3)
    reader = model.part("encoder") if model.parts else model
    model.add_mixin("prompt", mixin)
    (mixin["encoder"] if model.parts else mixin).start_from(reader.transformer.word_embeddings, PROMPT)
    return model


def with_tokens(ids: Tensor) -> Tensor:
    return torch.cat((torch.tensor(PROMPT).expand(len(ids), -1), ids), dim=1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta", "t5"])
def test_a_prompt_does_what_tokens_with_its_embeddings_would(family: str) -> None:
    model, plain = prompted(family), tiny_model(family).double()
    inputs = tiny_inputs(model)
    inputs["padding_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["padding_mask"][1, 6:] = 0
    longer = {**inputs, "input_ids": with_tokens(inputs["input_ids"])}
    longer["padding_mask"] = torch.nn.functional.pad(inputs["padding_mask"], (3, 0), value=1)
    length = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    expected, actual = logits(plain, **longer)[:, -length:], logits(model, **inputs)
    assert actual.shape == expected.shape
    real = slice(None) if family == "t5" else inputs["padding_mask"].bool()
    close(actual[real], expected[real])
    assert not torch.allclose(actual, logits(plain, **inputs))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_goes_on_as_after_those_tokens(family: str) -> None:
    rows = [torch.tensor([3, 9, 27]), torch.tensor([4, 8])]
    gaps = torch.full((5,), -1)
    alone, _ = sat.fill_sequence(prompted(family), [torch.cat((row, gaps)) for row in rows])
    plain, _ = sat.fill_sequence(
        tiny_model(family).double(), [torch.cat((torch.tensor(PROMPT), row, gaps)) for row in rows]
    )
    for index, row in enumerate(rows):
        assert alone[index, : len(row) + 5].tolist() == plain[index, 3 : len(row) + 8].tolist()
    beams = sat.BeamSearchStrategy(num_beams=3)
    seq = torch.cat((rows[0], gaps))
    with_beams, mems = sat.fill_sequence(prompted(family), seq, strategy=beams)
    assert mems.shape[2] < len(seq)  # the tokens' alone
    expected, _ = sat.fill_sequence(
        tiny_model(family).double(),
        torch.cat((torch.tensor(PROMPT), seq)),
        strategy=sat.BeamSearchStrategy(num_beams=3),
    )
    assert with_beams.tolist() == expected[:, 3:].tolist()


def test_generation_continues_from_mems_that_know_no_prompt() -> None:
    model = prompted("gpt2")
    whole, mems = sat.fill_sequence(model, torch.tensor([3, 9, -1, -1, -1, -1]))
    again, _ = sat.fill_sequence(model, torch.cat((whole[0, :4], torch.tensor([-1, -1]))), mems=mems[:, :, :3])
    assert again.tolist() == whole.tolist()


def test_the_prompt_is_read_once_in_a_generation() -> None:
    model = prompted("gpt2").with_mixin("cache", sat.CachedAutoRegressiveMixin())
    cache = sat.KVCache(2)
    with torch.no_grad():
        model(torch.tensor([[3, 9]]), mems=cache)
        kept = dict(cache.constants)
        model(torch.tensor([[4]]), mems=cache)
    assert len(cache) == 3
    assert set(cache.constants) == {(layer, f"prompt.{kind}") for layer in (0, 1) for kind in ("key", "value")}
    assert all(cache.constants[key] is kept[key] for key in kept)


def test_prompts_go_with_mixins_added_before_and_after_in_the_same_way() -> None:
    results = []
    for names in (("prompt", "lora", "prefix", "types"), ("types", "prefix", "lora", "prompt")):
        model: Any = tiny_model("llama").double()
        for name in names:
            torch.manual_seed(len(name))
            kind = {
                "prompt": sat.PromptTuningMixin,
                "lora": sat.LoRAMixin,
                "prefix": sat.PrefixTuningMixin,
                "types": sat.TokenTypesMixin,
            }[name]
            mixin = kind.for_model(model)
            for parameter in mixin.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
            model.add_mixin(name, mixin)
        results.append(logits(model))
    close(results[0], results[1])


def test_in_images_a_prompt_has_no_positions() -> None:
    model = with_method("vit", sat.PromptTuningMixin, prompt_len=3)
    assert model.get_mixin("method").positions_before == 0
    assert logits(model).shape == logits(tiny_model("vit").double()).shape


@pytest.mark.parametrize("family", ["gpt2", "t5", "vit"])
def test_it_is_loaded_again(family: str, tmp_path: Path) -> None:
    check_saving(tmp_path / "model", family, sat.PromptTuningMixin, prompt_len=3)


def test_what_cannot_be_is_refused() -> None:
    model = tiny_model("gpt2")
    for prompt_len in (0, 2.5):
        with pytest.raises(ConfigError, match=f"prompt_len={prompt_len} must be a whole number, at least 1"):
            sat.PromptTuningMixin.for_model(model, prompt_len=prompt_len)
    mixin = sat.PromptTuningMixin.for_model(model)
    with pytest.raises(ConfigError, match="must be tokens of a vocabulary of 61"):
        mixin.start_from(model.transformer.word_embeddings, [61])
    model.add_mixin("one", mixin).add_mixin("two", sat.PromptTuningMixin.for_model(model))
    with pytest.raises(HookCallError, match=r"is written by '(one|two)' and by"):
        model(torch.zeros(1, 2, dtype=torch.long))


def test_a_prompt_that_would_read_several_packed_documents_is_refused() -> None:
    model = prompted("bert")
    documents = sat.Documents(torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(HookCallError, match="give each document a row of its own"):
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=sat.Full() & documents)
