"""Prefix-tuning (Li & Liang 2021; P-tuning v2, Liu et al. 2022): trained keys and values before all others.

Changes: every query of self-attention also sees `prefix_len` trained positions, in each layer.
Hooks: `attention_fn` (wraps, stage `extend`).
Parameters: `layers.{i}.key` and `layers.{i}.value`, `[kv_heads, prefix_len, head_dim]`; heads are dimension 0.
"""

from typing import Any, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.nn.masks import Mask


@final
class Prefix(nn.Module):
    """The trained keys and values of one layer."""

    def __init__(self, num_heads: int, prefix_len: int, head_dim: int) -> None:
        """Start with small random values."""
        super().__init__()
        self.key = nn.Parameter(torch.randn(num_heads, prefix_len, head_dim) * 0.02)
        self.value = nn.Parameter(torch.randn(num_heads, prefix_len, head_dim) * 0.02)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put them before k and v, `[b, kv_heads, t, d]` to `[b, kv_heads, prefix_len + t, d]`."""
        key, value = (part.to(k.dtype).expand(k.shape[0], -1, -1, -1) for part in (self.key, self.value))
        return torch.cat((key, k), dim=2), torch.cat((value, v), dim=2)


@final
class PrefixTuningMixin(BaseMixin):
    """Trained keys and values in front of every layer's own."""

    def __init__(self, num_layers: int, num_key_value_heads: int, head_dim: int, *, prefix_len: int = 16) -> None:
        """Make a prefix of `prefix_len` positions for each layer."""
        super().__init__()
        self.prefix_len = prefix_len
        self.layers = nn.ModuleList(Prefix(num_key_value_heads, prefix_len, head_dim) for _ in range(num_layers))

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's layers and heads."""
        return cls(config.num_layers, config.kv_heads, config.head_size, **options)

    @non_conflict(stage="extend")
    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        dropout_fn: Any,
        cross_attention: bool = False,
        *,
        old_impl: Hook,
        **kw_args: Any,
    ) -> Tensor:
        """Let every query see the prefix."""
        if not cross_attention:
            k, v = self.layers[kw_args["layer_id"]](k, v)
            mask = mask.with_prefix(self.prefix_len)
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context
