"""Every path of the attention kernel against a softmax written out in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swissarmy.core.errors import HookCallError
from swissarmy.nn.attention import attention, flex
from swissarmy.nn.masks import Causal, Dense, Documents, Full, Mask, Padding, SlidingWindow
from tests.nn.mask_cases import MaskCase, mask_cases

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
NO_DROPOUT = nn.Dropout(0.0)


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    dropout_fn: Callable[[Tensor], Tensor],
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition: query head i uses key head i // groups; a query that sees nothing gets zero."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    own = [head // groups for head in range(q.shape[1])]
    scores = torch.einsum("bhsd,bhtd->bhst", q, k[:, own]) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    visible = visible.expand(scores.shape)
    largest = scores.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    shares = torch.where(visible, (scores - largest).clamp(max=0).exp(), 0.0)
    total = shares.sum(-1, keepdim=True)
    return torch.einsum("bhst,bhtd->bhsd", dropout_fn(shares / torch.where(total == 0, 1.0, total)), v[:, own])


@st.composite
def calls(draw: st.DrawFn, **fixed: Any) -> tuple[MaskCase, dict[str, Tensor], dict[str, Any]]:
    """A mask, tensors for its sizes, and options of the kernel."""
    case = draw(mask_cases())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype, d = draw(st.sampled_from([torch.float64, torch.float32])), draw(st.sampled_from([1, 3, 8]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4) if case.heads % n == 0]))
    bias_shape = draw(
        st.sampled_from(
            [
                None,
                (1, case.heads, case.q_len, case.k_len),
                (case.batch, 1, case.q_len, case.k_len),
                (1, case.heads, 1, case.k_len),
            ]
        )
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    tensors = {
        "q": normal(case.batch, case.heads, case.q_len, d),
        "k": normal(case.batch, kv_heads, case.k_len, d),
        "v": normal(case.batch, kv_heads, case.k_len, d),
    }
    if bias_shape is not None:
        tensors["bias"] = normal(*bias_shape)
    options = {
        "scale": draw(st.sampled_from([None, 0.3, 1.0])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    return case, tensors, options | fixed


DROPOUTS: list[Callable[[Tensor], Tensor]] = [
    NO_DROPOUT,
    nn.Dropout(0.5).eval(),
    nn.Identity(),
    lambda probabilities: probabilities * torch.linspace(0, 2, probabilities.shape[-1]).to(probabilities.dtype),
]


@settings(max_examples=250, deadline=None)
@given(calls(), st.sampled_from(DROPOUTS))
def test_results_and_gradients_equal_the_definition(
    call: tuple[MaskCase, dict[str, Tensor], dict[str, Any]], dropout_fn: Callable[[Tensor], Tensor]
) -> None:
    case, tensors, options = call
    q, k, v, bias = tensors["q"], tensors["k"], tensors["v"], tensors.get("bias")
    result = attention(q, k, v, case.mask, dropout_fn, bias=bias, **options)
    expected = written_out(q, k, v, case.expected(), dropout_fn, bias=bias, **options)
    assert result.dtype == q.dtype
    assert_close(result, expected, q.dtype)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    ours = torch.autograd.grad((result * weights).sum(), list(tensors.values()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(tensors.values()))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, q.dtype)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@settings(max_examples=25, deadline=None)
@given(calls(), st.sampled_from([NO_DROPOUT, nn.Dropout(0.5).eval()]))
def test_flex_equals_the_definition(
    call: tuple[MaskCase, dict[str, Tensor], dict[str, Any]], dropout_fn: nn.Dropout
) -> None:
    """Its forward pass: flex attention has no backward pass on CPU."""
    case, tensors, options = call
    q, k, v = (tensors[name].detach() for name in ("q", "k", "v"))
    result = flex(q, k, v, case.mask, dropout_fn, scale=options["scale"])
    assert_close(result, written_out(q, k, v, case.expected(), dropout_fn, scale=options["scale"]), q.dtype)


@pytest.mark.parametrize("bias_shape", [None, (1, 4, 3, 5), (2, 1, 1, 5)])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dropout_fn", [NO_DROPOUT, nn.Identity()])
def test_a_query_that_sees_no_key_gets_zero_and_never_nan(
    bias_shape: tuple[int, ...] | None,
    softcap: float | None,
    dtype: torch.dtype,
    kv_heads: int,
    dropout_fn: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    visible = torch.rand(2, 1, 3, 5) < 0.6
    visible[0, :, 1] = False
    visible[1] = False
    q = torch.randn(2, 4, 3, 8, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 5, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    bias = None if bias_shape is None else torch.randn(bias_shape, requires_grad=True)
    result = attention(q, k, v, Dense(visible), dropout_fn, bias=bias, softcap=softcap)
    assert result.dtype == dtype
    assert (result[0, :, 1] == 0).all()
    assert (result[1] == 0).all()
    result.float().square().sum().backward()
    for tensor in (q, k, v) if bias is None else (q, k, v, bias):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert (q.grad[1] == 0).all()  # type: ignore[index]


def test_queries_before_the_first_key_see_none_of_them() -> None:
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
    result = attention(q, k, k, Causal(), NO_DROPOUT)
    assert (result[:, :, :2] == 0).all()
    assert_close(result[:, :, 2:], attention(q[:, :, 2:], k, k, Causal(), NO_DROPOUT), torch.float32)


SQUARE, CACHED, STEP = (4, 4), (2, 6), (1, 6)


@pytest.mark.parametrize(
    ("mask", "lengths", "is_causal", "dense"),
    [
        (Full(), SQUARE, False, False),
        (Full(), CACHED, False, False),
        (Full().with_prefix(2), CACHED, False, False),
        (Causal(), SQUARE, True, False),
        (Causal(), CACHED, False, True),
        (Causal(), STEP, False, False),
        (Causal().with_prefix(2), STEP, False, False),
        (Causal().with_prefix(2), CACHED, False, True),
        (SlidingWindow(4), SQUARE, True, False),
        (SlidingWindow(3), SQUARE, False, True),
        (SlidingWindow(6), STEP, False, False),
        (SlidingWindow(4).with_prefix(2), STEP, False, False),
        (SlidingWindow(3).with_prefix(2), STEP, False, True),
        (Causal() & Padding(torch.ones(1, 4)), SQUARE, False, True),
        (Dense(torch.ones(4, 4)), SQUARE, False, True),
    ],
)
def test_the_type_of_mask_decides_on_the_path(
    mask: Mask, lengths: tuple[int, int], is_causal: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    kernel = F.scaled_dot_product_attention

    def record(*arguments: Any, **options: Any) -> Tensor:
        seen.update(options)
        return kernel(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    q_len, k_len = lengths
    q, k = torch.randn(2, 2, q_len, 4), torch.randn(2, 2, k_len, 4)
    result = attention(q, k, k, mask, NO_DROPOUT)
    assert seen.get("is_causal", False) == is_causal
    assert (seen.get("attn_mask") is not None) == dense
    assert_close(result, written_out(q, k, k, mask.dense(q_len, k_len), NO_DROPOUT), torch.float32)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}])
def test_dropout_drops_probabilities_in_training(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 400, 8) for _ in range(2))
    v = torch.ones(1, 2, 400, 8)
    kept = attention(q, k, v, Causal(), nn.Dropout(0.5), **options)
    assert kept.std() > 0.01
    assert abs(kept.mean().item() - 1) < 0.02
    assert torch.allclose(attention(q, k, v, Causal(), nn.Dropout(0.5).eval(), **options), torch.ones(1))


def test_flex_drops_probabilities_in_training() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 400, 8)
    kept = flex(q, q, torch.ones_like(q), SlidingWindow(200), nn.Dropout(0.5), scale=None)
    assert kept.std() > 0.01
    assert abs(kept.mean().item() - 1) < 0.02


def test_flex_refuses_a_mask_of_another_size() -> None:
    q = torch.randn(2, 2, 5, 8)
    for mask in (Padding(torch.ones(2, 4)), Causal() & Documents(torch.ones(2, 6))):
        with pytest.raises(HookCallError, match="there are 5 keys"):
            flex(q, q, q, mask, NO_DROPOUT, scale=None)


def assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    difference = (ours.double() - theirs.double()).abs().max().item()
    assert difference <= TOLERANCE[dtype] * max(1.0, theirs.abs().max().item()), difference
