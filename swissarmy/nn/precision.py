"""The precision in which sums, losses and changed weights are computed: float32 at least."""

import torch
from torch import Tensor


def precise_type(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def precise(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return x.to(precise_type(x.dtype))
