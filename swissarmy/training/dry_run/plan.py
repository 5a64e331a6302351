"""What a run would take on many machines, found out on one: memory and arithmetic of a rank, and what cannot be.

The model is built without weights and spread over torch's fake process group by the code that a real run uses, so
parameters, gradients and optimizer state have their real sizes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from swissarmy.backbone.model import Model, iterate_models
from swissarmy.backbone.parameters import freeze_except
from swissarmy.backbone.plan import layer_units
from swissarmy.core.config import report
from swissarmy.core.errors import SwissArmyError
from swissarmy.data.loading.loader import sharing_problems
from swissarmy.nn.token_losses import LOGITS_AT_ONCE
from swissarmy.training.config import TrainConfig
from swissarmy.training.dry_run.layers import layer_cost, without_values
from swissarmy.training.dry_run.watch import in_a_ring, own_bytes
from swissarmy.training.flops import TrainingCost
from swissarmy.training.optimizer import make_optimizer
from swissarmy.training.parallel.mesh import make_mesh, plan_problems
from swissarmy.training.parallel.parallelize import parallelize
from swissarmy.training.precision import prepare_weights
from swissarmy.training.sample_sizes import sized_for


@final
@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    """Its shards."""
    gathered: int
    """The two largest units, whole for the products of this rank: the one that runs, and the next one on its way."""
    gradients: int
    optimizer: int
    average: int
    """The averaged weights (`ema_decay`)."""
    activations: int
    """What a micro-batch's forward pass keeps for the backward pass."""
    recomputed: int
    """What recomputing one stretch of layers keeps besides."""
    logits: int
    """The most logits that are there at once."""

    @property
    def total(self) -> int:
        """The sum; what the process itself, the allocator and the network's buffers take comes on top."""
        return sum(asdict(self).values())


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would be."""

    world_size: int
    axes: dict[str, int]
    """The sizes of the mesh that are larger than one."""
    parameters: int
    """Of the whole model."""
    trainable: int
    global_batch_size: int
    accumulation: int
    length: int
    """Positions of a sample."""
    tokens: int
    """Of a step, over all ranks."""
    memory: Memory
    flops: float
    """Of a step, over all ranks; recomputation is not counted."""
    communication: dict[str, int]
    """Bytes that a rank sends in a step, by kind."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = asdict(self)
        return {**plain, "memory": {**plain["memory"], "total": self.memory.total}}


def dry_run(config: TrainConfig, build: Callable[[], Model], world_size: int) -> Plan:
    """Find out what a run would take; takes seconds, and next to no memory, for a model of any size.

    Args:
        config: The run's.
        build: Makes the model, with its mixins; called on the meta device.
        world_size: How many processes there are to be.

    Raises:
        ConfigError: Everything about the plan that cannot be, in one message.
        SwissArmyError: This process is in a process group.
    """
    with torch.device("meta"):
        model = build()
    configs = [plain.config for _, plain in iterate_models(model)]
    report("the parallel plan:", (*plan_problems(config, configs, world_size), *_not_counted(config)))
    data_size = world_size // config.sharing_size
    sizes = config.batch_sizes(data_size)
    report("the batch:", sharing_problems(sizes.global_batch_size, sizes.accumulation, data_size))
    samples = sizes.global_batch_size // (data_size * sizes.accumulation)
    config = sized_for(config, model)
    length = config.sequence_length or configs[-1].max_sequence_length
    if config.trainable:
        freeze_except(model, config.trainable)
    counts = [(each.numel(), each.requires_grad) for each in model.parameters()]
    cost = TrainingCost.of(model)
    with _fake_ranks(world_size):
        layers = layer_cost(config, build, samples, length, max(each.num_layers for each in configs))
        memory, gathered = _spread(config, model)
    tokens = sizes.global_batch_size * (length if configs[-1].vocab_size else 1) * len(configs)
    return Plan(
        world_size=world_size,
        axes=_axes(config, world_size),
        parameters=sum(count for count, _ in counts),
        trainable=sum(count for count, trains in counts if trains),
        global_batch_size=sizes.global_batch_size,
        accumulation=sizes.accumulation,
        length=length,
        tokens=tokens,
        memory=Memory(
            **memory,
            activations=layers.activations,
            recomputed=layers.recomputed,
            logits=_logits_bytes(config, configs[-1].vocab_size, samples * length),
        ),
        flops=cost.flops(tokens, sizes.global_batch_size),
        communication=_communication(config, memory, gathered, layers.exchanged, sizes.accumulation, world_size),
    )


def _not_counted(config: TrainConfig) -> Iterator[str]:
    """Plans that run, and that torch's DTensor cannot follow on tensors without values (it looks for positions)."""
    if config.context_parallel > 1 and config.tensor_parallel > 1:
        yield "context_parallel and tensor_parallel together train, but a dry run counts only one of them: set one to 1"


@contextmanager
def _fake_ranks(world_size: int) -> Iterator[None]:
    """This process is the first of so many that are not there."""
    if dist.is_initialized():
        raise SwissArmyError("a dry run makes a process group of its own: start it as one process, without torchrun.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _spread(config: TrainConfig, model: Model) -> tuple[dict[str, int], int]:
    """Bytes of what the first rank would hold, and of all that it would gather."""
    prepare_weights(model, config)
    if dist.get_world_size() > 1:
        parallelize(model, config, make_mesh(config, "cpu"))
    units = [[layer, *held] for layer, held in layer_units(model)]
    in_layers = {id(each) for unit in units for module in unit for each in module.parameters()}
    rest = [each for each in model.parameters() if id(each) not in in_layers]
    whole = [sum(_gathered(each, config) for module in unit for each in module.parameters()) for unit in units]
    whole.append(sum(_gathered(each, config) for each in rest))
    trains = [each for each in model.parameters() if each.requires_grad]
    own = sum(own_bytes(each) for each in trains)
    memory = {
        "parameters": sum(own_bytes(each) for each in model.parameters()),
        "gathered": sum(sorted(whole)[-2:]) if config.shard > 1 else 0,
        "gradients": own,
        "average": own if config.ema_decay is not None else 0,
        "optimizer": _optimizer_bytes(config, model),
    }
    return memory, sum(whole)


def _optimizer_bytes(config: TrainConfig, model: Model) -> int:
    """What the optimizer keeps after a step, which is taken on tensors without values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_values(model)
        optimizer = make_optimizer(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(own_bytes(value) for value in states if isinstance(value, Tensor))


def _logits_bytes(config: TrainConfig, vocabulary: int, positions: int) -> int:
    """Of the piece of a micro-batch whose loss is computed at a time."""
    sharing = config.tensor_parallel if config.shard_vocabulary else 1
    return 4 * min(positions // config.context_parallel * vocabulary, LOGITS_AT_ONCE) // sharing


def _communication(
    config: TrainConfig, memory: dict[str, int], gathered: int, exchanged: dict[str, int], micro: int, world_size: int
) -> dict[str, int]:
    """Bytes that a rank sends in a step, with collectives that run in rings.

    Layers are gathered twice a micro-batch, gradients are added up once a step, and products as they come.
    """
    copies, shared = config.data_size(world_size), config.context_parallel
    found = {kind: sent * micro for kind, sent in exchanged.items()}
    if shared > 1:
        whole = memory["gradients"] * config.shard
        found["gradients of own positions, all_reduce"] = int(whole * in_a_ring("all_reduce", shared))
    if config.shard > 1:
        found["parameters, all_gather"] = 2 * micro * (gathered - memory["parameters"])
        found["gradients, reduce_scatter"] = memory["gradients"] * (config.shard - 1)
    if copies > 1:
        found["gradients, all_reduce"] = int(memory["gradients"] * in_a_ring("all_reduce", copies))
    return found


def _axes(config: TrainConfig, world_size: int) -> dict[str, int]:
    sizes = {
        "data": config.data_size(world_size),
        "shard": config.shard,
        "context": config.context_parallel,
        "tensor": config.tensor_parallel,
    }
    return {name: size for name, size in sizes.items() if size > 1}


def _gathered(parameter: nn.Parameter, config: TrainConfig) -> int:
    """A parameter as its layer's products need it: whole but for what tensor-parallel processes share."""
    return own_bytes(parameter) * config.shard
