"""Attention that several processes share: each runs the kernel on its own heads (tensor parallelism) and on its own
queries, with all keys and values (context parallelism; Dubey et al. 2024, section 3.3.2).

The one place where a model that is spread over processes looks at this process's piece of a tensor. Everywhere else a
`DTensor` stands for the whole, so that mixins need not know; a fused kernel knows plain tensors only.

Shapes: q `[b, heads, s, d]`, k and v `[b, kv_heads, t, d]`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

from swissarmy.nn.masks import Causal, Dense, Full, Mask, Rows, SlidingWindow, WithPrefix
from swissarmy.nn.shared_axes import WHOLE, context_size, own_positions, place, placements, spread

HEADS, QUERIES = Shard(1), Shard(2)
"""The dimensions that are shared."""


def on_own_heads(
    kernel: Callable[[Tensor, Tensor, Tensor, Mask, Tensor | None], Tensor],
    q: DTensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None,
    *,
    draws: bool = False,
) -> DTensor:
    """Run `kernel(q, k, v, mask, bias)` on the heads and queries of this process; the number of heads divides evenly.

    Args:
        kernel: Attention over plain tensors.
        q: Queries, on a mesh of the axes in `shared_axes`.
        k: Keys; they, v and bias may be shared alike, shared otherwise, or whole.
        v: Values.
        mask: Which key each query sees.
        bias: Added to the scores, `[b|1, heads|1, s|1, t]`.
        draws: Whether the kernel draws random numbers (dropout): each process then draws its own, and all go on
            afterwards with the same ones.

    Returns:
        `[b, heads, s, d]`, shared by heads and by queries.
    """
    mesh, where = q.device_mesh, placements(q.device_mesh, context=QUERIES, tensor=HEADS)
    own_k, own_v = (_own(x, mesh, context=WHOLE, tensor=HEADS) for x in (k, v))
    own_q, own_bias = _own(q, mesh, context=QUERIES, tensor=HEADS), _own_bias(bias, mesh)
    own_mask = _mask_of_own_heads(mask, q, own_k) if mask.num_heads > 1 else mask
    if context_size(mesh) > 1:
        queries = own_positions(mesh, q.shape[2])
        own_mask, last = _mask_of_own_queries(own_mask, queries, q.shape[2], own_k)
        own_k, own_v = own_k[:, :, :last], own_v[:, :, :last]
        own_bias = None if own_bias is None else own_bias[..., :last]
    run = partial(kernel, own_q, own_k, own_v, own_mask, own_bias)
    result = _with_own_draws(run, mesh) if draws else run()
    return _assembled(result, mesh, where, torch.Size((*q.shape[:3], result.shape[3])))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph cannot hold the state of a generator
def _with_own_draws(run: Callable[[], Tensor], mesh: DeviceMesh) -> Tensor:
    """Run with random numbers that follow from the common ones and from the place of this process."""
    seed = int(torch.randint(1 << 62, (), device="cpu")) + place(mesh)
    device = mesh.device_type
    devices = [] if device == "cpu" else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(devices, device_type="cuda" if device == "cpu" else device):
        torch.manual_seed(seed)
        return run()


def _own(x: Tensor, mesh: DeviceMesh, *, context: Placement, tensor: Placement) -> Tensor:
    """This process's piece; to the gradient of what processes have in common, each adds a part."""
    where = placements(mesh, context=context, tensor=tensor)
    parts = tuple(Partial() if each == WHOLE else each for each in where)
    whole: Any = spread(x, mesh)
    if context_size(mesh) > 1:  # processes have keys in other numbers, and gradients would lie otherwise in memory
        whole = whole.contiguous()
        if whole.requires_grad:
            whole.register_hook(_packed)
    own: Tensor = whole.redistribute(mesh, where).to_local(grad_placements=parts)
    if context_size(mesh) > 1 and own.requires_grad:
        own.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
    return own


def _packed(x: DTensor) -> DTensor:
    """The same without gaps: what is left of a piece that was padded keeps the padding's strides."""
    return _assembled(x.to_local(), x.device_mesh, x.placements, x.shape)


def _assembled(own: Tensor, mesh: DeviceMesh, where: Sequence[Placement], shape: torch.Size) -> DTensor:
    """The whole that pieces make, which may differ in size; each lies in memory without gaps, as the whole says."""
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own.contiguous(), mesh, where, run_check=False, shape=shape, stride=strides)


def _own_bias(bias: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
    """The bias of these queries and heads."""
    if bias is None:
        return None
    by_query, by_head = (size > 1 for size in (bias.shape[2], bias.shape[1]))
    return _own(bias, mesh, context=QUERIES if by_query else WHOLE, tensor=HEADS if by_head else WHOLE)


def _mask_of_own_heads(mask: Mask, q: DTensor, k: Tensor) -> Mask:
    """The rows of a rule that tells heads apart."""
    visible = mask.dense(q.shape[2], k.shape[2], k.device)
    return Dense(_own(visible, q.device_mesh, context=WHOLE, tensor=HEADS))


def _mask_of_own_queries(mask: Mask, queries: range, q_len: int, k: Tensor) -> tuple[Mask, int]:
    """The rule for some queries, and how many keys they have; a mask's last query stands at the last key."""
    k_len = k.shape[2]
    if isinstance(mask.inner if isinstance(mask, WithPrefix) else mask, Full):
        return mask, k_len
    if _looks_back_alike(mask):
        return mask, k_len - (q_len - queries.stop)
    return Rows(mask, total=q_len, behind=q_len - queries.stop), k_len


def _looks_back_alike(mask: Mask) -> bool:
    """Whether every query sees nothing after it, and the keys before it by the same rule."""
    return isinstance(mask.inner if isinstance(mask, WithPrefix) else mask, Causal | SlidingWindow)
