"""The one product that a Transformer is made of, by the fastest exact path that the machine has.

On x86 CPUs `torch.nn.functional.linear` hands float32 to MKL, which is slow for the few rows of a decoding step and,
on AMD's AVX-512 cores, for any number of rows; oneDNN, which PyTorch carries too, takes half the time on the same
weights (`docs/benchmarks.md` has the table). Everything else is `torch.nn.functional.linear`: other devices and
precisions, autocast, sharded tensors, and products so small that choosing costs more than it gains.

Shapes: r rows, of any number of leading dimensions, i inputs, o outputs.
"""

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH_CHOOSING = 512 * 512
"""The fewest weights for which oneDNN's dearer call (some 12 microseconds) pays."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: `[r, i]`, `[o, i]`, `[o]` to `[r, o]`; exact to rounding, gradients included."""
    if not _onednn_serves(x, weight):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _has_gradient(x, weight, bias)):
        product: Tensor = _differentiable(x, weight, bias)
        return product
    return _multiply(x, weight, bias)


@final
class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[r, i]` to `[r, o]`."""
        return linear(input, self.weight, self.bias)


MKL_WOULD_SERVE = bool(torch._C.has_mkl and torch._C._has_mkldnn)


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes this product, and is worth it."""
    return bool(
        weight.numel() >= WORTH_CHOOSING
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and MKL_WOULD_SERVE
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()  # vmap, jacrev, ...: they see into F.linear, not into an op
    )


def _has_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@torch.library.custom_op("swissarmy::linear", mutates_args=())
def _differentiable(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same with gradients, and whole in a compiled graph, which takes oneDNN's own product for constants only."""
    return _multiply(x, weight, bias)


@_differentiable.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    need_x, need_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)  # a frozen weight needs no input


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Products too, and differentiable in their turn."""
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    rows = grad.flatten(0, -2)
    return (
        _product(grad, weight.t()) if need_x else None,
        _product(rows.t(), x.flatten(0, -2).t()) if need_weight else None,
        rows.sum(0) if need_bias else None,
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """As the product was that it is a gradient of; a compiler that traces it shows tensors of types of its own."""
    product: Tensor = linear(x, weight) if type(x) is Tensor else _differentiable(x, weight, None)
    return product


_differentiable.register_autograd(_gradients, setup_context=_keep)
