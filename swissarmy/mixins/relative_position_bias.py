"""T5's relative position bias (Raffel et al. 2020): a trained number per head and bucket of distance.

Changes: adds to the scores of self-attention; the same table serves all layers.
Hooks: `attention_fn` (wraps, stage `bias`). Parameters: `table.weight` `[buckets, heads]`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self, final

from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin, SharedDim
from swissarmy.nn.masks import Mask
from swissarmy.nn.position_bias import add_bias, relative_position, relative_position_bucket


@final
class RelativePositionBiasMixin(BaseMixin):
    """Bucketed distances, each with a bias per head."""

    shared_dims: ClassVar[Mapping[str, SharedDim]] = {"table.weight": SharedDim(1, "heads")}

    def __init__(
        self, num_heads: int, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
    ) -> None:
        """Make the table.

        Args:
            num_heads: How many heads have a bias of their own.
            num_buckets: How many distances are told apart.
            max_distance: From here on, all distances share the last bucket.
            bidirectional: Whether keys after the query have buckets too.
        """
        super().__init__()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.table = nn.Embedding(num_buckets, num_heads)
        nn.init.normal_(self.table.weight, std=0.02)

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "bidirectional": self.bidirectional,
        }

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's heads; both directions where it is not causal."""
        return cls(config.num_attention_heads, **{"bidirectional": not config.causal, **options})

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
        """Add the bias of each distance to the scores."""
        if not cross_attention:
            distance = relative_position(q.shape[2], k.shape[2] - mask.prefix_length, q.device)
            buckets = relative_position_bucket(distance, self.num_buckets, self.max_distance, self.bidirectional)
            add_bias(kw_args, self.table(buckets).permute(2, 0, 1)[None], mask)
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context
