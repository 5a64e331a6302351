"""`Grid`: sequences to be filled, arranged so that their first gaps stand in one column.

Shapes: b rows, c columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swissarmy.core.errors import HookCallError

GAP = -1
"""In a sequence: a token to be generated. In a result: a position after a row's end."""


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
        rows = [row.to(device) for row in as_rows(seq, batch_size)]
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

    @property
    def gaps(self) -> Tensor:
        """`[b, c]`: which tokens are to be generated."""
        return self.tokens == GAP

    @property
    def known(self) -> Tensor:
        """`[b, c]`: the given tokens, -1 where none is given: in gaps, before a row begins and after it is over."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None] - self.shifts[:, None]
        return torch.where((columns >= 0) & (columns < self.lengths[:, None]), self.tokens, GAP)

    def repeated(self, times: int) -> "Grid":
        """Each row `times` times, one after the other."""
        return Grid(*(part.repeat_interleave(times, dim=0) for part in self))

    def positions(self, start: int, stop: int) -> Tensor:
        """Where in its row each of the columns `start` to `stop` stands, `[b, stop - start]`; within the row."""
        columns = torch.arange(start, stop, device=self.shifts.device)[None] - self.shifts[:, None]
        return columns.clamp(min=0).minimum(self.lengths[:, None] - 1)

    def unshift(self, tokens: Tensor) -> Tensor:
        """Tokens `[b, c]` as rows that begin at column 0, -1 after each one's end."""
        result = torch.full((len(tokens), int(self.lengths.max())), GAP, dtype=torch.long, device=tokens.device)
        for index, (shift, length) in enumerate(zip(self.shifts.tolist(), self.lengths.tolist(), strict=True)):
            row = tokens[index, shift : shift + length]
            result[index, : len(row)] = row
        return result


def rows_of_padded(seq: Tensor | Sequence[Tensor], padding_mask: Tensor) -> list[Tensor]:
    """The rows of `seq` `[b, c]` without their padding; `padding_mask` `[b, c]` is 1 where a token or gap is real."""
    if not isinstance(seq, Tensor) or seq.shape != padding_mask.shape:
        raise HookCallError(
            f"padding_mask is {list(padding_mask.shape)}: it has seq's shape [b, len], and is 1 at tokens and gaps."
        )
    return [row[real.bool().to(row.device)] for row, real in zip(seq, padding_mask, strict=True)]


def put_back(tokens: Tensor, seq: Tensor, padding_mask: Tensor) -> Tensor:
    """Filled rows `[n * b, len]` at the places where `padding_mask` is 1; the padding of `seq` `[b, c]` stays."""
    times = len(tokens) // len(seq)
    result = seq.to(tokens.device).repeat_interleave(times, dim=0)
    real = padding_mask.bool().to(tokens.device).repeat_interleave(times, dim=0)
    for row, place, filled in zip(result, real, tokens, strict=True):
        row[place] = filled[: int(place.sum())]
    return result


def as_rows(seq: Tensor | Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Sequences as a list of `[len]`; a single one `batch_size` times.

    Raises:
        HookCallError: They have other dimensions, or there are none.
    """
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
