"""Attention whose heads several processes share (tensor parallelism): each runs the kernel on its own heads.

The one place where a model that is spread over processes looks at this process's piece of a tensor. Everywhere else a
`DTensor` stands for the whole, so that mixins need not know; a fused kernel knows plain tensors only.

Shapes: q `[b, heads, s, d]`, k and v `[b, kv_heads, t, d]`.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from swissarmy.nn.masks import Dense, Mask

HEADS: Final = (Shard(1),)
"""Where q, k, v and the result are: dimension 1 is shared."""
WHOLE: Final = (Replicate(),)


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
    """Run `kernel(q, k, v, mask, bias)` on the heads of this process; their number divides evenly.

    Args:
        kernel: Attention over plain tensors.
        q: Queries, on a mesh of one axis.
        k: Keys; they, v and bias may be shared alike, shared otherwise, or whole.
        v: Values.
        mask: Which key each query sees.
        bias: Added to the scores, `[b|1, heads|1, s|1, t]`.
        draws: Whether the kernel draws random numbers (dropout): each process then draws its own for its heads, and
            all go on afterwards with the same ones.

    Returns:
        `[b, heads, s, d]`, shared by heads.
    """
    mesh = q.device_mesh
    own_q, own_k, own_v = (_own_heads(x, mesh) for x in (q, k, v))
    run = partial(kernel, own_q, own_k, own_v, _own_mask(mask, own_q, own_k, mesh), _own_bias(bias, mesh))
    result = _with_own_draws(run, mesh) if draws else run()
    return DTensor.from_local(result, mesh, HEADS, run_check=False)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph cannot hold the state of a generator
def _with_own_draws(run: Callable[[], Tensor], mesh: DeviceMesh) -> Tensor:
    """Run with random numbers that follow from the common ones and from the place of this process."""
    seed = int(torch.randint(1 << 62, (), device="cpu")) + mesh.get_local_rank()
    device = mesh.device_type
    devices = [] if device == "cpu" else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(devices, device_type="cuda" if device == "cpu" else device):
        torch.manual_seed(seed)
        return run()


def _own_heads(x: Tensor, mesh: DeviceMesh) -> Tensor:
    own: Tensor = _spread(x, mesh).redistribute(mesh, HEADS).to_local()
    return own


def _own_bias(bias: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
    """The bias of these heads; to the gradient of one that serves all heads, each process adds a part."""
    if bias is None or bias.shape[1] > 1:
        return None if bias is None else _own_heads(bias, mesh)
    shared: Tensor = _spread(bias, mesh).redistribute(mesh, WHOLE).to_local(grad_placements=(Partial(),))
    return shared


def _own_mask(mask: Mask, q: Tensor, k: Tensor, mesh: DeviceMesh) -> Mask:
    """The same rule where it is the same for all heads, else its rows for these."""
    if mask.num_heads == 1:
        return mask
    visible = mask.dense(q.shape[2], k.shape[2], q.device)
    return Dense(_own_heads(visible, mesh))


def _spread(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """As a `DTensor`; a plain tensor is the same on every process."""
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, WHOLE, run_check=False)
