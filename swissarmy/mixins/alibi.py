"""ALiBi (Press et al. 2022): a penalty on attention scores that grows with distance, steeper in some heads.

Hooks: `attention_fn` (wraps, stage `bias`). Parameters: none.
"""

import math
from typing import Any, Self, final

import torch
from torch import Tensor

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.nn.masks import Mask
from swissarmy.nn.position_bias import add_bias, relative_position


@final
class ALiBiMixin(BaseMixin):
    """Attention with linear biases."""

    def __init__(self, num_heads: int) -> None:
        """Set the slope of each head."""
        super().__init__()
        self.slopes = tuple(_slopes(num_heads))

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {}

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's heads."""
        return cls(config.num_attention_heads, **options)

    @non_conflict(stage="bias")
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
        """Add `-slope * distance` to the scores."""
        if not cross_attention:
            distance = relative_position(q.shape[2], k.shape[2] - mask.prefix_length, q.device).abs()
            slopes = torch.tensor(self.slopes, dtype=q.dtype, device=q.device)
            add_bias(kw_args, -slopes[None, :, None, None] * distance, mask)
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context


def _slopes(num_heads: int) -> list[float]:
    """A geometric series; for a number of heads that is no power of two, filled up from the next one's."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes if power == num_heads else slopes + _slopes(2 * power)[::2][: num_heads - power]
