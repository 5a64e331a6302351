"""Rows of tokens without those to be ignored, moved to the left: padding anywhere then changes nothing.

Shapes: b rows, c columns as they were given, s tokens of the longest row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from swissarmy.core.errors import HookCallError
from swissarmy.nn.masks import Causal, Dense, Full, Mask, SlidingWindow, as_mask

SKIPPED = -1
"""In targets: nothing is scored here."""

Rows = Tensor | Sequence[Tensor]
"""`[c]`, `[b, c]`, or a list of rows of any lengths."""


def grid_of(rows: Rows, *, fill: int) -> Tensor:
    """Rows as `[b, c]`, with `fill` after the shorter ones of a list.

    Raises:
        HookCallError: They have other dimensions, or there are none.
    """
    if isinstance(rows, Tensor):
        if rows.dim() not in (1, 2):
            raise HookCallError(f"tokens and loss_mask are [s] or [b, s]; this is {list(rows.shape)}.")
        return rows if rows.dim() == 2 else rows[None]
    if not rows or any(row.dim() != 1 for row in rows):
        raise HookCallError("a list of rows holds tensors [s], at least one.")
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


class PackedRows(NamedTuple):
    """Rows without their ignored tokens, and the way back."""

    tokens: Tensor
    """`[b, s]`: ids, and 0 after a row's end."""
    scored: Tensor
    """`[b, s]`: which tokens count."""
    real: Tensor
    """`[b, s]`: which are tokens of the row."""
    order: Tensor
    """`[b, s]`: the column that each had before."""
    num_columns: int
    """c."""

    @classmethod
    def of(cls, grid: Tensor, counted: Tensor) -> Self:
        """Move the tokens of each row to its beginning, and cut off the columns that no row needs.

        Args:
            grid: `[b, c]`, ignored where it is below 0.
            counted: `[b or 1, c]`, 0 = not to be scored.

        Raises:
            HookCallError: The shapes do not match.
        """
        if counted.shape[1] != grid.shape[1] or len(counted) not in (1, len(grid)):
            raise HookCallError(f"loss_mask is {list(counted.shape)}, tokens are {list(grid.shape)}: they must match.")
        longest = int((grid >= 0).sum(dim=1).max()) if grid.numel() else 0
        order = (grid < 0).int().argsort(dim=1, stable=True)[:, :longest]
        tokens = grid.gather(1, order).long()
        real = tokens >= 0
        scored = real & counted.expand_as(grid).gather(1, order).bool()
        return cls(tokens.clamp(min=0), scored, real, order, grid.shape[1])

    @property
    def targets(self) -> Tensor:
        """What each position is to predict, `[b, s]`; `SKIPPED` where that does not count."""
        following = torch.where(self.scored[:, 1:], self.tokens[:, 1:], SKIPPED)
        return F.pad(following, (0, 1), value=SKIPPED) if self.tokens.shape[1] else following

    def unpack(self, losses: Tensor) -> Tensor:
        """From what each position's prediction cost, `[b, s]`, what each token cost, where it stood: `[b, c]`."""
        own = F.pad(losses[:, :-1], (1, 0)) * self.real
        return own.new_zeros(len(own), self.num_columns).scatter(1, self.order, own)

    def where(self, attention_mask: Mask | Tensor | int | None, position_ids: Tensor | None) -> dict[str, Any]:
        """Mask, positions `[..., c]` and padding of the packed rows, for a model; nothing where its own will do."""
        result: dict[str, Any] = {}
        if position_ids is not None:
            result["position_ids"] = self._moved(position_ids)
        if attention_mask is not None:
            mask = as_mask(attention_mask)
            result["attention_mask"] = mask if self._fits(mask) else self._moved_mask(mask)
            if not bool(self.real.all()):
                result["padding_mask"] = self.real
        return result

    def _moved(self, position_ids: Tensor) -> Tensor:
        positions = position_ids.to(self.order.device)
        positions = positions[None] if positions.dim() == 1 else positions
        if positions.shape[-1] != self.num_columns:
            raise HookCallError(
                f"position_ids are {list(position_ids.shape)} for {self.num_columns} columns of tokens."
            )
        b, s = self.order.shape
        index = self.order.reshape(b, *[1] * (positions.dim() - 2), s).expand(b, *positions.shape[1:-1], s)
        return positions.expand(b, *positions.shape[1:]).gather(-1, index)

    def _fits(self, mask: Mask) -> bool:
        """Whether a mask says of the packed rows what it said of the given ones."""
        if isinstance(mask, Causal | Full | SlidingWindow):
            return True
        in_place = torch.arange(self.num_columns, device=self.order.device).expand(len(self.order), -1)
        return torch.equal(self.order, in_place)

    def _moved_mask(self, mask: Mask) -> Mask:
        b, s = self.order.shape
        dense = mask.dense(self.num_columns, self.num_columns, self.order.device)
        dense = dense.expand(b, *dense.shape[1:])
        rows = dense.gather(2, self.order[:, None, :, None].expand(b, dense.shape[1], s, self.num_columns))
        return Dense(rows.gather(3, self.order[:, None, None, :].expand(b, dense.shape[1], s, s)))
