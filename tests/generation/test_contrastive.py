"""Contrastive search equals the paper's algorithm, written without a cache and one row at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.testing import tiny_model
from tests.generation.helpers import adapted

FAMILIES = ["gpt2", "llama", "gemma3_text", "swissarmy", "t5"]
SOURCE = torch.tensor([[5, 6, 7], [9, 3, 4]])


@torch.no_grad()
def read(model: Model, ids: list[int], source: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities of the next token `[vocab]`, and what the head is given of each position `[n, h]`."""
    seen: list[Tensor] = []
    decoder = model if source is None else model.part("decoder")  # type: ignore[attr-defined]
    norm = decoder.transformer.final_norm
    with norm.register_forward_hook(lambda module, arguments, result: seen.append(result)):
        row = torch.tensor([ids])
        logits = model(row)[0] if source is None else model(source, decoder_input_ids=row)[0]
    return logits[0, -1].softmax(dim=-1), seen[-1][0]


def by_hand(
    model: Model, row: list[int], alpha: float, k: int, source: Tensor | None = None, ends: tuple[int, ...] = ()
) -> list[int]:
    """The paper's algorithm; every prefix is read again for every candidate."""
    tokens, ended = list(row), False
    for place, token in enumerate(row):
        if token != -1:
            continue
        if ended:
            tokens[place] = ends[0]
            continue
        probabilities, context = read(model, tokens[:place], source)
        scores: dict[int, float] = {}
        for candidate in probabilities.topk(k).indices.tolist():
            _, states = read(model, [*tokens[:place], candidate], source)
            similar = max(float(F.cosine_similarity(states[-1], earlier, dim=0)) for earlier in context)
            scores[candidate] = (1 - alpha) * float(probabilities[candidate]) - alpha * similar
        tokens[place] = max(scores, key=lambda each: scores[each])
        ended = tokens[place] in ends
    return tokens


@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.3, 7), (1.0, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_algorithm_of_the_paper(family: str, alpha: float, k: int) -> None:
    model = tiny_model(family, scale=4.0).double()
    source = {"input_ids": SOURCE[:1]} if model.parts else {}
    row = [5, 6, 7, *[-1] * 12]
    tokens, _ = sat.fill_sequence(model, torch.tensor(row), strategy=sat.ContrastiveStrategy(alpha, k), **source)
    assert tokens.tolist() == [by_hand(model, row, alpha, k, source.get("input_ids"))]
    if alpha == 1.0:  # nothing but the penalty counts
        assert tokens.tolist() != sat.fill_sequence(model, torch.tensor(row), **source)[0].tolist()


@pytest.mark.parametrize("make", [lambda family: tiny_model(family, scale=4.0).double(), adapted], ids=["", "adapted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_any_lengths_with_given_tokens_between_gaps_equal_each_row_alone(
    family: str, make: Callable[[str], Model]
) -> None:
    model = make(family)
    rows = [[5, 6, 7, -1, -1, 4, 8, -1, -1, 3], [9, *[-1] * 7], [4, 5, -1, -1, 8, -1], [3, 4, 5]]
    source = {"input_ids": torch.tensor([[5, 6, 7], [9, 3, 4], [8, 8, 2], [7, 1, 5]])} if model.parts else {}
    strategy = sat.ContrastiveStrategy(0.5, 4)
    tokens, _ = sat.fill_sequence(model, [torch.tensor(row) for row in rows], strategy=strategy, **source)
    for index, row in enumerate(rows):
        one = source["input_ids"][index : index + 1] if source else None
        assert tokens[index, : len(row)].tolist() == by_hand(model, row, 0.5, 4, one)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_an_end_token_ends_a_row_and_all_ended_rows_end_the_run(family: str) -> None:
    model = tiny_model(family, scale=4.0).double()
    rows = [[5, 6, *[-1] * 14], [9, 3, *[-1] * 14]]
    source = {"input_ids": SOURCE} if model.parts else {}
    free, _ = sat.fill_sequence(model, torch.tensor(rows), strategy=sat.ContrastiveStrategy(0.5, 4), **source)
    ends = (int(free[0, 5]), int(free[1, 8]))
    strategy = sat.ContrastiveStrategy(0.5, 4, end_tokens=ends)
    tokens, _ = sat.fill_sequence(model, torch.tensor(rows), strategy=strategy, **source)
    for index, row in enumerate(rows):
        one = SOURCE[index : index + 1] if source else None
        expected = by_hand(model, row, 0.5, 4, one, ends)
        over = next(place for place, token in enumerate(expected) if place > 1 and token in ends)
        assert tokens[index, : over + 1].tolist() == expected[: over + 1]
        assert set(tokens[index, over + 1 :].tolist()) <= {ends[0], -1}
    assert -1 in tokens


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("options", [{"top_k": 1}, {"penalty_alpha": 0.0}])
def test_without_a_choice_or_a_penalty_it_is_greedy_and_its_mems_too(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family).double()
    source = {"input_ids": SOURCE} if model.parts else {}
    rows = torch.tensor([[5, 6, -1, 7, *[-1] * 6], [9, 3, *[-1] * 7, 4]])
    for ends in ([], [7, 11, 30]):
        expected, mems = sat.fill_sequence(model, rows, strategy=sat.GreedyStrategy(ends), **source)
        strategy = sat.ContrastiveStrategy(end_tokens=ends, **options)
        tokens, own = sat.fill_sequence(model, rows, strategy=strategy, **source)
        if not ends:
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(own, mems)
        given = tokens != -1
        assert torch.equal(tokens[given & (expected != -1)], expected[given & (expected != -1)])


def test_mems_are_those_of_the_chosen_tokens() -> None:
    model = tiny_model("llama", scale=4.0).double()
    rows = torch.tensor([[5, 6, *[-1] * 6], [9, 3, *[-1] * 6]])
    tokens, mems = sat.fill_sequence(model, rows, strategy=sat.ContrastiveStrategy(0.6, 5))
    _, expected = sat.fill_sequence(model, tokens[:, :-1])
    torch.testing.assert_close(mems, expected)


def test_processors_take_part_and_a_masked_token_never_wins() -> None:
    model = tiny_model("gpt2", scale=4.0).double()
    allowed = {3, 4}
    suppressed = [token for token in range(61) if token not in allowed]
    strategy = sat.ContrastiveStrategy(1.0, 8, suppressed_tokens=suppressed)
    tokens, _ = sat.fill_sequence(model, torch.tensor([5, 6, *[-1] * 12]), strategy=strategy)
    assert set(tokens[0, 2:].tolist()) <= allowed


def test_a_memory_limit_holds() -> None:
    model = tiny_model("llama", scale=4.0).double()
    row = torch.tensor([5, 6, 7, *[-1] * 9])
    tokens, mems = sat.fill_sequence(model, row, strategy=sat.ContrastiveStrategy(top_k=1), max_memory_length=3)
    expected, same = sat.fill_sequence(model, row, max_memory_length=3)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(mems, same)


def test_mems_of_an_earlier_call_are_refused() -> None:
    model = tiny_model("gpt2")
    tokens, mems = sat.fill_sequence(model, torch.tensor([5, 6, -1, -1]))
    longer = torch.cat((tokens, torch.full((1, 3), -1)), dim=1)
    with pytest.raises(sat.HookCallError, match="leave mems out"):
        sat.fill_sequence(model, longer, mems=mems, strategy=sat.ContrastiveStrategy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_alpha": -0.1}, "penalty_alpha=-0.1"),
        ({"penalty_alpha": 1.1}, "penalty_alpha=1.1"),
        ({"penalty_alpha": float("nan")}, "penalty_alpha=nan"),
        ({"top_k": 0}, "top_k=0"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.ContrastiveStrategy(**options)
