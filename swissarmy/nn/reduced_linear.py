"""Projections whose weights are held in 16, 8 or 4 bits, for inference: fewer bytes to read for each token.

On CPU the products are PyTorch's own packed kernels, which beat those of torchao's CPU build and of unpacked integers
(`docs/benchmarks.md`); elsewhere the weight is widened to the input's precision for each product, which saves memory
and no time. Weights stay where they were reduced, and gradients reach the input only, as QLoRA needs.

Shapes: i inputs, o outputs, g groups of a row's weights.
"""

import warnings
import weakref
from abc import ABC, abstractmethod
from typing import Any, Final, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.core.errors import ConfigError

Kind = Literal["fp16", "int8", "int4"]


class ReducedLinear(nn.Module, ABC):
    """A projection in fewer bits. Its weights are no parameters: they are neither trained, moved nor saved."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Reduce a weight `[o, i]`; the bias `[o]` stays as it is."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.handle = id(self)
        _LIVING[self.handle] = self

    def forward(self, x: Tensor) -> Tensor:
        """`[..., i]` to `[..., o]`."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            product: Tensor = _multiply(x, self.handle, self.out_features)
            return product
        return self.multiply(x)

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """The product by the kernel of this kind, `[..., i]` to `[..., o]`."""

    def widened(self) -> Tensor:
        """The weight that the product uses, float32 `[o, i]`: what it makes of each unit vector."""
        units = torch.eye(self.in_features)
        widened: Tensor = (self.multiply(units) - self.multiply(torch.zeros_like(units[:1]))).t()
        return widened

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is known by a name of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.handle = id(self)
        _LIVING[self.handle] = self


@final
class HalfLinear(ReducedLinear):
    """Weights in float16, sums in float32; about 2e-4 of relative error in a product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Round to float16.

        Raises:
            ConfigError: A weight is beyond float16's range.
        """
        super().__init__(weight, bias)
        if weight.abs().max() > torch.finfo(torch.float16).max:
            raise ConfigError('a weight is beyond the range of float16: use quantize="int8".')
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), _float(bias))

    def multiply(self, x: Tensor) -> Tensor:
        """FBGEMM's product of float32 rows and packed float16 weights."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return product.to(x.dtype)


@final
class Int8Linear(ReducedLinear):
    """Each row of the weight in 8 bits with a scale of its own; the input is rounded to 8 bits for each product.

    One scale serves all rows of an input, so a row's result depends a little on its neighbours; about 6e-3 of
    relative error in a product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Round each row to 255 steps, symmetric about zero."""
        super().__init__(weight, bias)
        steps, scale = rounded_rows(weight)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # its packed kernels know no other
            quantized = torch._make_per_channel_quantized_tensor(
                steps, scale.double(), torch.zeros(self.out_features, dtype=torch.int64), axis=0
            )
        self.packed = torch.ops.quantized.linear_prepack(quantized, _float(bias))

    def multiply(self, x: Tensor) -> Tensor:
        """FBGEMM's product in integers."""
        product: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.packed)
        return product.to(x.dtype)


@final
class Int4Linear(ReducedLinear):
    """Groups of 32 weights in 4 bits, each with a scale and an offset in bfloat16; products in bfloat16.

    About 8e-2 of relative error in a product.
    """

    GROUP: Final = 32
    OUTPUTS: Final = 16
    """The kernel takes outputs by so many."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Round each group to 16 steps between its least and its greatest weight."""
        super().__init__(weight, bias)
        self.missing_inputs = -self.in_features % self.GROUP
        padded = F.pad(weight, (0, self.missing_inputs, 0, -self.out_features % self.OUTPUTS))
        steps, scale, least = rounded_groups(padded, self.GROUP)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.flatten(1).int(), 1)
        self.scales = torch.stack((scale, least + 8 * scale), dim=-1).transpose(0, 1).contiguous().bfloat16()
        self.bias = None if bias is None else bias.detach().float()

    def multiply(self, x: Tensor) -> Tensor:
        """The packed product in bfloat16. One row goes twice: alone it would take the kernel's slow path."""
        rows = F.pad(x.flatten(0, -2), (0, self.missing_inputs)).bfloat16()
        doubled = rows.expand(2, -1) if len(rows) == 1 else rows
        padded: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            doubled.contiguous(), self.packed, self.GROUP, self.scales
        )
        product = padded[: len(rows), : self.out_features].to(x.dtype)
        if self.bias is not None:
            product = product + self.bias.to(x.dtype)
        return product.view(*x.shape[:-1], self.out_features)


@final
class WidenedLinear(ReducedLinear):
    """Where PyTorch packs nothing (on a GPU): the same rounding, widened to the input's precision for each product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind) -> None:
        """Hold float16, or 8 bits and a scale for each row; 4 bits in pairs, with a scale and an offset a group."""
        super().__init__(weight, bias)
        self.kind = kind
        self.bias = None if bias is None else bias.detach()
        self.held: tuple[Tensor, ...]
        if kind == "fp16":
            self.held = (weight.half(),)
        elif kind == "int8":
            self.held = rounded_rows(weight)
        else:
            padded = F.pad(weight, (0, -self.in_features % Int4Linear.GROUP))
            steps, scale, least = rounded_groups(padded, Int4Linear.GROUP)
            self.held = (steps[..., ::2] | (steps[..., 1::2] << 4), scale[..., None], least[..., None])

    def multiply(self, x: Tensor) -> Tensor:
        """Widen, and multiply."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self._weight(x.dtype), bias)

    def widened(self) -> Tensor:
        """The weight, float32 `[o, i]`."""
        return self._weight(torch.float32)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        if self.kind == "fp16":
            return self.held[0].to(dtype)
        if self.kind == "int8":
            return self.held[0].to(dtype) * self.held[1][:, None].to(dtype)
        pairs, scale, least = self.held
        steps = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2).to(dtype)
        return (steps * scale.to(dtype) + least.to(dtype)).flatten(1)[:, : self.in_features]


PACKED: Final[dict[Kind, type[HalfLinear] | type[Int8Linear] | type[Int4Linear]]] = {
    "fp16": HalfLinear,
    "int8": Int8Linear,
    "int4": Int4Linear,
}


def reduce_linear(weight: Tensor, bias: Tensor | None, kind: Kind) -> ReducedLinear:
    """A projection with its weight `[o, i]` in fewer bits, made for the device on which the weight is."""
    weight = weight.detach()
    if weight.device.type == "cpu" and torch.backends.quantized.engine != "none":
        return PACKED[kind](weight, bias)
    return WidenedLinear(weight, bias, kind)


def rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in 255 steps symmetric about zero: int8 `[o, i]`, and the size of a row's step `[o]` in float32."""
    scale = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def rounded_groups(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each group of a row in 16 steps from its least weight to its greatest.

    Returns:
        Steps uint8 `[o, g, size]`, and for each group the size of a step and the least weight, `[o, g]` in float32.
    """
    groups = weight.float().view(len(weight), -1, size)
    least, greatest = groups.amin(-1), groups.amax(-1)
    scale = ((greatest - least) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    steps = ((groups - least[..., None]) / scale[..., None]).round().clamp(0, 15)
    return steps.to(torch.uint8), scale, least


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()


_LIVING: weakref.WeakValueDictionary[int, ReducedLinear] = weakref.WeakValueDictionary()
"""The reduced projections that there are, by the name that a compiled graph knows them by."""


@torch.library.custom_op("swissarmy::reduced_linear", mutates_args=())
def _multiply(x: Tensor, handle: int, out_features: int) -> Tensor:
    """The product with gradients, and whole in a compiled graph, which cannot hold packed weights."""
    return _LIVING[handle].multiply(x)


@_multiply.register_fake
def _shape(x: Tensor, handle: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("swissarmy::reduced_linear_gradient", mutates_args=())
def _multiply_back(grad: Tensor, handle: int, in_features: int) -> Tensor:
    """From the gradient of a product `[..., o]` that of its input `[..., i]`; whole in a compiled graph too."""
    return grad @ _widened_like(grad, handle)


@_multiply_back.register_fake
def _shape_back(grad: Tensor, handle: int, in_features: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _widened_like(x: Tensor, handle: int) -> Tensor:
    return _LIVING[handle].widened().to(device=x.device, dtype=x.dtype)


def _keep(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.in_features, ctx.handle = inputs[0].shape[-1], inputs[1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    gradient: Tensor = _multiply_back(grad, ctx.handle, ctx.in_features)
    return gradient, None, None


def _gradient_of_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad @ _widened_like(grad, ctx.handle).t(), None, None


_multiply.register_autograd(_gradient, setup_context=_keep)
_multiply_back.register_autograd(_gradient_of_gradient, setup_context=_keep)
