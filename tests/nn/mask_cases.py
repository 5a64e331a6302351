"""Random masks, each with its definition as a plain Python function."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from swissarmy.nn.masks import Causal, Dense, Documents, Full, Mask, Padding, PrefixLM, SlidingWindow

Rule = Callable[[int, int, int, int], bool]
"""Whether in row b and head h query q, counted on the scale of the keys, sees key k."""


@dataclass(frozen=True)
class MaskCase:
    """A mask, its definition, and the sizes that it is for."""

    mask: Mask
    rule: Rule
    batch: int
    heads: int
    q_len: int
    k_len: int

    def expected(self) -> Tensor:
        """The definition, asked for every pair: `[batch, heads, q_len, k_len]`."""
        first = self.k_len - self.q_len
        return torch.tensor(
            [
                [
                    [[self.rule(b, h, first + i, k) for k in range(self.k_len)] for i in range(self.q_len)]
                    for h in range(self.heads)
                ]
                for b in range(self.batch)
            ]
        )


@st.composite
def mask_cases(draw: st.DrawFn, *, depth: int = 2) -> MaskCase:
    """A mask of any type, or several combined, with as many queries as keys or fewer."""
    batch, heads, q_len = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 6))
    k_len = q_len + draw(st.integers(0, 5))
    mask, rule = draw(masks(batch, heads, q_len, k_len, depth))
    return MaskCase(mask, rule, batch, heads, q_len, k_len)


@st.composite
def masks(draw: st.DrawFn, batch: int, heads: int, q_len: int, k_len: int, depth: int) -> tuple[Mask, Rule]:
    """A mask for these sizes, and its definition."""
    kind = draw(st.sampled_from(["one", "both", "prefix"] if depth else ["one"]))
    if kind == "both":
        left, left_rule = draw(masks(batch, heads, q_len, k_len, depth - 1))
        right, right_rule = draw(masks(batch, heads, q_len, k_len, depth - 1))
        return left & right, lambda b, h, q, k: left_rule(b, h, q, k) and right_rule(b, h, q, k)
    if kind == "prefix":
        n = draw(st.integers(0, k_len - q_len))
        inner, inner_rule = draw(masks(batch, heads, q_len, k_len - n, depth - 1))
        return inner.with_prefix(n), lambda b, h, q, k: k < n or inner_rule(b, h, q - n, k - n)
    return draw(one_of_each(batch, heads, q_len, k_len))


@st.composite
def one_of_each(draw: st.DrawFn, batch: int, heads: int, q_len: int, k_len: int) -> tuple[Mask, Rule]:
    """A mask of one type."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows = draw(st.sampled_from([1, batch]))

    def bits(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.6

    match draw(st.sampled_from([Full, Causal, SlidingWindow, PrefixLM, Padding, Documents, Dense, "Dense [q, k]"])):
        case type() as kind if kind is Full:
            return Full(), lambda b, h, q, k: True
        case type() as kind if kind is Causal:
            return Causal(), lambda b, h, q, k: k <= q
        case type() as kind if kind is SlidingWindow:
            window = draw(st.integers(1, k_len + 2))
            return SlidingWindow(window), lambda b, h, q, k: q - window < k <= q
        case type() as kind if kind is PrefixLM:
            lengths = torch.randint(0, k_len + 1, (rows,), generator=generator)
            return PrefixLM(lengths), lambda b, h, q, k: k <= q or k < int(lengths[b % rows])
        case type() as kind if kind is Padding:
            keep = bits(rows, k_len)
            given = draw(st.sampled_from([keep, keep.long(), keep.float()]))
            return Padding(given), lambda b, h, q, k: bool(keep[b % rows, k])
        case type() as kind if kind is Documents:
            ids = torch.randint(0, 3, (rows, k_len), generator=generator)
            return Documents(ids), lambda b, h, q, k: int(ids[b % rows, q]) == int(ids[b % rows, k])
        case type() as kind if kind is Dense:
            own_heads = draw(st.sampled_from([1, heads]))
            tensor, first = bits(rows, own_heads, q_len, k_len), k_len - q_len
            given = draw(st.sampled_from([tensor, tensor.long()]))
            return Dense(given), lambda b, h, q, k: bool(tensor[b % rows, h % own_heads, q - first, k])
        case _:
            plain, first = bits(q_len, k_len), k_len - q_len
            return Dense(plain), lambda b, h, q, k: bool(plain[q - first, k])
