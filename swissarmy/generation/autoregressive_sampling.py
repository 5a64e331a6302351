"""`fill_sequence`: a model written for teacher forcing fills the gaps of sequences, one column after another.

Rows of different lengths are shifted so that their first gaps stand in one column: what precedes is one prefill, and
every column after it is generated in one step for all rows. Shapes: b rows, c columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import HookCallError
from swissarmy.generation.strategies import GreedyStrategy, Strategy
from swissarmy.mixins.cache import CachedAutoRegressiveMixin
from swissarmy.nn.kv_cache import KVCache

GAP = -1
"""In a sequence: a token to be generated. In a result: a position after a row's end."""


def fill_sequence(
    model: Model,
    seq: Tensor | Sequence[Tensor],
    batch_size: int = 1,
    *,
    strategy: Strategy | None = None,
    mems: Tensor | None = None,
    **kw_args: Any,
) -> tuple[Tensor, Tensor]:
    """Generate every `-1` in sequences; given tokens stay, wherever they stand.

    Args:
        model: A causal model, or an encoder-decoder (then `input_ids=` is its source and `seq` the target).
        seq: Token ids `[len]` or `[b, len]`, or a list of `[len]` of any lengths; each row begins with a given token.
        batch_size: How many rows to make of a single sequence.
        strategy: Chooses the tokens; greedy when omitted.
        mems: What an earlier call returned, for sequences of one length that begin with the same tokens.
        **kw_args: For the model, in every step.

    Returns:
        Tokens `[b, len]` (int64, -1 after a row's end), and `mems` `[num_layers, b, mem_len, 2 * kv_heads * head_dim]`.

    Raises:
        HookCallError: A row that begins with a gap or is empty, or `mems` that leave no token to go on from.
    """
    strategy = strategy or GreedyStrategy()
    grid = Grid.of(seq, batch_size, model.device)
    tokens, cache = grid.tokens[:, :0], None
    for step in steps(model, grid, strategy, mems=mems, **kw_args):
        tokens, cache = step
    if cache is None:
        raise HookCallError("there is nothing to generate and nothing to read: the sequences are empty.")
    tokens, cache = strategy.finalize(tokens, cache)
    return grid.unshift(tokens), cache.to_mems()


class Grid(NamedTuple):
    """Rows shifted so that their first gaps stand in one column."""

    tokens: Tensor
    """`[b, c]`: ids >= 0 are given, -1 is generated, 0 stands where a row has not begun or is over."""
    shifts: Tensor
    """`[b]`: how many columns each row was shifted."""
    lengths: Tensor
    """`[b]`: how many tokens each row has."""

    @classmethod
    def of(cls, seq: Tensor | Sequence[Tensor], batch_size: int, device: torch.device) -> "Grid":
        """Arrange sequences."""
        rows = [row.to(device) for row in _rows(seq, batch_size)]
        contexts = [_context(row, index) for index, row in enumerate(rows)]
        shifts = [max(contexts) - context for context in contexts]
        width = max(shift + len(row) for shift, row in zip(shifts, rows, strict=True))
        tokens = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        for index, (shift, row) in enumerate(zip(shifts, rows, strict=True)):
            tokens[index, shift : shift + len(row)] = row
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return cls(tokens, torch.tensor(shifts, device=device), lengths)

    @property
    def is_ragged(self) -> bool:
        """Whether some row was shifted."""
        return bool((self.shifts > 0).any())

    def unshift(self, tokens: Tensor) -> Tensor:
        """Tokens `[b, c]` as rows that begin at column 0, -1 after each one's end."""
        result = torch.full((len(tokens), int(self.lengths.max())), GAP, dtype=torch.long, device=tokens.device)
        for index, (shift, length) in enumerate(zip(self.shifts.tolist(), self.lengths.tolist(), strict=True)):
            row = tokens[index, shift : shift + length]
            result[index, : len(row)] = row
        return result

    def where(self, start: int, stop: int) -> dict[str, Tensor]:
        """Positions and padding of columns `start` to `stop`, for the model; nothing when no row was shifted."""
        if not self.is_ragged:
            return {}
        columns = torch.arange(stop, device=self.shifts.device)
        positions = (columns[None, start:] - self.shifts[:, None]).clamp(min=0)
        return {"position_ids": positions, "padding_mask": columns[None] >= self.shifts[:, None]}


def steps(
    model: Model, grid: Grid, strategy: Strategy, *, mems: Tensor | None = None, **kw_args: Any
) -> Iterator[tuple[Tensor, KVCache]]:
    """Yield the tokens so far `[b, c]` and the cache, after each column is chosen."""
    with torch.no_grad():
        decoder, step_kw_args = model.for_decoding(**kw_args)
        decoder = _with_cache(decoder)
        gaps = (grid.tokens == GAP).any(dim=0).nonzero().flatten().tolist()
        cache = _start(decoder, grid, mems, capacity=grid.tokens.shape[1])
        strategy.reset(len(grid.tokens), grid.tokens.device)
        tokens, fed = grid.tokens[:, : gaps[0] if gaps else None], len(cache)
        for index, column in enumerate(gaps):
            if fed >= column:
                raise HookCallError(
                    f"mems hold {fed} positions and the first gap is at {column}: nothing is left to read."
                )
            logits = decoder(
                tokens[:, fed:column], mems=cache, logits_to_keep=1, **grid.where(fed, column), **step_kw_args
            )[0][:, -1]
            fed = column
            grown, cache = strategy.forward(logits, tokens, cache)
            following = grid.tokens[:, column + 1 : gaps[index + 1] if index + 1 < len(gaps) else None]
            given = grid.tokens[:, column]
            chosen = torch.where(given == GAP, grown[:, -1], given)
            tokens = torch.cat((grown[:, :-1], chosen[:, None], following), dim=1)
            yield tokens, cache
            if strategy.is_done:
                return
        if not gaps:
            decoder(tokens[:, fed:], mems=cache, logits_to_keep=1, **grid.where(fed, tokens.shape[1]), **step_kw_args)
            yield tokens, cache


def _rows(seq: Tensor | Sequence[Tensor], batch_size: int) -> list[Tensor]:
    rows = [seq] if isinstance(seq, Tensor) and seq.dim() == 1 else list(seq)
    if len(rows) == 1:
        rows = rows * batch_size
    elif batch_size not in (1, len(rows)):
        raise HookCallError(f"batch_size={batch_size} and {len(rows)} sequences: leave batch_size out for a batch.")
    if not rows or any(row.dim() != 1 for row in rows):
        raise HookCallError("seq is one sequence [len], a batch [b, len], or a list of sequences [len].")
    return rows


def _context(row: Tensor, index: int) -> int:
    """How many given tokens come before the first gap."""
    gaps = (row == GAP).nonzero()
    context = int(gaps[0]) if len(gaps) else len(row)
    if context == 0:
        raise HookCallError(f"row {index} is empty or begins with a gap: give at least one token to go on from.")
    if bool((row < GAP).any()):
        raise HookCallError(f"row {index} holds {int(row.min())}: ids are >= 0, and -1 stands for a gap.")
    return context


def _with_cache(model: BaseModel) -> BaseModel:
    """The model itself if it has a cache mixin, else a view of it that does."""
    if model.find_mixin(CachedAutoRegressiveMixin) is not None:
        return model
    return model.with_mixin("auto-regressive", CachedAutoRegressiveMixin())


def _start(model: BaseModel, grid: Grid, mems: Tensor | None, *, capacity: int) -> KVCache:
    config = model.config
    if mems is None:
        return KVCache(config.num_layers, capacity=capacity)
    if grid.is_ragged:
        raise HookCallError("mems continue sequences whose first gaps stand at one place; these differ.")
    want = (config.num_layers, len(grid.tokens), 2 * config.kv_heads * config.head_size)
    if (mems.shape[0], mems.shape[1], mems.shape[3]) != want:
        raise HookCallError(
            f"mems are {list(mems.shape)}; this model and batch need [{want[0]}, {want[1]}, mem_len, {want[2]}]."
        )
    return KVCache.from_mems(mems, num_key_value_heads=config.kv_heads, capacity=capacity)
