"""What a run would take on many machines, found out on one: memory and arithmetic of a rank, and what cannot be.

The model is built without weights and spread over torch's fake process group by the code that a real run uses, so
parameters, gradients and optimizer state have their real sizes. What the backward pass keeps is counted while the model
runs with few layers, on shapes alone; each further layer keeps as much as those before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]  # torch names no types
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.backbone.parameters import freeze_except
from swissarmy.backbone.plan import layer_units
from swissarmy.core.config import report
from swissarmy.core.errors import SwissArmyError
from swissarmy.data.loading.loader import sharing_problems
from swissarmy.nn.shared_axes import CONTEXT, TENSOR
from swissarmy.nn.token_losses import LOGITS_AT_ONCE
from swissarmy.training.config import TrainConfig
from swissarmy.training.flops import TrainingCost
from swissarmy.training.optimizer import make_optimizer
from swissarmy.training.own_part import own_part
from swissarmy.training.parallel.mesh import make_mesh, plan_problems, shared_mesh
from swissarmy.training.parallel.parallelize import parallelize
from swissarmy.training.parallel.shared_samples import plain_tensors_are_whole, share_samples
from swissarmy.training.precision import autocast, prepare_weights


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
    length = config.sequence_length or configs[-1].max_sequence_length
    if config.trainable:
        freeze_except(model, config.trainable)
    counts = [(each.numel(), each.requires_grad) for each in model.parameters()]
    cost = TrainingCost.of(model)
    with _fake_ranks(world_size):
        activations, recomputed, exchanged = _activations(
            config, build, samples, length, max(each.num_layers for each in configs)
        )
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
            activations=activations,
            recomputed=recomputed,
            logits=_logits_bytes(config, configs[-1].vocab_size, samples * length),
        ),
        flops=cost.flops(tokens, sizes.global_batch_size),
        communication=_communication(config, memory, gathered, exchanged, sizes.accumulation, world_size),
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
    own = sum(_own_bytes(each) for each in trains)
    memory = {
        "parameters": sum(_own_bytes(each) for each in model.parameters()),
        "gathered": sum(sorted(whole)[-2:]) if config.shard > 1 else 0,
        "gradients": own,
        "average": own if config.ema_decay is not None else 0,
        "optimizer": _optimizer_bytes(config, model),
    }
    return memory, sum(whole)


def _optimizer_bytes(config: TrainConfig, model: Model) -> int:
    """What the optimizer keeps after a step, which is taken on tensors without values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_values(model)
        optimizer = make_optimizer(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(_own_bytes(value) for value in states if isinstance(value, Tensor))


def _activations(
    config: TrainConfig, build: Callable[[], Model], samples: int, length: int, depth: int
) -> tuple[int, int, dict[str, int]]:
    """Bytes kept by a micro-batch, bytes kept besides while layers are recomputed, and bytes exchanged."""
    period = config.checkpoint_every_layers if config.activation_checkpointing != "none" else 1
    few, more = (_run_layers(config, build, samples, length, layers=count * period) for count in (1, 2))
    stretches = depth / period
    kept = few.kept + (more.kept - few.kept) * (stretches - 1)
    exchanged = {
        kind: int(few.exchanged.get(kind, 0) + (count - few.exchanged.get(kind, 0)) * (stretches - 1))
        for kind, count in more.exchanged.items()
    }
    if config.activation_checkpointing == "none":
        return int(kept), 0, exchanged
    plain = config.replace(activation_checkpointing="none")
    one, two = (_run_layers(plain, build, samples, length, layers=count) for count in (1, 2))
    return int(kept), two.kept - one.kept, exchanged


def _logits_bytes(config: TrainConfig, vocabulary: int, positions: int) -> int:
    """Of the piece of a micro-batch whose loss is computed at a time."""
    sharing = config.tensor_parallel if config.shard_vocabulary else 1
    return 4 * min(positions // config.context_parallel * vocabulary, LOGITS_AT_ONCE) // sharing


@final
@dataclass(frozen=True)
class _Trace:
    """What a forward and backward pass kept and exchanged, in bytes."""

    kept: int
    exchanged: dict[str, int]


def _run_layers(config: TrainConfig, build: Callable[[], Model], samples: int, length: int, *, layers: int) -> _Trace:
    """Run the model with so many layers of each part, on tensors without values."""
    with torch.device("meta"):
        model = build()
    for _, plain in iterate_models(model):
        plain.transformer.layers = plain.transformer.layers[:layers]
    if config.trainable:
        freeze_except(model, config.trainable)
    prepare_weights(model, config)
    if config.activation_checkpointing != "none":
        selective = config.activation_checkpointing == "selective"
        model.enable_activation_checkpointing(config.checkpoint_every_layers, selective=selective)
    mesh = shared_mesh(make_mesh(config, "cpu"), config) if config.sharing_size > 1 else None
    with FakeTensorMode(allow_non_fake_inputs=True), plain_tensors_are_whole(), _Watch(mesh) as watch:
        _without_values(model)
        model.train()
        if mesh is not None:
            share_samples(
                model,
                mesh,
                sequence_parallel=config.sequence_parallel,
                shard_vocabulary=config.shard_vocabulary,
            )
        inputs = _inputs(model, samples, length)
        before = watch.alive
        with autocast(config, "cpu"):
            loss = model(**inputs)[0].float().sum()
        kept = watch.alive - before
        torch.autograd.backward(loss)
    return _Trace(kept - (watch.cast if config.shard > 1 else 0), watch.exchanged)


def _without_values(model: Model) -> None:
    """Put tensors of the CPU in the place of those on the meta device, shared ones once; to be called in fake mode.

    `to_empty` meets what two parts share again, and then tries to swap tensors, which cannot be while anything knows
    of them.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, tensor in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ):
            if tensor not in made:
                empty = torch.empty_like(tensor, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            setattr(module, name, made[tensor])


def _inputs(model: Model, samples: int, length: int) -> dict[str, Any]:
    """What a micro-batch would be; of logits only the last are made, as training makes them a few at a time."""
    ids = torch.zeros(samples, length, dtype=torch.long)
    if not isinstance(model, BaseModel):
        return {"input_ids": ids, "decoder_input_ids": ids, "logits_to_keep": 1}
    if model.config.vocab_size:
        return {"input_ids": ids, "logits_to_keep": 1}
    size = getattr(model.source.config, "image_size", 224)
    return {"pixel_values": torch.zeros(samples, getattr(model.source.config, "num_channels", 3), size, size)}


EXCHANGED: Final = {TENSOR: "products", CONTEXT: "keys and values"}
"""What processes of an axis send each other."""
COLLECTIVES: Final = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


@final
class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class has no types here
    """Knows which of the tensors made while it is entered are alive, and what was given to collective operations."""

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
            sent = _own_bytes(args[0]) * _in_a_ring(kind, len(ranks))
            self.exchanged[name] = self.exchanged.get(name, 0) + int(sent)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = own_part(tensor).untyped_storage()
                self._made.setdefault(StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.cast += _own_bytes(result)
        return result


def _ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


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
        found["gradients of own positions, all_reduce"] = int(whole * _in_a_ring("all_reduce", shared))
    if config.shard > 1:
        found["parameters, all_gather"] = 2 * micro * (gathered - memory["parameters"])
        found["gradients, reduce_scatter"] = memory["gradients"] * (config.shard - 1)
    if copies > 1:
        found["gradients, all_reduce"] = int(memory["gradients"] * _in_a_ring("all_reduce", copies))
    return found


def _in_a_ring(kind: str, size: int) -> float:
    """How many bytes a process sends for each that it gives to a collective of so many processes."""
    steps = {"all_reduce": 2 * (size - 1) / size, "all_gather_into_tensor": size - 1.0}
    return steps.get(kind, (size - 1) / size)


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
    return _own_bytes(parameter) * config.shard


def _own_bytes(tensor: Tensor) -> int:
    return own_part(tensor).nbytes
