"""Normalisations against their definitions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swissarmy.nn.norms import Norm, RMSNorm, make_norm

KINDS: list[Norm] = ["layer", "rms", "rms_one_plus", "rms_t5"]
SEEDS = st.integers(0, 10**6)


def filled(kind: Norm, size: int, eps: float, seed: int) -> nn.Module:
    norm = make_norm(kind, size, eps)
    generator = torch.Generator().manual_seed(seed)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    return norm


def definition(norm: Any, kind: Norm, x: Tensor, eps: float) -> Tensor:
    wide, weight = x.double(), norm.weight.double()
    if kind == "layer":
        mean, variance = wide.mean(-1, keepdim=True), wide.var(-1, correction=0, keepdim=True)
        return (wide - mean) / (variance + eps).sqrt() * weight + norm.bias.double()
    scaled = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * (1 + weight if kind == "rms_one_plus" else weight)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.integers(8, 20), st.sampled_from([1e-12, 1e-5, 1e-1]), SEEDS)
def test_results_and_gradients_equal_the_definition(kind: Norm, size: int, eps: float, seed: int) -> None:
    norm = filled(kind, size, eps, seed)
    x = torch.randn(3, 4, size, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    ours, theirs = norm(x), definition(norm, kind, x, eps)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    wanted = [x, *norm.parameters()]
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((theirs * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * (1 + b.abs().max().item()))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(KINDS), st.floats(0.1, 100.0), SEEDS)
def test_the_scale_of_the_input_does_not_matter(kind: Norm, factor: float, seed: int) -> None:
    norm = filled(kind, 16, 1e-12, seed)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(norm(factor * x), norm(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_norm_only_normalises(kind: Norm) -> None:
    x = 5 * torch.randn(100, 32)
    torch.testing.assert_close(make_norm(kind, 32, 1e-6)(x).square().mean(-1), torch.ones(100), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_taken_in_float32(kind: Norm, dtype: torch.dtype) -> None:
    norm = make_norm(kind, 4096, 1e-6).to(dtype)
    x = (300 * torch.randn(2, 4096)).to(dtype)
    result = norm(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), definition(norm, kind, x, 1e-6), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_finite(kind: Norm) -> None:
    norm = make_norm(kind, 8, 1e-6)
    x = torch.zeros(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_kinds_start_from_weights_that_mean_the_same() -> None:
    assert (RMSNorm(4, 1e-6, "rms").weight == 1).all()
    assert (RMSNorm(4, 1e-6, "rms_one_plus").weight == 0).all()
    assert repr(RMSNorm(4, 1e-6, "rms_t5")) == "RMSNorm(4, eps=1e-06, kind='rms_t5')"
