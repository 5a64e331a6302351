"""Which tensors are alive, and what processes send each other, seen from below while a model runs."""

from typing import Any, Final, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]  # torch names no types
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swissarmy.nn.shared_axes import CONTEXT, TENSOR
from swissarmy.training.own_part import own_part

EXCHANGED: Final = {TENSOR: "products", CONTEXT: "keys and values"}
"""What processes of an axis send each other."""
COLLECTIVES: Final = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


@final
class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class has no types here
    """Knows which of the tensors made while it is entered are alive, and what was given to collective operations.

    Args:
        mesh: Of the processes that share samples, whose collectives are counted by their axis.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes: dict[tuple[int, ...], str] = {}
        if mesh is not None:
            self._axes = {_ranks_of(mesh.get_group(axis)): axis for axis in mesh.mesh_dim_names or ()}
        self.exchanged: dict[str, int] = {}
        """Bytes that a rank sends, by kind."""
        self.cast = 0
        """Bytes of copies of parameters in another precision; sharded ones are gathered in it instead."""
        self._made: dict[StorageWeakRef, int] = {}

    @property
    def alive(self) -> int:
        """Bytes of the tensors that somebody still holds."""
        sizes = ((storage.expired(), size) for storage, size in self._made.items())  # type: ignore[no-untyped-call]
        return sum(size for is_gone, size in sizes if not is_gone)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func.__name__.partition(".")[0]
        if func.namespace == "_c10d_functional" and kind in COLLECTIVES:
            ranks = _ranks_of(_resolve_process_group(args[-1]))  # by name, an equal mesh made before may be meant
            name = f"{EXCHANGED[self._axes[ranks]]}, {kind}"
            sent = own_bytes(args[0]) * in_a_ring(kind, len(ranks))
            self.exchanged[name] = self.exchanged.get(name, 0) + int(sent)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = own_part(tensor).untyped_storage()
                self._made.setdefault(StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.cast += own_bytes(result)
        return result


def in_a_ring(kind: str, size: int) -> float:
    """How many bytes a process sends for each that it gives to a collective of so many processes."""
    steps = {"all_reduce": 2 * (size - 1) / size, "all_gather_into_tensor": size - 1.0}
    return steps.get(kind, (size - 1) / size)


def own_bytes(tensor: Tensor) -> int:
    """Of this rank's part of a tensor."""
    return own_part(tensor).nbytes


def _ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))
