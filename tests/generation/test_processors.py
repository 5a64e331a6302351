"""Processors: equal to those of `transformers`, blind to padding, and none brings a token back."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers.generation.logits_process as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import swissarmy as sat
from swissarmy.generation import processors
from swissarmy.generation.processors import LogitsProcessor
from swissarmy.testing import tiny_model

VOCAB = 12

SAME: dict[str, tuple[LogitsProcessor, Callable[[], Any]]] = {
    "temperature": (processors.temperature(0.7), lambda: reference.TemperatureLogitsWarper(0.7)),
    "top_k": (processors.top_k(4), lambda: reference.TopKLogitsWarper(4)),
    "top_p": (processors.top_p(0.8), lambda: reference.TopPLogitsWarper(0.8)),
    "min_p": (processors.min_p(0.1), lambda: reference.MinPLogitsWarper(0.1)),
    "typical_p": (processors.typical_p(0.6), lambda: reference.TypicalLogitsWarper(0.6)),
    "typical_p 0.95": (processors.typical_p(0.95), lambda: reference.TypicalLogitsWarper(0.95)),
    "repetition_penalty": (
        processors.repetition_penalty(1.7),
        lambda: reference.RepetitionPenaltyLogitsProcessor(1.7),
    ),
    "no_repeat_ngram 1": (processors.no_repeat_ngram(1), lambda: reference.NoRepeatNGramLogitsProcessor(1)),
    "no_repeat_ngram 2": (processors.no_repeat_ngram(2), lambda: reference.NoRepeatNGramLogitsProcessor(2)),
    "no_repeat_ngram 3": (processors.no_repeat_ngram(3), lambda: reference.NoRepeatNGramLogitsProcessor(3)),
    "bad_words": (
        processors.bad_words([[3], [1, 2], [0, 1, 4]]),
        lambda: reference.NoBadWordsLogitsProcessor([[3], [1, 2], [0, 1, 4]], eos_token_id=11),
    ),
    "suppressed_tokens": (
        processors.suppressed_tokens([2, 7]),
        lambda: reference.SuppressTokensLogitsProcessor([2, 7]),
    ),
    "min_length": (
        processors.min_length(20, [1, 5]),
        lambda: reference.MinLengthLogitsProcessor(20, torch.tensor([1, 5])),
    ),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("length", [1, 2, 16, 20])
def test_processors_equal_those_of_transformers(name: str, length: int) -> None:
    ours, theirs = SAME[name]
    generator = torch.Generator().manual_seed(length)
    for _ in range(20):
        logits = torch.randn(3, VOCAB, generator=generator, dtype=torch.float64) * 3
        tokens = torch.randint(0, 4, (3, length), generator=generator)
        torch.testing.assert_close(ours(logits.clone(), tokens), theirs()(tokens, logits.clone()))


def test_forced_tokens_leave_one_choice_at_their_place() -> None:
    logits = torch.randn(2, VOCAB)
    force = processors.forced_tokens({2: 7})
    forced = force(logits, torch.tensor([[1, 2], [-1, 2]]))
    assert torch.isfinite(forced[0]).nonzero().flatten().tolist() == [7]
    assert torch.equal(forced[1], logits[1])


def test_presence_counts_once_and_frequency_each_time() -> None:
    logits, tokens = torch.zeros(1, 4), torch.tensor([[1, 1, 1, 2]])
    assert processors.presence_penalty(0.5)(logits, tokens).tolist() == [[0.0, -0.5, -0.5, 0.0]]
    assert processors.frequency_penalty(0.5)(logits, tokens).tolist() == [[0.0, -1.5, -0.5, 0.0]]


@pytest.mark.parametrize("name", SAME)
def test_columns_without_a_token_do_not_count(name: str) -> None:
    process = SAME[name][0]
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    row = torch.tensor([[1, 2, 0, 1]])
    padded = torch.tensor([[-1, -1, -1, 1, 2, 0, 1]])
    torch.testing.assert_close(process(logits, padded), process(logits, row))


OPTIONS = {
    "temperature": st.floats(0.05, 20),
    "top_k": st.integers(1, 40),
    "top_p": st.floats(0.01, 1.0),
    "min_p": st.floats(0.0, 1.0),
    "typical_p": st.floats(0.01, 1.0),
    "repetition_penalty": st.floats(0.1, 10),
    "presence_penalty": st.floats(-5, 5),
    "frequency_penalty": st.floats(-5, 5),
    "no_repeat_ngram_size": st.integers(2, 4),
    "bad_words": st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), max_size=3),
    "suppressed_tokens": st.lists(st.integers(0, 6), max_size=3),
    "forced_tokens": st.dictionaries(st.integers(0, 8), st.just(7), max_size=2),
    "min_length": st.integers(0, 9),
}


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), options=st.fixed_dictionaries({}, optional=OPTIONS))
def test_no_setting_draws_a_token_that_the_model_ruled_out(seed: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(4, 20, generator=generator) < 0.8
    masked[:, 7] = False
    logits = (torch.randn(4, 20, generator=generator) * 5).masked_fill(masked, float("-inf"))
    tokens = torch.randint(-1, 7, (4, 6), generator=generator)
    strategies = [sat.SamplingStrategy(seed=seed, end_tokens=[3], **options)]
    shaped = {"temperature", "top_k", "top_p", "min_p", "typical_p"}
    plain = {key: value for key, value in options.items() if key not in shaped}
    strategies.append(sat.GreedyStrategy(end_tokens=[3], **plain))
    for strategy in strategies:
        strategy.reset(4, logits.device)
        chosen = strategy.forward(logits, tokens, sat.KVCache(1))[0][:, -1]
        assert not masked.gather(1, chosen[:, None]).any()
        assert not {word[0] for word in options.get("bad_words", []) if len(word) == 1} & set(chosen.tolist())
        assert not set(options.get("suppressed_tokens", [])) & set(chosen.tolist())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "t5"])
def test_settings_hold_in_ragged_batches_with_a_prefix(family: str) -> None:
    model = tiny_model(family)
    model.add_mixin("prefix-tuning", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    rows = [torch.tensor([5, 6, 7, -1, 4, *[-1] * 6]), torch.tensor([9, *[-1] * 8])]
    source = {"input_ids": torch.tensor([[5, 6, 7], [9, 3, 4]])} if family == "t5" else {}
    options: dict[str, Any] = {"no_repeat_ngram_size": 2, "suppressed_tokens": [11, 30], "repetition_penalty": 1.3}
    for strategy in (
        sat.GreedyStrategy(**options),
        sat.SamplingStrategy(temperature=2.0, top_p=0.9, min_p=0.01, seed=5, **options),
    ):
        tokens, _ = sat.fill_sequence(model, rows, strategy=strategy, **source)
        first = {key: value[:1] for key, value in source.items()}
        alone, _ = sat.fill_sequence(model, rows[0], strategy=strategy, **first)
        assert tokens[0].tolist() == alone[0].tolist()
        for row in tokens.tolist():
            new = [token for token in row if token >= 0]
            pairs = list(pairwise(new))
            assert not {11, 30} & set(new)
            assert len(set(pairs)) >= len(pairs) - 2  # given tokens may repeat a pair


def test_a_processor_of_ones_own_sees_logits_and_tokens() -> None:
    seen: list[Tensor] = []

    def only_four(logits: Tensor, tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return logits.masked_fill(torch.arange(logits.shape[-1]) != 4, float("-inf"))

    rows = [torch.tensor([5, 6, -1, -1]), torch.tensor([9, -1])]
    tokens, _ = sat.fill_sequence(tiny_model("gpt2"), rows, strategy=sat.GreedyStrategy(processors=[only_four]))
    assert tokens.tolist() == [[5, 6, 4, 4], [9, 4, -1, -1]]
    assert [each.tolist() for each in seen] == [[[5, 6], [-1, 9]], [[5, 6, 4], [-1, 9, 4]]]


def test_min_length_counts_what_was_generated_and_follows_the_end_tokens() -> None:
    model = tiny_model("gpt2")
    seq = torch.tensor([5, 6, *[-1] * 10])
    end = int(sat.fill_sequence(model, seq)[0][0, 3])
    strategy = sat.GreedyStrategy(min_length=4).ending_at([end])
    tokens = sat.fill_sequence(model, seq, strategy=strategy)[0][0].tolist()
    assert end not in tokens[2:6]


def test_a_given_end_token_does_not_end_a_row() -> None:
    model = tiny_model("gpt2")
    seq = torch.tensor([5, -1, 7, -1, -1])
    free, _ = sat.fill_sequence(model, seq)
    ended, _ = sat.fill_sequence(model, seq, strategy=sat.GreedyStrategy([7, 60]))
    assert 7 in free[0, :3].tolist()
    if not {7, 60} & {int(free[0, 1]), int(free[0, 3])}:
        assert torch.equal(ended, free)


def test_given_tokens_stay_when_every_row_ended_before_them() -> None:
    model = tiny_model("gpt2")
    end = int(sat.fill_sequence(model, torch.tensor([5, -1]))[0][0, 1])
    tokens, _ = sat.fill_sequence(model, torch.tensor([5, -1, 7, -1, 8]), strategy=sat.GreedyStrategy([end]))
    assert tokens.tolist() == [[5, end, 7, -1, 8]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"typical_p": 0.0}, "typical_p=0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"presence_penalty": float("nan")}, "presence_penalty=nan"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty=inf"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size=0"),
        ({"bad_words": [[]]}, "bad_words"),
        ({"suppressed_tokens": [-1]}, "suppressed_tokens"),
        ({"forced_tokens": {0: -1}}, "forced_tokens"),
        ({"min_length": -1}, "min_length=-1"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.SamplingStrategy(**options)


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(TypeError, match="repetition_penalt"):
        sat.GreedyStrategy(repetition_penalt=1.2)


def test_when_every_token_is_ruled_out_that_is_an_error() -> None:
    strategy = sat.GreedyStrategy(suppressed_tokens=range(61))
    with pytest.raises(sat.HookCallError, match="every token is ruled out in row 0, column 2"):
        sat.fill_sequence(tiny_model("gpt2"), torch.tensor([5, 6, -1]), strategy=strategy)
