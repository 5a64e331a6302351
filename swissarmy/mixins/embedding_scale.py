"""Scaled embeddings (Vaswani et al. 2017; Gemma): word embeddings times a constant, often `sqrt(h)`.

Hooks: `word_embedding_forward` (wraps). Parameters: none.
"""

from typing import Any, Self, final

import torch
from torch import Tensor

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin


@final
class EmbeddingScaleMixin(BaseMixin):
    """Word embeddings times `scale`."""

    def __init__(self, scale: float) -> None:
        """Set the scale."""
        super().__init__()
        self.scale = scale

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"scale": self.scale}

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The square root of the width."""
        return cls(**{"scale": config.hidden_size**0.5, **options})

    @non_conflict
    def word_embedding_forward(self, input_ids: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Scale what was there, `[b, s, h]`; the scale has the precision of the embeddings, as published models do."""
        embedded: Tensor = old_impl(input_ids, **kw_args)
        scale = torch.tensor(self.scale, dtype=torch.float32, device=embedded.device)
        return embedded * scale.to(embedded.dtype)
