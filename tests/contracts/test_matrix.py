"""A slice of the matrix that `make contracts` runs whole: every mixin alone on four families, and what is quick."""

import inspect
import json
from collections.abc import Iterable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.core.hooks import Hook
from swissarmy.core.mixin import BaseMixin
from swissarmy.testing import CHECKS, Addition, check_mixin
from swissarmy.testing.contract import CAUSAL, cached_logits, inputs_of, logits_of, mixed
from swissarmy.testing.sharding import SHARDED_CHECKS
from tests.contracts.matrix import Case, all_cases, all_rows, run_here, run_sharded
from tests.contracts.page import MEANING, PAGE, RESULTS, page
from tests.contracts.rows import FAMILIES, NOT_ON_TOP, ROWS, singles

QUICK = [check for check in CHECKS if check != "compiles whole"]
SLICE = ("bert", "gpt2", "t5", "vit")
"""An encoder, a decoder, both, and one of pictures."""


COMPILED = "gpt2"
"""Compiling takes long: the other families wait for `make contracts`."""


def compiled(families: Iterable[str]) -> list[Any]:
    """Families as parameters."""
    return [pytest.param(each, marks=() if each == COMPILED else pytest.mark.contracts) for each in families]


@pytest.mark.parametrize(("family", "row"), [(family, row) for family, row in singles() if family in SLICE])
def test_a_mixin_keeps_the_contract_on_a_family(family: str, row: str) -> None:
    problems = {result.check: result.problem for result in run_here(Case(family, (row,)), QUICK)}
    assert problems
    assert not any(problems.values()), problems


@pytest.mark.parametrize("family", compiled(FAMILIES))
def test_all_mixins_at_once_compile_whole(family: str) -> None:
    rows = all_rows(family)
    assert len(rows) > 20
    CHECKS["compiles whole"](family, [ROWS[row] for row in rows])


@pytest.mark.parametrize("check", SHARDED_CHECKS)
def test_mixins_keep_the_contract_on_two_processes(check: str) -> None:
    cases = [case for case in all_cases() if len(case.rows) == 1 and case.family == "gpt2"]
    results = run_sharded(check, cases)
    assert len(results) > 20
    assert not [result for result in results if result.problem is not None]


def test_every_exported_mixin_has_a_row_or_a_reason() -> None:
    exported = {name for name in sat.__all__ if _is_mixin(getattr(sat, name))}
    in_rows = {each.kind.__name__ for row in ROWS.values() for each in (row, *row.needs.values())}
    missing = {name for name in exported if getattr(sat, name).__name__ not in in_rows} - set(NOT_ON_TOP)
    assert not missing
    assert not in_rows & set(NOT_ON_TOP)


def _is_mixin(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseMixin) and value is not BaseMixin


def test_the_page_is_what_the_last_run_of_the_whole_saw() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(results)
    assert not results["failures"]
    assert set(results["passed"]) == set(ROWS), "rows came or went since: run `make contracts`"
    assert set(MEANING) == {*CHECKS, *SHARDED_CHECKS}


class Forgetful(sat.BaseMixin):
    """Breaks cached generation: it looks at how many tokens there are in this call."""

    @sat.non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        result: Tensor = old_impl(hidden_states, **kw_args) * hidden_states.shape[1]
        return result


def test_a_mixin_of_ones_own_that_breaks_a_promise_is_told_which() -> None:
    with pytest.raises(AssertionError) as caught:
        check_mixin(Addition(Forgetful), families=["gpt2"])
    assert caught.value.__notes__ == ["in check 'cached = uncached' of Forgetful on gpt2"]


def test_a_check_of_another_name_is_refused() -> None:
    with pytest.raises(sat.SwissArmyError, match="no check 'beams'"):
        check_mixin(Addition(Forgetful), leave_out=["beams"])


@pytest.mark.parametrize("family", compiled(CAUSAL))
def test_full_graph_compilation_of_cached_decoding_gives_the_same(family: str) -> None:
    torch.compiler.reset()
    model, _ = mixed(family, [ROWS["prefix-tuning"]])
    expected = logits_of(model)
    decoder = model.for_decoding(input_ids=inputs_of(model)["input_ids"])[0] if model.parts else model
    decoder.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(cached_logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        (family, *order)
        for family in CAUSAL
        for others in (
            ("prefix-tuning", "ALiBi"),
            ("prefix-tuning", "relative position bias"),
            ("prefix-tuning", "sliding window"),
            ("QK-norm", "attention soft-cap"),
            ("LoRA", "prefix-tuning"),
        )
        for order in permutations(others)
    ],
)
def test_two_mixins_in_both_orders_give_the_same_cached_and_uncached(family: str, first: str, second: str) -> None:
    model, _ = mixed(family, [ROWS[first], ROWS[second]])
    other, _ = mixed(family, [ROWS[second], ROWS[first]])
    torch.testing.assert_close(logits_of(other), logits_of(model), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cached_logits(other), logits_of(model), rtol=1e-4, atol=1e-4)
