"""Soft caps (Bello et al. 2016; Gemma 2): `cap * tanh(x / cap)` on attention scores, or on logits.

Hooks: `attention_fn` (wraps, stage `bias`); `final_forward` (wraps). Parameters: none.
"""

from typing import Any, final

import torch
from torch import Tensor

from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin


@final
class AttentionSoftcapMixin(BaseMixin):
    """Soft-capped attention scores, before any bias and mask."""

    def __init__(self, cap: float) -> None:
        """Set the cap."""
        super().__init__()
        self.cap = cap

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"cap": self.cap}

    @non_conflict(stage="bias")
    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        dropout_fn: Any,
        cross_attention: bool = False,
        *,
        old_impl: Hook,
        **kw_args: Any,
    ) -> Tensor:
        """Hand the cap to the kernel."""
        kw_args["attention_softcap"] = self.cap
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context


@final
class LogitSoftcapMixin(BaseMixin):
    """Soft-capped logits."""

    def __init__(self, cap: float) -> None:
        """Set the cap."""
        super().__init__()
        self.cap = cap

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"cap": self.cap}

    @non_conflict
    def final_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Cap what the head gives."""
        return self.cap * torch.tanh(old_impl(hidden_states, **kw_args) / self.cap)
