"""Normalisations. Statistics are taken in float32 whatever the input, as the published references do."""

from typing import Literal, final

import torch
from torch import Tensor, nn

Norm = Literal["layer", "rms", "rms_one_plus", "rms_t5"]


@final
class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019), `[..., size]`.

    `rms` is LLaMA's; `rms_one_plus` is Gemma's, which stores the weight's distance from one; `rms_t5`
    is T5's, which scales the input in its own precision (the same as `rms` below float64).
    """

    def __init__(self, size: int, eps: float, kind: Norm = "rms") -> None:
        """Make the norm for a last dimension of `size`."""
        super().__init__()
        self.eps, self.kind = eps, kind
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a plain normalisation, with a scale of one."""
        nn.init.constant_(self.weight, 0.0 if self.kind == "rms_one_plus" else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "rms_one_plus":
            return (wide * scale * (1.0 + self.weight.float())).type_as(x)
        if self.kind == "rms_t5":
            return self.weight * (x * scale).type_as(x)
        return self.weight * (wide * scale).type_as(x)

    def extra_repr(self) -> str:
        """The size, for printing."""
        return f"{self.weight.shape[0]}, eps={self.eps}, kind={self.kind!r}"


def make_norm(kind: Norm, size: int, eps: float) -> nn.Module:
    """The normalisation of this kind over a last dimension of `size`."""
    return nn.LayerNorm(size, eps=eps) if kind == "layer" else RMSNorm(size, eps, kind)
