"""The processes of a run as one `DeviceMesh`: copies of the model, shards of a copy, and pieces of each product.

Axes, from the outside in, each of any size: `data` holds copies of the model, which see different samples; `shard` too
sees different samples, and shares one copy's parameters, gradients and optimizer state (FSDP, and with `data` HSDP);
`context` shares the positions of each sample, and `tensor` each matrix product: both see the same samples.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.plan import divisibility_problems, divisors
from swissarmy.core.config import Config, report
from swissarmy.nn.shared_axes import CONTEXT, TENSOR

DATA: Final = "data"
SHARD: Final = "shard"
AXES: Final = ("data", "shard", "context_parallel", "tensor_parallel")
"""The options that give their sizes."""


@dataclass(frozen=True, kw_only=True)
class ParallelOptions(Config):
    """How a run is spread over processes; the sizes multiply to their number."""

    data: int | None = None
    """Copies of the model that see different samples; the rest of the processes when `None`."""
    shard: int = 1
    """Processes that share the parameters, gradients and optimizer state of a copy, on different samples (FSDP)."""
    tensor_parallel: int = 1
    """Processes that share each matrix product, on the same samples."""
    context_parallel: int = 1
    """Processes that share the positions of each sample: each keeps its own, and gathers the others' keys and values
    (Dubey et al. 2024, section 3.3.2)."""
    sequence_parallel: bool = False
    """Whether norms and the residual stream are shared along positions by the tensor-parallel processes."""
    shard_vocabulary: bool = True
    """Whether the tensor-parallel processes share the word embedding and the head too."""
    distributed_timeout: float = 600.0
    """Seconds after which a process that waits for another one gives up."""

    def problems(self) -> Iterator[str]:
        """Sizes below one."""
        for name in AXES:
            size = getattr(self, name)
            if size is not None and size < 1:
                yield f"{name}={size} must be at least 1"
        if not 0 < self.distributed_timeout < 1e9:
            yield f"distributed_timeout={self.distributed_timeout:g} must be a number of seconds, and more than 0"
        if self.sequence_parallel and self.tensor_parallel == 1:
            yield "sequence_parallel=True needs tensor_parallel of 2 or more: its processes share the positions"

    @property
    def sharing_size(self) -> int:
        """How many processes see the same samples."""
        return self.tensor_parallel * self.context_parallel

    def data_size(self, world_size: int) -> int:
        """`data`, filled in."""
        return world_size // (self.shard * self.sharing_size) if self.data is None else self.data


def plan_problems(options: ParallelOptions, configs: Sequence[TransformerConfig], world_size: int) -> Iterator[str]:
    """What is wrong with a plan, a line for each problem with the values that would do; nothing is started.

    Args:
        options: The sizes of the axes.
        configs: Of the model, or of each of its parts.
        world_size: How many processes there are to be.
    """
    yield from _size_problems(options, world_size)
    yield from divisibility_problems(configs, options.tensor_parallel, shard_vocabulary=options.shard_vocabulary)


def check_plan(options: ParallelOptions, configs: Sequence[TransformerConfig], world_size: int) -> None:
    """Refuse a plan that cannot be, with all that is wrong with it in one message.

    Raises:
        ConfigError: See `plan_problems`.
    """
    report("the parallel plan:", plan_problems(options, configs, world_size))


def make_mesh(options: ParallelOptions, device_type: str) -> DeviceMesh:
    """All processes of the run by their axes; every process calls it.

    Raises:
        ConfigError: The sizes do not multiply to the number of processes.
    """
    world_size = dist.get_world_size()
    report("the parallel plan:", _size_problems(options, world_size))
    sizes = (options.data_size(world_size), options.shard, options.context_parallel, options.tensor_parallel)
    return init_device_mesh(device_type, sizes, mesh_dim_names=(DATA, SHARD, CONTEXT, TENSOR))


def shared_mesh(mesh: DeviceMesh, options: ParallelOptions) -> DeviceMesh | None:
    """The processes that see the same samples, by the axes of more than one of them; `None` where there are none."""
    sizes = {CONTEXT: options.context_parallel, TENSOR: options.tensor_parallel}
    axes = tuple(axis for axis, size in sizes.items() if size > 1)
    return mesh[axes] if axes else None


def _size_problems(options: ParallelOptions, world_size: int) -> Iterator[str]:
    """Whether the sizes multiply to the number of processes."""
    sizes = {name: getattr(options, name) for name in AXES}
    sharing = math.prod(size for name, size in sizes.items() if name != "data")
    named = {name: size for name, size in sizes.items() if size is not None and (size > 1 or name == "data")}
    written = " x ".join(f"{name}={size}" for name, size in named.items())
    if world_size % sharing:
        valid = " or ".join(map(str, divisors(world_size)))
        yield f"{written} does not divide the number of processes, {world_size}: the product can be {valid}"
    elif options.data not in (None, world_size // sharing):
        cure = f"leave `data` out, or say data={world_size // sharing}"
        yield f"{written} is not the number of processes, {world_size}: {cure}"
