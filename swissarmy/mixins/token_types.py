"""Token types (Devlin et al. 2019): which of several segments a token belongs to.

Changes: adds a trained vector for each token's type to its embedding, with that of its position.
Hooks: `position_embedding_forward` (wraps); reads `token_type_ids` `[b, s]`. Parameters: `table.weight` `[types, h]`.
"""

from typing import Any, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin


@final
class TokenTypesMixin(BaseMixin):
    """A table of type vectors; every token is of type 0 unless `token_type_ids` says otherwise."""

    def __init__(self, num_types: int, hidden_size: int) -> None:
        """Make the table."""
        super().__init__()
        self.table = nn.Embedding(num_types, hidden_size)
        nn.init.normal_(self.table.weight, std=0.02)

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"num_types": self.table.num_embeddings}

    @classmethod
    def for_config(cls, config: TransformerConfig, *, num_types: int = 2, **options: Any) -> Self:
        """Two types, in the model's width."""
        return cls(num_types, config.hidden_size, **options)

    @non_conflict
    def position_embedding_forward(
        self, position_ids: Tensor, *, old_impl: Hook, token_type_ids: Tensor | None = None, **kw_args: Any
    ) -> Tensor:
        """Add the types' vectors to those of the positions, `[b or 1, s, h]`."""
        positions: Tensor | None = old_impl(position_ids, token_type_ids=token_type_ids, **kw_args)
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, position_ids.shape[-1], dtype=torch.long, device=position_ids.device)
        types: Tensor = self.table(token_type_ids)
        return types if positions is None else positions + types
