"""`evaluate_perplexity` over ranks: however rows are dealt, the number is that of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swissarmy as sat
from swissarmy.generation.perplexity import evaluate_perplexity
from swissarmy.testing import run_distributed, tiny_model

LENGTHS = (12, 5, 70, 9, 1, 64, 30)
"""One longer than the model's 64 positions, and one without a token to score."""


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 61, (length,), generator=generator) for length in LENGTHS]


def model() -> Any:
    return tiny_model("gpt2").double()


def error_of(tokens: Any, *, process_group: Any = None, **options: Any) -> str:
    with pytest.raises(sat.HookCallError) as caught:
        evaluate_perplexity(model(), tokens, stride=20, process_group=process_group or dist.group.WORLD, **options)
    return str(caught.value)


def on_a_rank(rank: int, world_size: int) -> dict[str, Any]:
    """Every way to deal rows, and every way to fail, one after the other: after each, the ranks are still in step."""
    world, everything = dist.group.WORLD, rows()

    def measured(own: Any, **options: Any) -> Any:
        return evaluate_perplexity(model(), own, stride=20, process_group=world, **options)

    of_the_first = dist.new_group([0])
    nothing = torch.zeros(0, 9, dtype=torch.long)
    broken = {"tokens": everything, "reduction": "sum"} if rank == world_size - 1 else {"tokens": everything}
    return {
        "in turn": measured(everything[rank::world_size]),
        "all to the last": measured(everything if rank == world_size - 1 else []),
        "all to the first": measured(everything if rank == 0 else nothing),
        "masked on the others": measured(everything, loss_mask=None if rank == 0 else [row * 0 for row in everything]),
        "each token": measured(everything[rank::world_size], reduction="none"),
        "each token of none": measured(everything if rank == 0 else [], reduction="none"),
        "an error": error_of(**broken),
        "nothing anywhere": error_of(tokens=[]),
        "alone": evaluate_perplexity(model(), everything[: rank + 1], stride=20),
        "a group of the first": (
            evaluate_perplexity(model(), everything, stride=20, process_group=of_the_first)
            if rank == 0
            else error_of(everything, process_group=of_the_first)
        ),
        "in step": measured(everything[rank::world_size]),
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_number_of_ranks_and_the_way_rows_are_dealt_change_nothing(world_size: int) -> None:
    want = evaluate_perplexity(model(), rows(), stride=20)
    assert want.tokens == sum(LENGTHS) - len(LENGTHS)
    each = evaluate_perplexity(model(), rows(), stride=20, reduction="none")
    found = run_distributed(on_a_rank, world_size)
    for rank, results in enumerate(found):
        for way in ("in turn", "all to the last", "all to the first", "masked on the others", "in step"):
            assert results[way] == pytest.approx(want, rel=1e-12, abs=0), way
            assert results[way] == found[0][way]
        for row, own in zip(range(rank, len(LENGTHS), world_size), results["each token"], strict=True):
            torch.testing.assert_close(own[: LENGTHS[row]], each[row, : LENGTHS[row]], atol=1e-12, rtol=1e-12)
        assert results["each token of none"].shape == ((7, 70) if rank == 0 else (0, 0))
        assert results["alone"] == evaluate_perplexity(model(), rows()[: rank + 1], stride=20)
        assert "no token to score" in results["nothing anywhere"]
        in_a_group = results["a group of the first"]
        assert in_a_group == want if rank == 0 else "not one of process_group's ranks" in in_a_group
        is_broken = rank == world_size - 1
        message = "reduction='sum'" if is_broken else f"rank {world_size - 1} of process_group failed"
        assert message in results["an error"]
