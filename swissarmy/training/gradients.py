"""Gradients as the loop sees them: how long they are, over all ranks, and multiplied by one factor."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swissarmy.nn.precision import precise_type


def squared_norm(parameters: Iterable[Tensor], world_size: int = 1) -> Tensor:
    """This rank's part of the squared length of all gradients together: the sum over all ranks is the whole.

    What several ranks hold alike each counts in part, so that one plain sum over the whole world is right for sharded
    and replicated parameters alike. It is not finite if any gradient is not.

    Args:
        parameters: A parameter that comes twice counts once; those without a gradient count nothing.
        world_size: How many ranks there are.

    Returns:
        A scalar, in float32 or better; nothing waits for the device.
    """
    by_share: dict[float, list[Tensor]] = {}
    for gradient in _gradients(parameters):
        by_share.setdefault(_shards(gradient) / world_size, []).append(_local(gradient))
    if not by_share:
        return torch.zeros(())
    return torch.stack([_sum_of_squares(local) * share for share, local in by_share.items()]).sum()


def clip_factor(norm: float, limit: float | None) -> float:
    """What to multiply gradients of this length with so that they are at most `limit` long."""
    return 1.0 if limit is None or norm <= limit else limit / norm


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    """Multiply all gradients, in place."""
    gradients = [_local(gradient) for gradient in _gradients(parameters)]
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [each.grad for each in dict.fromkeys(parameters) if each.grad is not None]


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    dtype = precise_type(tensors[0].dtype)
    norms = torch._foreach_norm(tensors, 2.0, dtype=dtype)
    return torch.stack([norm.to(dtype) for norm in norms]).square().sum()


def _local(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise AssertionError("a gradient must be summed over its ranks before it is measured or scaled")
    return tensor.to_local()


def _shards(tensor: Tensor) -> int:
    """In how many different parts the ranks hold a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(dim) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
