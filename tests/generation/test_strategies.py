"""Strategies: what is drawn, what is never drawn, and what does not depend on the neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import swissarmy as sat
from swissarmy.testing import tiny_model


def draw(logits: torch.Tensor, **options: object) -> torch.Tensor:
    strategy = sat.SamplingStrategy(**options)
    strategy.reset(len(logits), logits.device)
    tokens, _ = strategy.forward(logits, torch.zeros(len(logits), 0, dtype=torch.long), sat.KVCache(1))
    return tokens[:, -1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.05, 20),
    top_k=st.one_of(st.none(), st.integers(1, 40)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1.0)),
)
def test_a_masked_token_is_never_drawn(seed: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 20, generator=generator) * 5
    masked = torch.rand(4, 20, generator=generator) < 0.8
    masked[:, 7] = False
    drawn = draw(
        logits.masked_fill(masked, float("-inf")), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    assert not masked.gather(1, drawn[:, None]).any()


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = draw(probabilities.log().expand(20000, -1), seed=0)
    assert (torch.bincount(drawn, minlength=4) / 20000 - probabilities).abs().max() < 0.015


def test_top_k_and_top_p_keep_the_most_likely() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(2000, -1)
    assert set(draw(logits, top_k=2, seed=0).tolist()) == {0, 1}
    assert set(draw(logits, top_p=0.65, seed=0).tolist()) == {0, 1}
    assert set(draw(logits, top_p=0.75, seed=0).tolist()) == {0, 1, 2}
    assert set(draw(logits, top_k=100, seed=0).tolist()) == {0, 1, 2, 3}


def test_a_rows_draws_do_not_depend_on_its_neighbours_and_a_seed_repeats_them() -> None:
    model = tiny_model("llama")
    strategy = sat.SamplingStrategy(temperature=3.0, seed=7)
    rows = torch.tensor([[5, 6, *[-1] * 8], [9, 3, *[-1] * 8]])
    together, _ = sat.fill_sequence(model, rows, strategy=strategy)
    again, _ = sat.fill_sequence(model, rows, strategy=strategy)
    alone, _ = sat.fill_sequence(model, rows[0], strategy=strategy)
    assert torch.equal(together, again)
    assert torch.equal(together[0], alone[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.SamplingStrategy(**options)


def test_nan_logits_are_an_error_and_not_a_token() -> None:
    strategy = sat.GreedyStrategy()
    strategy.reset(1, torch.device("cpu"))
    with pytest.raises(sat.HookCallError, match="NaN"):
        strategy.forward(torch.tensor([[0.0, float("nan")]]), torch.zeros(1, 3, dtype=torch.long), sat.KVCache(1))


def test_without_a_seed_draws_follow_torch_and_with_one_they_leave_torch_alone() -> None:
    model, row = tiny_model("llama"), torch.tensor([5, 6, *[-1] * 8])

    def fill(**options: int) -> torch.Tensor:
        return sat.fill_sequence(model, row, 3, strategy=sat.SamplingStrategy(temperature=3.0, **options))[0]

    torch.manual_seed(1)
    first, second = fill(), fill()
    torch.manual_seed(1)
    assert torch.equal(fill(), first)
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    assert not torch.equal(fill(), first)
    state = torch.get_rng_state()
    fill(seed=4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("strategy", [sat.GreedyStrategy, sat.IterativeEntropyFilterStrategy(), "greedy"])
def test_what_is_no_strategy_is_named(strategy: object) -> None:
    with pytest.raises(sat.HookCallError, match=r"Strategy is not|str is not"):
        sat.fill_sequence(tiny_model("gpt2"), torch.tensor([5, -1]), strategy=strategy)


def test_processors_are_added_to_a_copy_and_take_part_inside_a_wrapper() -> None:
    model, row = tiny_model("gpt2"), torch.tensor([5, 6, *[-1] * 6])

    def only_three(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(torch.arange(logits.shape[1]) != 3, float("-inf"))

    for plain in (sat.GreedyStrategy(), sat.BeamSearchStrategy(2), sat.PromptLookupStrategy()):
        before, _ = sat.fill_sequence(model, row, strategy=plain)
        tokens, _ = sat.fill_sequence(model, row, strategy=plain.with_processors([only_three]))
        assert tokens[0, 2:].tolist() == [3] * 6
        assert torch.equal(sat.fill_sequence(model, row, strategy=plain)[0], before)
