"""Projections whose weights are held in 16, 8 or 4 bits, for inference: fewer bytes to read for each token.

On CPU the products are PyTorch's own kernels, the quickest of those in `docs/benchmarks.md` that keep the input's
precision; elsewhere the weight is widened to the input's for each product, which saves memory and no time. Weights stay
where they were reduced, and gradients reach the input only, as QLoRA needs.

Shapes: i inputs, o outputs, g groups of a row's weights.
"""

import weakref
from abc import ABC, abstractmethod
from typing import Any, Final, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.core.errors import ConfigError
from swissarmy.nn.precision import precise_type

Kind = Literal["fp16", "int8", "int4"]

INPUTS: Final = 32
"""PyTorch's integer kernels read the inputs of a row by so many, past its end if they must."""
WIDENED_AT_ONCE: Final = 1 << 22
"""How many weights are widened at a time for a gradient: a head widened whole would be the peak of a training step."""


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

    @property
    @abstractmethod
    def held(self) -> tuple[Tensor, ...]:
        """What stands for the weight, and the bias if there is one."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """The product by the kernel of this kind, `[..., i]` to `[..., o]`."""

    def widened(self) -> Tensor:
        """The weight that the product uses, float32 `[o, i]`: what it makes of each unit vector."""
        units = torch.eye(self.in_features)
        widened: Tensor = (self.multiply(units) - self.multiply(torch.zeros_like(units[:1]))).t()
        return widened

    def multiply_back(self, grad: Tensor) -> Tensor:
        """From the gradient of a product `[..., o]` that of its input `[..., i]`."""
        gradient: Tensor = grad @ self.widened().to(device=grad.device, dtype=grad.dtype)
        return gradient

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

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The rounded weight, and the bias."""
        return _present(*torch.ops.quantized.linear_unpack_fp16(self.packed))

    def multiply(self, x: Tensor) -> Tensor:
        """FBGEMM's product of float32 rows and packed float16 weights."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return product.to(x.dtype)


@final
class Int8Linear(ReducedLinear):
    """Each row of the weight in 8 bits with a scale of its own; products in bfloat16.

    The input is not rounded to integers: language models have a few features so large that a scale for all of them
    leaves the rest no steps (Dettmers et al. 2022). About 6e-3 of relative error in a product.
    """

    FEW: Final = 16
    """Up to so many rows the kernel that widens as it reads is the quicker one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Round each row to 255 steps, symmetric about zero."""
        super().__init__(weight, bias)
        steps, scale = rounded_rows(weight)
        self.missing_inputs = -self.in_features % INPUTS
        self.steps = F.pad(steps, (0, self.missing_inputs)).contiguous()
        self.scale = scale.bfloat16()  # exactly: the steps are of that size
        self.bias = _float(bias)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The steps, their sizes, and the bias."""
        return _present(self.steps, self.scale, self.bias)

    def multiply(self, x: Tensor) -> Tensor:
        """The product in bfloat16, the bias in float32."""
        rows = _bfloat16_rows(x, self.missing_inputs)
        if len(rows) <= self.FEW:
            product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.steps, self.scale)
        else:
            product = F.linear(rows, self.steps.bfloat16()) * self.scale
        return _with_bias(product, self.bias, x)

    def widened(self) -> Tensor:
        """The weight, float32 `[o, i]`, without a product's rounding."""
        return self._widened(slice(None))

    def multiply_back(self, grad: Tensor) -> Tensor:
        """Some outputs at a time, added up in float32 at least."""
        rows, size = grad.flatten(0, -2), max(1, WIDENED_AT_ONCE // self.in_features)
        total = grad.new_zeros(len(rows), self.in_features, dtype=precise_type(grad.dtype))
        for start in range(0, self.out_features, size):
            some = slice(start, start + size)
            total += rows[:, some] @ self._widened(some).to(grad.dtype)
        return total.to(grad.dtype).view(*grad.shape[:-1], self.in_features)

    def _widened(self, outputs: slice) -> Tensor:
        return self.steps[outputs, : self.in_features].float() * self.scale[outputs].float()[:, None]


@final
class Int4Linear(ReducedLinear):
    """Groups of 32 weights in 4 bits, each with a scale and an offset in bfloat16; products in bfloat16.

    About 8e-2 of relative error in a product.
    """

    GROUP: Final = INPUTS
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
        self.bias = _float(bias)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The steps, their sizes and offsets, and the bias."""
        return _present(self.packed, self.scales, self.bias)

    def multiply(self, x: Tensor) -> Tensor:
        """The packed product in bfloat16. One row goes twice: alone it would take the kernel's slow path."""
        rows = _bfloat16_rows(x, self.missing_inputs)
        doubled = rows.repeat(2, 1) if len(rows) == 1 else rows
        padded: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(doubled, self.packed, self.GROUP, self.scales)
        return _with_bias(padded[: len(rows), : self.out_features], self.bias, x)


@final
class WidenedLinear(ReducedLinear):
    """Where PyTorch packs nothing (on a GPU): the same rounding, widened to the input's precision for each product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind) -> None:
        """Hold float16, or 8 bits and a scale for each row; 4 bits in pairs, with a scale and an offset a group."""
        super().__init__(weight, bias)
        self.kind = kind
        self.bias = None if bias is None else bias.detach()
        self.rounded: tuple[Tensor, ...]
        if kind == "fp16":
            self.rounded = (weight.half(),)
        elif kind == "int8":
            self.rounded = rounded_rows(weight)
        else:
            padded = F.pad(weight, (0, -self.in_features % Int4Linear.GROUP))
            steps, scale, least = rounded_groups(padded, Int4Linear.GROUP)
            self.rounded = (steps[..., ::2] | (steps[..., 1::2] << 4), scale[..., None], least[..., None])

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The rounded weight, and the bias."""
        return _present(*self.rounded, self.bias)

    def multiply(self, x: Tensor) -> Tensor:
        """Widen, and multiply."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self._weight(x.dtype), bias)

    def widened(self) -> Tensor:
        """The weight, float32 `[o, i]`."""
        return self._weight(torch.float32)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        if self.kind == "fp16":
            return self.rounded[0].to(dtype)
        if self.kind == "int8":
            return self.rounded[0].to(dtype) * self.rounded[1][:, None].to(dtype)
        pairs, scale, least = self.rounded
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
    """Each row in 255 steps symmetric about zero: int8 `[o, i]`, and the size of a row's step `[o]`.

    The sizes are float32 numbers that bfloat16 holds exactly, so that either may multiply.
    """
    scale = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16().float()
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


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


def _bfloat16_rows(x: Tensor, missing: int) -> Tensor:
    """The rows of `[..., i]` as the kernels take them, with zeros for the inputs that their blocks lack."""
    rows = x.flatten(0, -2).bfloat16()
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def _with_bias(product: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A bfloat16 product `[rows, o]` with its float32 bias, in the shape and the precision of its input `[..., i]`."""
    whole = (product if bias is None else product + bias).to(x.dtype)
    return whole.view(*x.shape[:-1], product.shape[1])


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(each for each in tensors if each is not None)


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
    return _LIVING[handle].multiply_back(grad)


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
