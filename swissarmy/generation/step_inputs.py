"""`StepInputs`: what a model is told beside the tokens, cut out for each step of a generation.

Shapes: b rows, s tokens fed in a step, k keys (those in the cache, then the s new ones), len a whole sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, final

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel
from swissarmy.core.errors import HookCallError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.generation.grid import Grid
from swissarmy.mixins.learned_positions import LearnedPositionsMixin
from swissarmy.nn.masks import Dense, Mask, SlidingWindow, as_mask
from swissarmy.nn.position_bias import add_bias

MasksAndPositions = Callable[[Tensor], tuple[Any, Tensor | None]]
"""Sequences, as rows `[b, len]` or the one `[len]` that was given, to their mask and position ids."""


@final
class LogAttentionWeightsMixin(BaseMixin):
    """Adds the caller's `log_attention_weights` `[b|1, heads|1, s|1, k]` to the scores of self-attention."""

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
        log_attention_weights: Tensor | None = None,
        **kw_args: Any,
    ) -> Tensor:
        """Hand the weights to the kernel; keys that a prefix put in front get none."""
        if log_attention_weights is not None and not cross_attention:
            add_bias(kw_args, log_attention_weights.to(q.dtype), mask)
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context


@final
@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Positions, masks and weights over whole sequences, and what the caller passes in every step."""

    grid: Grid
    """The rows as they are shifted."""
    visible: Tensor | None = None
    """`[b|1, heads|1, len, len]`: the caller's mask in the rows' own positions; the model's natural one if omitted."""
    position_ids: Tensor | None = None
    """`[b|1, len]` or `[b|1, 2, len]`, in the rows' own positions; counted when omitted."""
    log_attention_weights: Tensor | None = None
    """`[b|1, heads|1, len|1, len|1]`, added to the scores."""
    max_memory_length: int | None = None
    """How many earlier positions each token sees; all when omitted."""
    kw_args: dict[str, Any]
    """What the model is called with in every step."""

    @classmethod
    def of(
        cls,
        grid: Grid,
        kw_args: dict[str, Any],
        *,
        max_memory_length: int | None = None,
        log_attention_weights: Tensor | None = None,
        get_masks_and_position_ids: MasksAndPositions | None = None,
        seq: Tensor | None = None,
    ) -> "StepInputs":
        """Check what the caller gave, and bring it to full shape.

        Raises:
            HookCallError: A memory of no positions, or a tensor that does not cover the sequences.
        """
        if max_memory_length is not None and max_memory_length < 1:
            raise HookCallError(f"max_memory_length={max_memory_length} must be at least 1; leave it out for no limit.")
        taken = {"attention_mask", "position_ids", "padding_mask"} & set(kw_args)
        if taken:
            raise HookCallError(f"{min(taken)} belongs to one step: give get_masks_and_position_ids for all of them.")
        length = int(grid.lengths.max())
        mask = position_ids = None
        if get_masks_and_position_ids is not None:
            mask, position_ids = get_masks_and_position_ids(grid.unshift(grid.tokens) if seq is None else seq)
        return cls(
            grid=grid,
            visible=None if mask is None else _visible(mask, length, grid),
            position_ids=None if position_ids is None else _positions(position_ids, length, grid),
            log_attention_weights=_weights(log_attention_weights, length, grid),
            max_memory_length=max_memory_length,
            kw_args=kw_args,
        )

    def repeated(self, times: int) -> "StepInputs":
        """The same for each row `times` times, one after the other."""
        rows = len(self.grid.tokens)
        changes = {field.name: repeated(getattr(self, field.name), times, rows) for field in fields(self)}
        return replace(self, **{**changes, "grid": self.grid.repeated(times)})

    def at(self, model: BaseModel, start: int, stop: int, remembered: int) -> dict[str, Any]:
        """What the model is called with when columns `start` to `stop` are fed after `remembered` positions."""
        first = start - remembered
        call = dict(self.kw_args)
        if self.position_ids is not None:
            call["position_ids"] = self._picked_positions(start, stop)
        elif self.grid.is_ragged or self.max_memory_length is not None:
            call["position_ids"] = self.grid.positions(start, stop) + model.first_position
            _check_length(model, call["position_ids"])
        if self.grid.is_ragged:
            columns = torch.arange(first, stop, device=self.grid.shifts.device)
            call["padding_mask"] = columns[None] >= self.grid.shifts[:, None]
        mask = self._mask(start, stop, first)
        if mask is not None:
            call["attention_mask"] = mask
        if self.log_attention_weights is not None:
            call["log_attention_weights"] = self._picked(self.log_attention_weights, start, stop, first)
        return call

    def _mask(self, start: int, stop: int, first: int) -> Mask | None:
        window = None if self.max_memory_length is None else self.max_memory_length + 1
        if self.visible is None:
            return None if window is None else SlidingWindow(window)
        visible = self._picked(self.visible, start, stop, first)
        if window is not None:
            columns = torch.arange(first, stop, device=visible.device)
            visible = visible & (columns[None] > columns[start - first :, None] - window)
        return Dense(visible.expand(-1, -1, stop - start, stop - first))

    def _picked_positions(self, start: int, stop: int) -> Tensor:
        assert self.position_ids is not None
        if not self.grid.is_ragged:
            return self.position_ids[..., start:stop]
        index = self.grid.positions(start, stop)
        given = self.position_ids.expand(len(index), *self.position_ids.shape[1:])
        return given.gather(-1, index if given.dim() == 2 else index[:, None].expand(-1, given.shape[1], -1))

    def _picked(self, table: Tensor, start: int, stop: int, first: int) -> Tensor:
        """From a table over whole rows, queries `start` to `stop` and keys `first` to `stop`: `[b|1, h, s|1, k|1]`."""
        if not self.grid.is_ragged:
            table = table[:, :, start:stop] if table.shape[2] > 1 else table
            return table[..., first:stop] if table.shape[3] > 1 else table
        queries, keys = self.grid.positions(start, stop), self.grid.positions(first, stop)
        queries, keys = queries.clamp(max=table.shape[2] - 1), keys.clamp(max=table.shape[3] - 1)
        rows = torch.arange(len(queries), device=table.device)[:, None, None]
        by_row = table.expand(len(queries), -1, -1, -1).permute(0, 2, 3, 1)
        return by_row[rows, queries[:, :, None], keys[:, None, :]].permute(0, 3, 1, 2)


def repeated(value: Any, times: int, rows: int) -> Any:
    """A keyword's tensors and masks with each of `rows` rows `times` times; what is the same for all rows stays."""
    if isinstance(value, Tensor):
        return value.repeat_interleave(times, dim=0) if value.dim() and len(value) == rows else value
    if isinstance(value, Mask):
        changed = {field.name: repeated(getattr(value, field.name), times, rows) for field in fields(value)}
        return replace(value, **changed)
    if isinstance(value, dict):
        return {key: repeated(each, times, rows) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(repeated(each, times, rows) for each in value)
    return value


def _visible(mask: Any, length: int, grid: Grid) -> Tensor:
    visible = as_mask(mask).dense(length, length, grid.tokens.device)
    if len(visible) not in (1, len(grid.tokens)):
        raise HookCallError(
            f"get_masks_and_position_ids gave a mask for {len(visible)} rows, and there are {len(grid.tokens)}."
        )
    return visible


def _positions(position_ids: Tensor, length: int, grid: Grid) -> Tensor:
    given = position_ids.to(grid.tokens.device)
    given = given[None] if given.dim() == 1 else given
    if given.dim() not in (2, 3) or len(given) not in (1, len(grid.tokens)) or given.shape[-1] != length:
        raise HookCallError(
            f"get_masks_and_position_ids gave position_ids {list(position_ids.shape)} for {len(grid.tokens)} rows of "
            f"{length}: they are [b, len], or [b, 2, len] for two rows of positions."
        )
    return given


def _weights(weights: Tensor | None, length: int, grid: Grid) -> Tensor | None:
    if weights is None:
        return None
    table = weights.to(grid.tokens.device)
    table = table[(None,) * (4 - table.dim())]
    if table.dim() != 4 or len(table) not in (1, len(grid.tokens)) or {*table.shape[2:]} - {1, length}:
        raise HookCallError(
            f"log_attention_weights are {list(weights.shape)}; they broadcast to [b, heads, len, len], with "
            f"b={len(grid.tokens)} and len={length}, the gaps counted."
        )
    return table


def _check_length(model: BaseModel, position_ids: Tensor) -> None:
    """Positions that are given are rows of a table; without this check, one too many is a bare index error."""
    name = model.find_mixin(LearnedPositionsMixin)
    if name is None:
        return
    mixin = model.get_mixin(name)
    assert isinstance(mixin, LearnedPositionsMixin)
    longest, needed = mixin.table.num_embeddings, model.positions_before + int(position_ids.max()) + 1
    if needed > longest:
        raise HookCallError(f"{needed} tokens, and the model has {longest} positions: shorten the input.")
