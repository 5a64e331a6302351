"""Activations, by the names that Hugging Face configs use."""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor


def identity(x: Tensor) -> Tensor:
    """Nothing."""
    return x


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """GELU in its sigmoid approximation."""
    return x * (1.702 * x).sigmoid()


def relu_squared(x: Tensor) -> Tensor:
    """The square of ReLU (So et al. 2021)."""
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu_squared,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
    "selu": F.selu,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "linear": identity,
}
