"""Sums over ranks in which a rank that failed takes part too: nobody waits for it, and everybody hears of it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from swissarmy.core.errors import HookCallError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def summed_over_ranks(
    own: Sequence[float] | None, *, size: int, group: "ProcessGroup | None", device: torch.device
) -> list[float]:
    """Add up numbers over the ranks of a group, in float64; every rank gets the sums.

    Args:
        own: `size` numbers of this rank. `None` says that it failed: it then takes part and gets no sums (NaN), so
            that the caller, in a `finally`, can let its own error go on.
        size: How many numbers.
        group: The ranks; this process alone when `None`.
        device: Where the group's backend adds: the CPU for gloo, a GPU for NCCL.

    Raises:
        HookCallError: Another rank failed, or this process does not belong to the group.
    """
    nothing = [math.nan] * size
    if group is None:
        return nothing if own is None else list(own)
    rank = dist.get_rank(group)
    if rank < 0:
        raise HookCallError("this process is not one of process_group's ranks: only they make the call.")
    numbers = torch.zeros(size + dist.get_world_size(group), dtype=torch.float64, device=device)
    if own is None:
        numbers[size + rank] = 1.0
    else:
        numbers[:size] = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(numbers, group=group)
    failed = numbers[size:].nonzero().flatten().tolist()
    if own is None:
        return nothing
    if failed:
        names = ", ".join(map(str, failed))
        raise HookCallError(f"rank {names} of process_group failed, and its numbers are missing: see its own error.")
    return numbers[:size].tolist()
