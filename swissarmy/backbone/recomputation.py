"""Activation checkpointing (Chen et al. 2016): what a layer keeps for its gradient, and what it computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT: Final = frozenset(
    """
    aten::mm aten::addmm aten::bmm aten::baddbmm swissarmy::linear
    aten::_scaled_dot_product_flash_attention aten::_scaled_dot_product_flash_attention_for_cpu
    aten::_scaled_dot_product_efficient_attention aten::_scaled_dot_product_cudnn_attention
    """.split()
)
"""The operators that take most of the time: a selective recomputation keeps their results."""


def recomputed(layer: Callable[..., Any], *arguments: Any, selective: bool) -> Any:
    """Call a layer, and again in the backward pass instead of keeping what it computes on the way.

    Args:
        layer: What is called.
        *arguments: With what.
        selective: Whether the results of products and attention are kept, and only what is cheap is computed again.
    """
    options: dict[str, Any] = {"context_fn": _SELECTIVE} if selective else {}
    return checkpoint(layer, *arguments, use_reentrant=False, **options)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_SELECTIVE = partial(create_selective_checkpoint_contexts, _policy)
