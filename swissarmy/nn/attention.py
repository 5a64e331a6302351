"""The attention kernel: the fastest exact path for the type of mask.

Shapes: q `[b, heads, s, d]`, k and v `[b, kv_heads, t, d]`; the result is `[b, heads, s, d]`.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.nn.masks import Both, Causal, Documents, Full, Mask, SlidingWindow, WithPrefix


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    dropout_fn: Callable[[Tensor], Tensor],
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention (Vaswani et al. 2017), grouped key-value heads included; zero for a query that sees no key.

    Args:
        q: Queries, `[b, heads, s, d]`.
        k: Keys, `[b, kv_heads, t, d]`; `heads` is a multiple of `kv_heads`.
        v: Values, as the keys.
        mask: Which key each query sees; the last query stands at the last key.
        dropout_fn: Applied to the probabilities.
        scale: What the scores are multiplied by; `1/sqrt(d)` when `None`.
        bias: Added to the scores, `[b|1, heads|1, s|1, t]`.
        softcap: Scores become `softcap * tanh(scores / softcap)` before bias and mask (Gemma 2).
    """
    kernel = partial(_attend, dropout_fn=dropout_fn, scale=scale, softcap=softcap)
    if type(q) is not Tensor:  # then at call time: a model in one process needs none of this
        from torch.distributed.tensor import DTensor

        from swissarmy.nn.shared_heads import on_own_heads

        if isinstance(q, DTensor):
            draws = dropout_fn.training and dropout_fn.p > 0 if isinstance(dropout_fn, nn.Dropout) else True
            return on_own_heads(kernel, q, k, v, mask, bias, draws=draws)
    return kernel(q, k, v, mask, bias)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None,
    *,
    dropout_fn: Callable[[Tensor], Tensor],
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention over plain tensors."""
    if softcap is not None or not isinstance(dropout_fn, nn.Dropout):
        return _written_out(q, k, v, mask, dropout_fn, scale=scale, bias=bias, softcap=softcap)
    if bias is None and q.is_cuda and torch.compiler.is_compiling() and _has_hidden_blocks(mask):
        return flex(q, k, v, mask, dropout_fn, scale=scale)
    dropout, grouped = dropout_fn.p if dropout_fn.training else 0.0, k.shape[1] != q.shape[1]
    sdpa = F.scaled_dot_product_attention
    if bias is None and _is_square_causal(mask, q, k):
        return sdpa(q, k, v, is_causal=True, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    visible = _score_mask(mask, q, k, bias)
    return sdpa(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scale, enable_gqa=grouped)


def _is_square_causal(mask: Mask, q: Tensor, k: Tensor) -> bool:
    """Whether SDPA's `is_causal` (aligned to the first key) means the same as the mask."""
    if isinstance(mask, SlidingWindow) and k.shape[2] > mask.window:
        return False
    return isinstance(mask, Causal | SlidingWindow) and 1 < q.shape[2] == k.shape[2]


def _sees_all(mask: Mask, q_len: int, k_len: int) -> bool:
    """Whether no query is denied any key, known from type and sizes alone."""
    if isinstance(mask, WithPrefix):
        return _sees_all(mask.inner, q_len, k_len - mask.num_keys)
    if isinstance(mask, SlidingWindow) and k_len > mask.window:
        return False
    return isinstance(mask, Full) or (isinstance(mask, Causal | SlidingWindow) and q_len == 1)


def _score_mask(mask: Mask, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    """What SDPA takes as `attn_mask`: nothing, a bool tensor, or the bias with the hidden keys at -inf."""
    if _sees_all(mask, q.shape[2], k.shape[2]):
        return bias
    visible = mask.dense(q.shape[2], k.shape[2], q.device)
    return visible if bias is None else torch.where(visible, bias, float("-inf"))


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    dropout_fn: Callable[[Tensor], Tensor],
    *,
    scale: float | None,
    bias: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """The same in plain operations, for what SDPA has no argument for."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if _sees_all(mask, q.shape[2], k.shape[2]):
        probabilities = scores.softmax(dim=-1)
    else:
        hidden = ~mask.dense(q.shape[2], k.shape[2], q.device)
        probabilities = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1)
        probabilities = probabilities.masked_fill(hidden, 0.0)
    return dropout_fn(probabilities.to(v.dtype)) @ v


def _has_hidden_blocks(mask: Mask) -> bool:
    mask = mask.inner if isinstance(mask, WithPrefix) else mask
    return isinstance(mask, SlidingWindow | Documents | Both)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout_fn: nn.Dropout, *, scale: float | None) -> Tensor:
    """Flex attention (Dong et al. 2024), which skips the blocks that a composite mask hides.

    It is fused only inside a compiled graph on a GPU; anywhere else it gives the same numbers slowly.
    """
    if dropout_fn.training and dropout_fn.p > 0:
        return _written_out(q, k, v, mask, dropout_fn, scale=scale, bias=None, softcap=None)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask.check(q.shape[2], k.shape[2])
    first_query = k.shape[2] - q.shape[2]
    blocks = create_block_mask(
        lambda b, h, i, j: mask.visible(b, h, i + first_query, j),
        q.shape[0] if mask.batch_size > 1 else None,
        q.shape[1] if mask.num_heads > 1 else None,
        q.shape[2],
        k.shape[2],
        device=str(q.device),
    )
    result: Tensor = flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return result
