"""Masks against their definitions in plain Python, alone and combined."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import HookCallError
from swissarmy.nn.masks import (
    Both,
    Causal,
    Dense,
    Documents,
    Full,
    Mask,
    Padding,
    PrefixLM,
    Rows,
    SlidingWindow,
    as_mask,
)
from tests.nn.mask_cases import MaskCase, mask_cases, masks

ONE_OF_EACH = [
    Full(),
    Causal(),
    SlidingWindow(2),
    PrefixLM(torch.tensor([1, 3])),
    Padding(torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])),
    Documents(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])),
    Dense(torch.ones(2, 1, 4, 4).tril()),
    Causal() & Padding(torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])),
]


@settings(max_examples=300, deadline=None)
@given(mask_cases(depth=3))
def test_a_mask_shows_what_its_definition_says(case: MaskCase) -> None:
    dense = case.mask.dense(case.q_len, case.k_len)
    assert dense.dtype == torch.bool
    assert dense.shape == (case.mask.batch_size, case.mask.num_heads, case.q_len, case.k_len)
    assert torch.equal(dense.expand(case.batch, case.heads, -1, -1), case.expected())


@settings(max_examples=150, deadline=None)
@given(mask_cases(depth=3))
def test_the_rule_over_indices_gives_the_same_as_the_dense_tensor(case: MaskCase) -> None:
    """Flex attention asks the rule with every row and head, whether the mask tells them apart or not."""
    b, h = torch.arange(case.batch).view(-1, 1, 1, 1), torch.arange(case.heads).view(-1, 1, 1)
    q, k = torch.arange(case.k_len - case.q_len, case.k_len).view(-1, 1), torch.arange(case.k_len)
    visible = case.mask.visible(b, h, q, k)
    assert torch.equal(visible.expand(case.batch, case.heads, case.q_len, case.k_len), case.expected())


@settings(max_examples=150, deadline=None)
@given(mask_cases(depth=2), st.data())
def test_and_is_commutative_associative_and_idempotent(case: MaskCase, data: st.DataObject) -> None:
    sizes = (case.batch, case.heads, case.q_len, case.k_len)
    a = case.mask
    b, _ = data.draw(masks(*sizes, 1))
    c, _ = data.draw(masks(*sizes, 1))

    def dense(mask: Mask) -> torch.Tensor:
        return mask.dense(case.q_len, case.k_len).expand(*sizes)

    assert torch.equal(dense(a & b), dense(b & a))
    assert torch.equal(dense((a & b) & c), dense(a & (b & c)))
    assert torch.equal(dense(a & a), dense(a))
    assert torch.equal(dense(a & Full()), dense(a))
    assert (a & Full()) is a
    assert torch.equal(dense((a & b).with_prefix(0)), dense(a & b))


@settings(max_examples=150, deadline=None)
@given(mask_cases(depth=2), st.data())
def test_one_mask_implies_another_only_if_it_shows_nothing_more(case: MaskCase, data: st.DataObject) -> None:
    other, _ = data.draw(masks(case.batch, case.heads, case.q_len, case.k_len, 1))
    for a, b in ((case.mask, other), (other, case.mask)):
        if a.implies(b):
            shown, allowed = (m.dense(case.q_len, case.k_len) for m in (a, b))
            assert not (shown & ~allowed).any()


@settings(max_examples=150, deadline=None)
@given(mask_cases(depth=3), st.data())
def test_rows_are_the_rule_for_some_of_the_queries(case: MaskCase, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, case.q_len - 1))
    count = data.draw(st.integers(1, case.q_len - first))
    rows = Rows(case.mask, total=case.q_len, behind=case.q_len - first - count)
    assert rows.prefix_length == case.mask.prefix_length
    whole = case.mask.dense(case.q_len, case.k_len)
    assert torch.equal(rows.dense(count, case.k_len), whole[:, :, first : first + count])


def test_masks_that_follow_from_each_other_stay_one_type() -> None:
    full, causal, narrow, wide = Full(), Causal(), SlidingWindow(2), SlidingWindow(5)
    assert (full & causal) is causal
    assert (causal & full) is causal
    assert (causal & narrow) is narrow
    assert (narrow & causal) is narrow
    assert (wide & narrow) is narrow
    assert (narrow & wide) is narrow
    assert (narrow & SlidingWindow(2)) is narrow
    assert isinstance(causal & Padding(torch.ones(1, 4)), Both)


@settings(max_examples=100, deadline=None)
@given(mask_cases(depth=2), st.integers(0, 4), st.integers(0, 4))
def test_a_prefix_is_visible_to_all_and_moves_the_rest(case: MaskCase, n: int, m: int) -> None:
    mask = case.mask.with_prefix(n).with_prefix(m)
    dense = mask.dense(case.q_len, case.k_len + n + m).expand(case.batch, case.heads, -1, -1)
    assert mask.prefix_length == case.mask.prefix_length + n + m
    assert dense[..., : n + m].all()
    assert torch.equal(dense[..., n + m :], case.expected())


def test_a_combination_knows_how_many_keys_are_in_front() -> None:
    mask = Causal().with_prefix(3) & Padding(torch.ones(2, 7))
    assert mask.prefix_length == 3


@settings(max_examples=50, deadline=None)
@given(mask_cases(depth=2))
def test_nothing_reads_the_values_of_a_mask(case: MaskCase) -> None:
    """Tensors on the meta device have none."""
    meta = torch.device("meta")
    moved = case.mask.to(meta)
    assert moved.device in (None, meta)
    for mask in (moved, case.mask):
        dense = mask.dense(case.q_len, case.k_len, meta)
        assert dense.device == meta
        assert dense.shape == (case.mask.batch_size, case.mask.num_heads, case.q_len, case.k_len)


def test_a_mask_lives_where_its_tensors_live() -> None:
    meta = torch.device("meta")
    assert Causal().device is None
    assert (Causal().with_prefix(2) & Full()).device is None
    assert (Causal() & Padding(torch.ones(1, 4, device=meta))).with_prefix(1).device == meta
    assert Causal().dense(3, 3, meta).device == meta
    assert Padding(torch.ones(1, 4, device=meta)).dense(4, 4).device == meta


def test_masks_compile_without_a_graph_break() -> None:
    def all_of_them() -> list[torch.Tensor]:
        return [mask.with_prefix(2).dense(4, 6, torch.device("cpu")) for mask in ONE_OF_EACH]

    compiled = torch.compile(all_of_them, backend="eager", fullgraph=True)
    for ours, expected in zip(compiled(), all_of_them(), strict=True):
        assert torch.equal(ours, expected)


def test_masks_are_immutable() -> None:
    with pytest.raises(AttributeError):
        SlidingWindow(2).window = 3  # type: ignore[misc]


@pytest.mark.parametrize("full", [None, Full(), torch.ones(3, 3), torch.ones(2, 1, 3, 3)])
@pytest.mark.parametrize("causal", [-1, Causal(), torch.ones(3, 3).tril(), torch.ones(2, 1, 3, 3).tril().bool()])
def test_callers_may_give_a_mask_in_several_ways(full: Any, causal: Any) -> None:
    assert as_mask(full).dense(3, 3).all()
    assert torch.equal(as_mask(causal).dense(3, 3)[0, 0], torch.ones(3, 3).tril().bool())


@pytest.mark.parametrize("value", [0, 1, True, "causal", 1.0])
def test_anything_else_is_no_mask(value: object) -> None:
    with pytest.raises(HookCallError, match="is no mask: give None"):
        as_mask(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Padding(torch.ones(2, 4)), "padding_mask has 4 columns and there are 5 keys"),
        (Documents(torch.ones(2, 4)), "Documents has 4 ids a row and there are 5 keys"),
        (Dense(torch.ones(5, 4)), r"\[1, 1, 5, 4\] for 5 queries and 5 keys"),
    ],
)
def test_a_mask_of_another_size_is_refused_wherever_it_stands(mask: Mask, message: str) -> None:
    for refused in (mask, Causal() & mask, mask & Padding(torch.ones(2, 5))):
        with pytest.raises(HookCallError, match=message):
            refused.dense(5, 5)
        with pytest.raises(HookCallError, match=message):
            refused.with_prefix(2).dense(5, 7)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
def test_a_tensor_of_other_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(HookCallError, match=r"it is \[q, k\] or"):
        Dense(torch.ones(shape))


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_keys_is_refused(window: int) -> None:
    with pytest.raises(HookCallError, match="at least 1"):
        SlidingWindow(window)
