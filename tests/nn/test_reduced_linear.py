"""Projections in fewer bits: near their originals, exact about what they hold, and differentiable in their input."""

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swissarmy.core.errors import ConfigError
from swissarmy.nn import reduced_linear
from swissarmy.nn.reduced_linear import PACKED, Int8Linear, Kind, ReducedLinear, WidenedLinear, reduce_linear

KINDS: tuple[Kind, ...] = get_args(Kind)
ERROR = {"fp16": 4e-4, "int8": 1.2e-2, "int4": 0.1}
"""Of a product with a random weight, relative."""


def relative(have: Tensor, want: Tensor) -> float:
    return ((have - want).norm() / want.norm()).item()


def operands(inputs: int, outputs: int, *rows: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*rows, inputs), torch.randn(outputs, inputs) * inputs**-0.5, torch.randn(outputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(64, 48), (40, 50)], ids=str)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 5), (33,)], ids=str)
def test_products_are_near(kind: Kind, sizes: tuple[int, int], rows: tuple[int, ...]) -> None:
    x, weight, bias = operands(*sizes, *rows)
    reduced = reduce_linear(weight, bias, kind)
    assert isinstance(reduced, PACKED[kind])
    assert relative(reduced(x) - bias, F.linear(x, weight)) < ERROR[kind]
    assert relative(reduce_linear(weight, None, kind)(x), F.linear(x, weight)) < ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_widened_is_what_is_multiplied(kind: Kind) -> None:
    x, weight, _ = operands(64, 48, 7)
    reduced = reduce_linear(weight, None, kind)
    widened = reduced.widened()
    assert widened.shape == weight.shape
    assert relative(widened, weight) < ERROR[kind]
    rounding_of_input = {"fp16": 1e-6, "int8": 4e-3, "int4": 4e-3}[kind]
    assert relative(reduced(x), F.linear(x, widened)) < rounding_of_input


@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_weights_are_rounded_alike(kind: Kind) -> None:
    """What serves GPUs holds the same numbers; int4's scales are bfloat16 in the packed form only."""
    x, weight, bias = operands(40, 50, 3)
    unpacked, packed = WidenedLinear(weight, bias, kind), reduce_linear(weight, bias, kind)
    assert relative(unpacked.widened(), packed.widened()) < {"fp16": 1e-7, "int8": 1e-6, "int4": 2e-2}[kind]
    assert relative(unpacked(x), F.linear(x, unpacked.widened(), bias)) < 1e-6


@pytest.mark.parametrize("make", [*PACKED.values(), lambda w, b: WidenedLinear(w, b, "int4")])
def test_gradients_reach_the_input_only(make: type[ReducedLinear]) -> None:
    x, weight, bias = operands(64, 48, 5)
    reduced = make(weight, bias)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(reduced(x).square().sum() / 2, x)
    torch.testing.assert_close(grad, reduced(x).detach() @ reduced.widened())
    assert not list(reduced.parameters())
    direction = torch.randn_like(x)
    (grad,) = torch.autograd.grad(reduced(x).square().sum() / 2, x, create_graph=True)
    (second,) = torch.autograd.grad((grad * direction).sum(), x)
    weight = reduced.widened()
    torch.testing.assert_close(second, direction @ weight.t() @ weight)


def test_gradients_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight, bias = operands(64, 48, 5)
    reduced, grad = Int8Linear(weight, bias), torch.randn(2, 3, 48)
    whole = reduced.multiply_back(grad)
    monkeypatch.setattr(reduced_linear, "WIDENED_AT_ONCE", 7 * 64)  # outputs by seven: the last piece is shorter
    torch.testing.assert_close(reduced.multiply_back(grad), whole)
    torch.testing.assert_close(whole, grad @ reduced.widened())


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_one_graph(kind: Kind) -> None:
    x, weight, bias = operands(64, 48, 5)
    reduced = reduce_linear(weight, bias, kind)
    compiled = torch.compile(lambda x: reduced(x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), reduced(x) * 2)
    x.requires_grad_()
    gradients = [
        torch.autograd.grad(function(x).square().sum(), x)[0] for function in (compiled, lambda x: reduced(x) * 2)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_multiplies_for_itself(kind: Kind) -> None:
    x, weight, bias = operands(64, 48, 5)
    original = reduce_linear(weight, bias, kind)
    copied, expected = copy.deepcopy(original), original(x)
    del original
    torch.testing.assert_close(copied(x.requires_grad_()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_and_other_precisions(kind: Kind) -> None:
    x, weight, bias = operands(64, 48, 5)
    weight[3] = 0
    reduced = reduce_linear(weight.bfloat16(), bias.bfloat16(), kind)
    product = reduced(x.bfloat16())
    assert product.dtype is torch.bfloat16
    torch.testing.assert_close(product[:, 3], bias[3].bfloat16().expand(5))


def test_float16_has_its_limits() -> None:
    _, weight, bias = operands(64, 48, 5)
    weight[0, 0] = 1e6
    with pytest.raises(ConfigError, match="beyond the range of float16"):
        reduce_linear(weight, bias, "fp16")
