"""The part of a model that does not train: not saved, and looked at again when a run is resumed."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from swissarmy.core.errors import CheckpointError
from swissarmy.mixins.reduced_weights import ReducedTable
from swissarmy.nn.reduced_linear import ReducedLinear
from swissarmy.training.own_part import own_part
from swissarmy.training.ranks import Ranks

_PIECE: Final = 1 << 22
_INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def frozen_identity(model: nn.Module, ranks: Ranks) -> dict[str, list[Any]]:
    """Shape, dtype and the sum of all bits of everything that does not train, by name; every rank calls it.

    Each tensor is read once. The sum is of whole numbers, so it is the same however the tensor is sharded.
    """
    frozen: dict[str, Tensor] = {
        name: each for name, each in model.named_parameters() if not (each.requires_grad or each.is_meta)
    }
    for name, module in model.named_modules():
        if isinstance(module, ReducedLinear | ReducedTable):  # what they stand in for was let go
            frozen |= {f"{name}.held.{number}": held for number, held in enumerate(module.held)}
    own = [_sum_of_bits(parameter) if _is_counted(parameter, ranks) else 0 for parameter in frozen.values()]
    sums = [sum(each) % 2**64 for each in zip(*ranks.gather(own), strict=True)]
    return {
        name: [list(parameter.shape), str(parameter.dtype).removeprefix("torch."), total]
        for (name, parameter), total in zip(frozen.items(), sums, strict=True)
    }


def check_frozen(stored: Mapping[str, list[Any]], present: Mapping[str, list[Any]]) -> None:
    """Refuse to go on with other frozen weights than those that the rest was trained with.

    Raises:
        CheckpointError: With each parameter that differs.
    """
    problems = list(_differences(stored, present))
    if problems:
        lines = "\n  - ".join(problems[:8] + [f"and {len(problems) - 8} more"] * (len(problems) > 8))
        raise CheckpointError(f"the weights that do not train are not those of the checkpoint:\n  - {lines}")


def _differences(stored: Mapping[str, list[Any]], present: Mapping[str, list[Any]]) -> Iterator[str]:
    for name in sorted(stored.keys() | present.keys()):
        if name not in present:
            yield f"{name} did not train, and does now or is gone"
        elif name not in stored:
            yield f"{name} trained, or was not there, and is frozen now"
        elif stored[name][:2] != present[name][:2]:
            yield f"{name}: have {stored[name][:2]}, want {present[name][:2]}"
        elif stored[name] != present[name]:
            yield f"{name} has other values: load the model that the run began with"


def _is_counted(parameter: Tensor, ranks: Ranks) -> bool:
    """Of ranks that have the same part, the first one's counts."""
    if not isinstance(parameter, DTensor):
        return ranks.is_first
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    places = zip(coordinate, parameter.placements, strict=True)
    return all(number == 0 for number, placement in places if isinstance(placement, Replicate))


def _sum_of_bits(parameter: Tensor) -> int:
    local = own_part(parameter)
    bits = local.detach().reshape(-1).view(_INTEGERS[local.dtype.itemsize])
    pieces = range(0, bits.numel(), _PIECE)  # of int64, in which they are added up
    return sum(int(bits[start : start + _PIECE].sum(dtype=torch.int64)) for start in pieces) % 2**64
