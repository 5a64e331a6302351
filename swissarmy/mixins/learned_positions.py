"""Learned absolute positions (Gehring et al. 2017; GPT-2, BERT).

Changes: adds a trained vector for each position to the word embeddings.
Hooks: `position_embedding_forward` (replaces). Parameters: `table.weight` `[num_positions, h]`.
"""

from typing import Any, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.errors import HookCallError
from swissarmy.core.mixin import BaseMixin


@final
class LearnedPositionsMixin(BaseMixin):
    """A table of position vectors."""

    def __init__(self, num_positions: int, hidden_size: int, *, padding_id: int | None = None) -> None:
        """Make the table.

        Args:
            num_positions: How many rows it has.
            hidden_size: The width of a row.
            padding_id: RoBERTa's way of counting: only tokens other than this one are counted, from
                `padding_id + 1` on, unless the caller gives positions, which then are rows of the table.
        """
        super().__init__()
        self.padding_id = padding_id
        self.table = nn.Embedding(num_positions, hidden_size, padding_id)
        nn.init.normal_(self.table.weight, std=0.02)

    @property
    def first_position(self) -> int:
        """The position of a row's first token, as callers count: RoBERTa's begin after the padding token's row."""
        return 0 if self.padding_id is None else self.padding_id + 1

    @property
    def longest(self) -> int:
        """How many positions there are for tokens."""
        return self.table.num_embeddings - self.first_position

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """A row for each position up to the model's maximum length."""
        sizes = {"num_positions": config.max_sequence_length, "hidden_size": config.hidden_size}
        return cls(**{**sizes, **options})

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"num_positions": self.table.num_embeddings, "padding_id": self.padding_id}

    def position_embedding_forward(self, position_ids: Tensor, **kw_args: Any) -> Tensor:
        """`[b or 1, s]` to `[b or 1, s, h]`."""
        if self.padding_id is not None and kw_args["given_position_ids"] is None:
            position_ids = self._counted(position_ids, **kw_args)
        if kw_args["given_position_ids"] is None:
            remembered = 0 if kw_args["mems"] is None else len(kw_args["mems"])
            self._check_length(kw_args["positions_before"] + remembered + position_ids.shape[-1])
        try:
            positions: Tensor = self.table(position_ids)
        except IndexError:  # on a CPU
            raise HookCallError(
                f"a position {int(position_ids.max())}, and the last of the table is {self.table.num_embeddings - 1}: "
                "shorten the input."
            ) from None
        return positions

    def _check_length(self, length: int) -> None:
        if length > self.longest:
            raise HookCallError(f"{length} tokens, and the model has {self.longest} positions: shorten the input.")

    def _counted(
        self,
        position_ids: Tensor,
        *,
        input_ids: Tensor | None,
        padding_mask: Tensor | None,
        positions_before: int,
        **kw_args: Any,
    ) -> Tensor:
        """Rows for the real tokens of this call, after those that a cache remembers."""
        assert self.padding_id is not None
        if input_ids is None:
            return position_ids + self.first_position
        before = position_ids[:, :1]
        if padding_mask is not None:
            before = padding_mask[:, : -input_ids.shape[1]].long().sum(dim=1, keepdim=True) + positions_before
        real = (input_ids != self.padding_id).long()
        return (before + torch.cumsum(real, dim=1)) * real + self.padding_id
