"""Guessing strategies give exactly what the plain strategy gives, in fewer steps."""

from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.testing import tiny_model

FAMILIES = ["gpt2", "llama", "gemma3_text", "t5"]
SOURCE = torch.tensor([[5, 6, 7], [9, 3, 4]])
SEQUENCES: dict[str, Any] = {
    "one": [[5, 6, 7, 5, 6, *[-1] * 12]],
    "batch": [[5, 6, 5, *[-1] * 12], [9, 3, 9, *[-1] * 12]],
    "ragged": [[5, 6, 5, 6, *[-1] * 12], [9, *[-1] * 7]],
    "given after gaps": [[5, 6, -1, 5, 6, 7, -1, -1, -1, 4, -1, -1], [3, 4, *[-1] * 9, 5]],
}


def plain_strategies() -> list[sat.TokenStrategy]:
    return [
        sat.GreedyStrategy(),
        sat.GreedyStrategy([7, 11, 30]),
        sat.GreedyStrategy(no_repeat_ngram_size=3, repetition_penalty=1.2),
        sat.SamplingStrategy(temperature=1.5, seed=3, end_tokens=[7]),
    ]


def guessing(plain: sat.TokenStrategy, draft: Model, source: dict[str, Tensor]) -> list[sat.Strategy]:
    return [
        sat.PromptLookupStrategy(plain, num_guesses=4),
        sat.PromptLookupStrategy(plain, num_guesses=2, max_ngram=1),
        sat.SpeculativeStrategy(draft, plain, num_guesses=3, draft_kw_args=source),
    ]


@pytest.mark.parametrize("memory", [None, 4])
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_guessing_changes_neither_tokens_nor_mems(family: str, name: str, memory: int | None) -> None:
    model = tiny_model(family).double()
    model.add_mixin("prefix-tuning", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    draft = tiny_model(family, scale=7.0).double()
    rows = [torch.tensor(row) for row in SEQUENCES[name]]
    source = {"input_ids": SOURCE[: len(rows)]} if model.parts else {}
    for plain in plain_strategies():
        expected, mems = sat.fill_sequence(model, rows, strategy=plain, max_memory_length=memory, **source)
        for strategy in guessing(plain, draft, source):
            tokens, same = sat.fill_sequence(model, rows, strategy=strategy, max_memory_length=memory, **source)
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(same, mems)


def count_steps(model: Model, strategy: sat.Strategy) -> int:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.transformer.register_forward_hook(count)  # type: ignore[union-attr,operator]
    sat.fill_sequence(model, torch.tensor([5, 6, *[-1] * 30]), strategy=strategy)
    handle.remove()
    return calls


def test_a_model_that_guesses_for_itself_needs_a_fraction_of_the_steps() -> None:
    model = tiny_model("llama").double()
    draft = tiny_model("llama").double()
    assert count_steps(model, sat.GreedyStrategy()) == 30
    assert count_steps(model, sat.SpeculativeStrategy(draft, num_guesses=4)) == 6


def test_a_repeated_prompt_needs_fewer_steps() -> None:
    model = tiny_model("gpt2").double()
    forced = sat.GreedyStrategy(forced_tokens={index: 5 + index % 3 for index in range(40)})
    assert count_steps(model, sat.PromptLookupStrategy(forced, num_guesses=4)) < 12


def test_end_tokens_of_a_tokenizer_reach_the_strategy_inside() -> None:
    strategy = sat.PromptLookupStrategy(sat.GreedyStrategy()).ending_at([4])
    assert strategy.end_tokens == strategy.strategy.end_tokens == (4,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sat.PromptLookupStrategy(num_guesses=0), "num_guesses=0"),
        (lambda: sat.PromptLookupStrategy(max_ngram=0), "max_ngram=0"),
        (lambda: sat.PromptLookupStrategy(sat.BeamSearchStrategy(2)), "BeamSearchStrategy cannot be guessed"),
    ],
)
def test_what_cannot_be_guessed_is_refused(make: Any, message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        make()
