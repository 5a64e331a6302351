"""Tensor and context parallelism: parameters become `DTensor`s, and with them all that is computed from them.

A `DTensor` stands for the whole tensor, and each process holds a piece of it. So every family, every mixin and every
hook computes what it would alone; this file says only where results are put together. With context parallelism each
process has some positions of the residual stream and of all that is made of it, but for the keys and values that
`nn/shared_heads.py` gathers. Callers give plain tensors, the same on each process, and get plain tensors back.

Shapes: b batch, s positions, h hidden size.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_map

from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.backbone.plan import shared_dims
from swissarmy.core.errors import HookCallError
from swissarmy.core.hooks import Hook, answers, mark_of, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.nn.shared_axes import TENSOR, all_have_some, context_size, placements, spread

Placements = tuple[Placement, ...]
_INSIDE: ContextVar[bool] = ContextVar("plain_tensors_are_whole", default=False)


@final
class SharedSamplesMixin(BaseMixin):
    """Puts together what a sublayer's processes computed, once for each sublayer.

    Hooks: `word_embedding_forward`, `attention_forward`, `cross_attention_forward`, `mlp_forward`, `final_forward`
    (wraps). Parameters: none.
    """

    keeps_outputs = True

    def __init__(self, mesh: DeviceMesh, *, sequence_parallel: bool, written_out: bool = False) -> None:
        """Share positions along the context axis; with `sequence_parallel`, of the residual stream on both axes.

        Attention that a mixin wrote out (`written_out`) is given all positions: it may do with them what it likes.
        """
        super().__init__()
        self.mesh = mesh
        self.inside = placements(mesh, context=Shard(1))
        """How sublayers and the head are given hidden states."""
        self.attended = placements(mesh) if written_out else self.inside
        """How attention is."""
        self.stream = placements(mesh, context=Shard(1), tensor=Shard(1) if sequence_parallel else Replicate())
        """How hidden states are between them."""

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"{self.mesh.size()} processes, residual stream {', '.join(map(str, self.stream))}"

    @non_conflict
    def word_embedding_forward(self, input_ids: Tensor | None, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Start the residual stream, `[b, s, h]`; pixels and the like come in as the caller gave them."""
        if not _INSIDE.get():
            raise HookCallError("this model is spread over processes: call it inside plain_tensors_are_whole().")
        if kw_args.get("mems") is not None and context_size(self.mesh) > 1:
            raise HookCallError("context_parallel shares positions, and a cache wants all of them: leave `mems` out.")
        kw_args = {key: spread(value, self.mesh) if _is_real(value) else value for key, value in kw_args.items()}
        embedded = old_impl(input_ids, **kw_args)
        self._check_length(embedded.shape[1], kw_args["transformer"])
        if self.mesh.ndim > 1:  # a sum over the vocabulary's pieces knows its positions by their number
            embedded = self._put(embedded, placements(self.mesh))
        return self._put(embedded, self.stream)

    @non_conflict
    def attention_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Sum what the processes' heads give."""
        return self._put(old_impl(self._put(hidden_states, self.attended), mask, **kw_args), self.stream)

    @non_conflict
    def cross_attention_forward(
        self, hidden_states: Tensor, cross_attention_mask: Any, encoder_outputs: Any, *, old_impl: Hook, **kw_args: Any
    ) -> Tensor:
        """Sum what the processes' heads give."""
        encoded = self._put(encoder_outputs, self.attended) if _is_real(encoder_outputs) else encoder_outputs
        attended = old_impl(self._put(hidden_states, self.attended), cross_attention_mask, encoded, **kw_args)
        return self._put(attended, self.stream)

    @non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Sum what the processes' parts of the MLP give."""
        return self._put(old_impl(self._put(hidden_states, self.inside), **kw_args), self.stream)

    @non_conflict
    def final_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Any:
        """Give the head what sublayers are given, or all of the few positions that a caller asked for."""
        few = not all_have_some(self.mesh, hidden_states.shape[1])
        return old_impl(self._put(hidden_states, placements(self.mesh) if few else self.inside), **kw_args)

    def _check_length(self, length: int, transformer: nn.Module) -> None:
        """Each process needs positions, and on the CPU, where processes draw dropout side by side, as many.

        Raises:
            HookCallError: It would have others.
        """
        if not all_have_some(self.mesh, length):
            size = context_size(self.mesh)
            raise HookCallError(
                f"{length} positions, shared by context_parallel={size} processes in pieces of {-(-length // size)}, "
                "leave some without any: pad, or use fewer processes."
            )
        sharing = math.prod(self.mesh.size(axis) for axis, each in enumerate(self.stream) if each.is_shard())
        uneven = length % sharing and self.mesh.device_type == "cpu"
        if uneven and self.training and any(isinstance(each, nn.Dropout) and each.p for each in transformer.modules()):
            raise HookCallError(
                f"{length} positions, and {sharing} processes share them: with dropout on the CPU, sequence_parallel "
                "and context_parallel need a length that they divide; pad, or turn one of them off."
            )

    def _put(self, x: Tensor, where: Placements) -> Tensor:
        return spread(x, self.mesh).redistribute(self.mesh, where)


def share_samples(model: Model, mesh: DeviceMesh, *, sequence_parallel: bool, shard_vocabulary: bool) -> None:
    """Spread a model's parameters over the processes of `mesh` as `backbone.plan` says, and its computation with them.

    Args:
        model: With its mixins; alike on each process, or on the meta device.
        mesh: From `mesh.shared_mesh`.
        sequence_parallel: Whether each process keeps and normalises only its positions of the residual stream.
        shard_vocabulary: Whether parameters with a row for each token are shared too.
    """
    _distribute(model, mesh, shared_dims(model, shard_vocabulary=shard_vocabulary))
    name = f"{'-and-'.join(mesh.mesh_dim_names or (TENSOR,))}-parallel"
    for _, part in iterate_models(model):
        mixin = SharedSamplesMixin(mesh, sequence_parallel=sequence_parallel, written_out=_writes_attention_out(part))
        part.add_mixin(name, mixin)


def _writes_attention_out(part: BaseModel) -> bool:
    """Whether something stands in for the backbone's attention, and does not only wrap it."""
    return any(
        answers(answerer, hook) and mark_of(getattr(answerer, hook)).kind != "non_conflict"
        for answerer in (part, *part.mixins.values())
        for hook in ("attention_fn", "attention_forward", "cross_attention_forward")
    )


def give_plain_tensors(model: Model) -> None:
    """Let a model that is spread give its callers whole plain tensors; their gradients go back through them."""
    model.register_forward_hook(lambda model, arguments, outputs: tree_map(_plain, outputs))


@contextmanager
def plain_tensors_are_whole() -> Iterator[None]:
    """While entered, operations take plain tensors beside `DTensor`s, as the same on every process.

    Forward and backward passes of a model that `share_samples` spread run inside; in others it changes nothing.
    """
    if _INSIDE.get():
        yield
        return
    token = _INSIDE.set(True)
    try:
        with implicit_replication(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="DTensor random operators")  # see _check_length
            yield
    finally:
        _INSIDE.reset(token)


def _distribute(model: Model, mesh: DeviceMesh, dims: dict[str, int]) -> None:
    """Put pieces in the places of parameters and buffers; what several modules share stays shared."""
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                piece = _parameter(parameter, mesh, dims.get(f"{path}.{name}"))
                module.register_parameter(name, made.setdefault(id(parameter), piece))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not isinstance(buffer, DTensor):
                module._buffers[name] = _piece(buffer, mesh, None)


def _parameter(parameter: nn.Parameter, mesh: DeviceMesh, dim: int | None) -> nn.Parameter:
    """A piece with what was left on the parameter for the optimizer."""
    piece = nn.Parameter(_piece(parameter.detach(), mesh, dim), requires_grad=parameter.requires_grad)
    vars(piece).update(vars(parameter))
    return piece


def _piece(whole: Tensor, mesh: DeviceMesh, dim: int | None) -> Tensor:
    where = placements(mesh) if dim is None else placements(mesh, tensor=Shard(dim))
    piece = distribute_tensor(whole, mesh, where, src_data_rank=None)
    return piece if dim is None else piece.clone()  # a view would keep the whole in memory


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _plain(output: Any) -> Any:
    return output.full_tensor() if isinstance(output, DTensor) else output
