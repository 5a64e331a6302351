"""A model over several processes computes what it computes alone: losses, logits, gradients, in float64, over steps.

The slice that `make test` runs; `make distributed` runs every plan.
"""

import pytest

from swissarmy.testing import run_distributed
from tests.distributed.cases import FAMILIES, Case, Plan, compare

FAMILY_CASES = [Case(family, mixins) for family in FAMILIES for mixins in ((), ("prefix", "lora"))]
USER_CASES = [
    Case("gpt2", ("talking-heads", "gate")),
    Case("llama", ("talking-heads", "experts", "router")),
    Case("t5", ("gate",)),
    Case("bert", ("prefix", "lora"), frozen=True),
    *(Case(family, targets=True) for family in ("gpt2", "bert", "t5", "llama")),
]
"""Mixins that a user wrote, experts, a frozen model under mixins that train, and losses without logits."""
QUICK = [Plan({"shard": 2}), Plan({"tensor_parallel": 2}), Plan({"context_parallel": 2})]
TWO = [
    Plan({"data": 2}),
    Plan({"shard": 2}),
    Plan({"shard": 2}, checkpointing="full", accumulation=2),
    Plan({"tensor_parallel": 2, "sequence_parallel": True}, checkpointing="selective"),
    Plan({"tensor_parallel": 2, "shard_vocabulary": False}, accumulation=2),
    Plan({"context_parallel": 2}, checkpointing="full", accumulation=2),
]
FOUR = [
    Plan({"shard": 2, "tensor_parallel": 2}),
    Plan({"data": 2, "shard": 2}),
    Plan({"tensor_parallel": 2, "sequence_parallel": True}, checkpointing="full", accumulation=2),
    Plan({"tensor_parallel": 4, "sequence_parallel": True}),
    Plan({"context_parallel": 2, "shard": 2}, checkpointing="selective"),
    Plan({"context_parallel": 2, "data": 2}, accumulation=2),
    Plan({"context_parallel": 2, "tensor_parallel": 2}),
    Plan({"context_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True}, checkpointing="full"),
]


def problems(processes: int, plans: list[Plan], cases: list[Case]) -> list[str]:
    return [line for lines in run_distributed(compare, processes, plans, cases, timeout=1000.0) for line in lines]


def test_two_processes_compute_what_one_computes() -> None:
    assert problems(2, QUICK, FAMILY_CASES) == []


def test_mixins_of_a_user_and_losses_without_logits_compute_the_same_on_two_processes() -> None:
    assert problems(2, [Plan({"tensor_parallel": 2})], USER_CASES) == []


@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("plan", TWO, ids=str)
def test_two_processes_compute_what_one_computes_by_every_plan(plan: Plan) -> None:
    assert problems(2, [plan], [*FAMILY_CASES, *USER_CASES]) == []


@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_compiled_layers_compute_the_same() -> None:
    plans = [Plan({"shard": 2}, compiled=True), Plan({"tensor_parallel": 2}, compiled=True)]
    assert problems(2, plans, [Case("gpt2", ("prefix", "lora"))]) == []


@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("plan", FOUR, ids=str)
def test_four_processes_compute_what_one_computes(plan: Plan) -> None:
    cases = [
        case
        for case in (*FAMILY_CASES, *USER_CASES)
        if plan.options.get("tensor_parallel") != 4 or case.family != "llama"
    ]
    assert problems(4, [plan], cases) == []
