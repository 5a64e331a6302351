"""`linear` is the product it stands for, whichever path it takes, and differentiable like it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from swissarmy.nn import linear as module
from swissarmy.nn.linear import WORTH_CHOOSING, Linear, linear

SIZES = {"small": (48, 64), "large": (512, 640)}


def operands(size: str, *rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    inputs, outputs = SIZES[size]
    made = (torch.randn(*rows, inputs), torch.randn(outputs, inputs) * inputs**-0.5, torch.randn(outputs))
    return tuple(each.to(dtype).requires_grad_() for each in made)  # type: ignore[return-value]


def assert_rounding_apart(ours: Tensor, theirs: Tensor) -> None:
    """Sums of hundreds of float32 products in another order: the error is relative to the largest entry."""
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_sizes_lie_on_both_sides_of_the_choice() -> None:
    assert SIZES["small"][0] * SIZES["small"][1] < WORTH_CHOOSING <= SIZES["large"][0] * SIZES["large"][1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [(1,), (2, 1), (1, 5), (2, 3, 4), (70,), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_product(size: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = operands(size, *rows, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1)], ids=str)
def test_gradients_are_those_of_the_product(frozen: tuple[int, ...]) -> None:
    tensors = operands("large", 2, 3)
    for index in frozen:
        tensors[index].requires_grad_(False)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    have, want = (torch.autograd.grad(product(*tensors).square().sum(), wanted) for product in (linear, F.linear))
    for ours, theirs in zip(have, want, strict=True):
        assert_rounding_apart(ours, theirs)


def test_gradients_of_gradients_are_too() -> None:
    x, weight, _ = operands("large", 3)

    def penalty(product: object) -> Tensor:
        (slope,) = torch.autograd.grad(product(x, weight).square().sum(), x, create_graph=True)  # type: ignore[operator]
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    assert_rounding_apart(penalty(linear), penalty(F.linear))


def test_transposed_weights_are_read_as_they_lie() -> None:
    x, weight, bias = operands("large", 3)
    lying = weight.detach().t().contiguous().t()
    torch.testing.assert_close(linear(x, lying, bias), F.linear(x, weight, bias))


def test_a_wrong_width_is_an_error() -> None:
    x, weight, bias = operands("large", 3)
    with pytest.raises(RuntimeError):
        linear(x[:, :-1], weight, bias)


def test_compiled_it_is_one_graph_and_the_same() -> None:
    network = nn.Sequential(Linear(512, 640), nn.GELU(), Linear(640, 512))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 512)
    torch.testing.assert_close(compiled(x), network(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), network(x))
    (ours,) = torch.autograd.grad(compiled(x).sum(), network[0].weight)
    (theirs,) = torch.autograd.grad(network(x).sum(), network[0].weight)
    torch.testing.assert_close(ours, theirs)


def test_compiled_gradients_are_by_the_same_products() -> None:
    """A compiler traces gradients with tensors of its own types, which the choice must not take for another machine."""
    targets: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    x, weight, bias = operands("large", 70)
    compiled = torch.compile(linear, fullgraph=True, backend=aot_autograd(fw_compiler=note, bw_compiler=note))
    compiled(x, weight, bias).square().sum().backward()
    assert targets.count("swissarmy.linear.default") == (3 if module.MKL_WOULD_SERVE else 0)
    assert ("aten.mm.default" in targets) != module.MKL_WOULD_SERVE


def test_autocast_keeps_its_say() -> None:
    x, weight, bias = operands("large", 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype is torch.bfloat16


def test_subclasses_of_tensors_go_their_own_way() -> None:
    class Sharded(Tensor):
        """As DTensor is, a tensor whose products are its own business."""

    x, weight, bias = operands("large", 3)
    assert not module._onednn_serves(x.detach().as_subclass(Sharded), weight)
    assert type(linear(x.detach().as_subclass(Sharded), weight, bias)) is Sharded
