"""QK-norm (Henry et al. 2020; Gemma 3, Qwen 3): normalises each head's query and key.

Hooks: `attention_fn` (wraps, stage `transform`). Parameters: `layers.{i}.query.weight` and `.key.weight`, `[head_dim]`.
Add it after a `RotaryMixin`: the wrapper added last acts first, and the norm comes before the rotation.
"""

from typing import Any, Self, final

from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.nn.norms import Norm, make_norm


@final
class QKNorm(nn.Module):
    """The two norms of one layer."""

    def __init__(self, head_dim: int, kind: Norm, eps: float) -> None:
        """Make a norm for queries and one for keys."""
        super().__init__()
        self.query = make_norm(kind, head_dim, eps)
        self.key = make_norm(kind, head_dim, eps)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise q `[b, heads, s, d]` and k `[b, kv_heads, s, d]` over `d`."""
        return self.query(q), self.key(k)


@final
class QKNormMixin(BaseMixin):
    """Normalised queries and keys in every layer."""

    def __init__(self, num_layers: int, head_dim: int, *, kind: Norm = "rms", eps: float = 1e-6) -> None:
        """Make the norms of every layer."""
        super().__init__()
        self.kind, self.eps = kind, eps
        self.layers = nn.ModuleList(QKNorm(head_dim, kind, eps) for _ in range(num_layers))

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"kind": self.kind, "eps": self.eps}

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's layers, heads and epsilon."""
        return cls(config.num_layers, config.head_size, **{"eps": config.norm_epsilon, **options})

    @non_conflict(stage="transform")
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
        """Normalise q and k of self-attention."""
        if not cross_attention:
            q, k = self.layers[kw_args["layer_id"]](q, k)
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context
