"""The axes along which several processes share one sample, and how a tensor lies on them.

`context` shares positions (context parallelism), `tensor` heads, widths and vocabularies (tensor parallelism). A mesh
has one of the two axes, or both; an axis without a name counts as `tensor`.
"""

from typing import Final

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

CONTEXT: Final = "context"
TENSOR: Final = "tensor"
WHOLE: Final = Replicate()


def placements(mesh: DeviceMesh, *, context: Placement = WHOLE, tensor: Placement = WHOLE) -> tuple[Placement, ...]:
    """What to do along each axis of the mesh."""
    return tuple(context if axis == CONTEXT else tensor for axis in _axes(mesh))


def context_size(mesh: DeviceMesh) -> int:
    """How many processes share the positions."""
    return mesh.size(_axes(mesh).index(CONTEXT)) if CONTEXT in _axes(mesh) else 1


def own_positions(mesh: DeviceMesh, length: int) -> range:
    """Which of so many positions are here, in pieces as `torch.chunk` makes them: the last may be shorter."""
    size = context_size(mesh)
    piece = -(-length // size)
    number = mesh.get_local_rank(CONTEXT) if size > 1 else 0
    return range(min(number * piece, length), min((number + 1) * piece, length))


def all_have_some(mesh: DeviceMesh, length: int) -> bool:
    """Whether so many positions leave no process without any."""
    size = context_size(mesh)
    return -(-length // size) * (size - 1) < length


def tensor_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The processes that have the same positions; `None` where each has its own."""
    if CONTEXT not in _axes(mesh):
        return mesh
    return mesh[TENSOR] if TENSOR in _axes(mesh) else None


def place(mesh: DeviceMesh) -> int:
    """The number of this process among those of the mesh."""
    number = 0
    for axis, size in enumerate(mesh.shape):
        number = number * size + mesh.get_local_rank(axis)
    return number


def spread(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """As a `DTensor`; a plain tensor is the same on every process."""
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, placements(mesh), run_check=False)


def _axes(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or (TENSOR,) * mesh.ndim
