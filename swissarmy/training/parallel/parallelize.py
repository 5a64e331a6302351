"""A model over many processes, one place for every family: shared samples, checkpointing, compiling, sharding."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map_only

from swissarmy.backbone.model import Model, every_mixin
from swissarmy.backbone.plan import layer_units
from swissarmy.core.config import report
from swissarmy.mixins.reduced_weights import ReducedWeightsMixin
from swissarmy.training.parallel.mesh import DATA, SHARD, ParallelOptions, shared_mesh
from swissarmy.training.parallel.shared_samples import give_plain_tensors, share_samples

Checkpointing = Literal["none", "full", "selective"]
"""Which activations are computed again in the backward pass: none, all of a layer's, or all but its products'."""


def parallelize(
    model: Model,
    options: ParallelOptions,
    mesh: DeviceMesh | None,
    *,
    compile: bool = False,
    activation_checkpointing: Checkpointing = "none",
    checkpoint_every_layers: int = 1,
    mixed_precision: MixedPrecisionPolicy | None = None,
) -> None:
    """Make a model train on the processes of a mesh, in place; it is called, and its parameters are named, as before.

    Gradients are sums over all samples of all processes. Mixins are added before; marks on parameters (`lr_scale`)
    stay. A model whose processes share samples runs inside `plain_tensors_are_whole()`.

    Args:
        model: Alike on each process, or on the meta device.
        options: The sizes of the mesh, and how products are shared.
        mesh: From `make_mesh`; `None` for a process alone.
        compile: Whether each layer is compiled.
        activation_checkpointing: What is computed again instead of being kept.
        checkpoint_every_layers: In every n-th layer.
        mixed_precision: What shards are gathered and added up in; in their own precision when omitted.

    Raises:
        ConfigError: The model holds something that no process can have a part of.
    """
    if mesh is not None:
        report("this model cannot be spread over processes:", _problems(model))
    shared = None if mesh is None else shared_mesh(mesh, options)
    if shared is not None:
        share_samples(
            model,
            shared,
            sequence_parallel=options.sequence_parallel,
            shard_vocabulary=options.shard_vocabulary,
        )
    if activation_checkpointing != "none":
        selective = activation_checkpointing == "selective"
        model.enable_activation_checkpointing(checkpoint_every_layers, selective=selective)
    if compile:
        model.compile(dynamic=None)
    if mesh is not None:
        shard_parameters(model, mesh, mixed_precision or MixedPrecisionPolicy())
    if shared is not None:
        give_plain_tensors(model)


def shard_parameters(model: Model, mesh: DeviceMesh, mixed_precision: MixedPrecisionPolicy) -> None:
    """FSDP2 (Zhao et al. 2023): a layer with all that mixins hold for it is gathered when it runs, and let go after.

    Args:
        model: On which `share_samples` came before, if at all.
        mesh: From `make_mesh`.
        mixed_precision: What shards are gathered and added up in.
    """
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    options: dict[str, Any] = {
        "mesh": mesh[SHARD] if mesh[DATA].size() == 1 else mesh[DATA, SHARD],
        "reshard_after_forward": mesh[SHARD].size() > 1,
        "mp_policy": mixed_precision,
    }
    in_layers = set[nn.Parameter]()
    for layer, held in layer_units(model):
        with _adopted(layer, held):
            fully_shard(layer, **options)
            in_layers.update(layer.parameters())
    model.register_forward_hook(lambda model, arguments, outputs: tree_map_only(Tensor, _no_view, outputs))
    fully_shard(model, ignored_params=in_layers, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it sums
    _restore_marks(model, marks)


@contextmanager
def _adopted(layer: nn.Module, held: Sequence[nn.Module]) -> Iterator[None]:
    """While entered, modules that mixins hold for a layer are inside it, and so in its unit."""
    layer.add_module("held", nn.ModuleList(held))
    try:
        yield
    finally:
        del layer.held


def _no_view(output: Tensor) -> Tensor:
    """What a caller may change in place; on a view, that would cut off what FSDP2 hangs on outputs."""
    return output.clone() if output._is_view() and output.requires_grad else output


def _restore_marks(model: nn.Module, marks: Mapping[str, Mapping[str, Any]]) -> None:
    """Sharding makes new parameters, without what was left on the old ones for the optimizer."""
    for name, parameter in model.named_parameters():
        vars(parameter).update(marks[name])


def _problems(model: Model) -> Iterator[str]:
    for name, mixin in every_mixin(model):
        if isinstance(mixin, ReducedWeightsMixin):
            yield f"{name}: reduced weights are packed for the process that reduced them; load it without `quantize`"
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            yield f"{name} is a single number, and parameters are shared by rows: make it one of shape [1]"
