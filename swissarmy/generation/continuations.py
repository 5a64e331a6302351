"""`score_continuations`: how likely texts are after their contexts; a context that several share is read once.

Two steps: contexts that are shared are read into the cache, which is then dealt to the rows; the rows read what is
left of the context and their continuation, and only there logits are made. Rows are shifted so that the second step
begins in one column. Shapes: b rows, u different contexts, c columns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import HookCallError
from swissarmy.generation.autoregressive_sampling import with_cache
from swissarmy.generation.eval_mode import in_eval_mode
from swissarmy.generation.grid import Grid
from swissarmy.generation.packed_rows import SKIPPED
from swissarmy.generation.perplexity import TOKENS_AT_ONCE
from swissarmy.generation.step_inputs import StepInputs
from swissarmy.generation.target_scores import TargetScores, TargetScoresMixin, check_predicts, scores_of_targets
from swissarmy.nn.kv_cache import KVCache


class ContinuationScore(NamedTuple):
    """How likely a continuation is."""

    logprob: float
    """The log-probability of all its tokens together, in nats."""
    is_greedy: bool
    """Whether the likeliest token, taken every time, gives just this continuation."""


@torch.no_grad()
def score_continuations(
    model: Model, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], **kw_args: Any
) -> list[ContinuationScore]:
    """Score each continuation after its context, all as one batch.

    Args:
        model: A causal model. One in training mode is in evaluation mode meanwhile.
        contexts: For each row the ids that come before, one at least; of any lengths. Where several rows have the same
            context, it is read once.
        continuations: For each row the ids to score; none have probability 1.
        **kw_args: For the model.

    Raises:
        HookCallError: A row without context, a model that does not predict the next token, or a row longer than it
            takes.
    """
    if not isinstance(model, BaseModel):
        raise HookCallError("continuations are scored under a causal model; this one answers a source text.")
    if not contexts or not all(map(len, contexts)) or len(contexts) != len(continuations):
        raise HookCallError(
            f"{len(contexts)} contexts and {len(continuations)} continuations: there must be a context for each, of at "
            "least one token, and at least one row."
        )
    check_predicts(model)
    decoder = with_cache(model).with_mixin("target-scores", TargetScoresMixin())
    rows = _Rows(list(map(tuple, contexts)), list(map(tuple, continuations)), model.device)
    reader = _Reader(decoder, KVCache(model.config.num_layers, capacity=rows.width), kw_args)
    with in_eval_mode(model):
        if rows.start:
            reader.read(rows.shared(), 0, rows.start)
            reader.cache.reorder(rows.owner)
        scores = reader.read(rows.whole(), rows.start, rows.width, rows.targets())
    logprobs, is_greedy = -scores.losses.sum(dim=1, dtype=torch.float64), scores.is_likeliest.all(dim=1)
    return list(map(ContinuationScore, logprobs.tolist(), is_greedy.tolist()))


class _Rows:
    """Contexts and continuations as columns of ids."""

    def __init__(self, contexts: list[tuple[int, ...]], continuations: list[tuple[int, ...]], device: torch.device):
        self.contexts, self.continuations, self.device = contexts, continuations, device
        self.different = {context: place for place, context in enumerate(dict.fromkeys(contexts))}
        is_shared = len(self.different) < len(contexts)  # else one step does, in which no row is shifted
        self.read_before = [len(context) - 1 if is_shared else 0 for context in contexts]
        self.start = max(self.read_before)
        """The column that the second step begins with."""
        self.read = [(*context, *more)[:-1] for context, more in zip(contexts, continuations, strict=True)]
        self.width = max(len(row) + self.start - cut for row, cut in zip(self.read, self.read_before, strict=True))

    @property
    def owner(self) -> Tensor:
        """`[b]`: the place of each row's context among the different ones."""
        return torch.tensor([self.different[context] for context in self.contexts], device=self.device)

    def shared(self) -> Grid:
        """`[u, start]`: each different context but for its last token."""
        rows = [context[:-1] for context in self.different]
        return self._grid(rows, [self.start - len(row) for row in rows], self.start)

    def whole(self) -> Grid:
        """`[b, c]`: all that is read of each row."""
        return self._grid(self.read, [self.start - cut for cut in self.read_before], self.width)

    def targets(self) -> Tensor:
        """`[b, c - start]`: what the columns of the second step are to predict."""
        targets = torch.full((len(self.read), self.width - self.start), SKIPPED)
        places = zip(targets, self.contexts, self.continuations, self.read_before, strict=True)
        for target, context, continuation, cut in places:
            first = len(context) - 1 - cut
            target[first : first + len(continuation)] = torch.tensor(continuation, dtype=torch.long)
        return targets.to(self.device)

    def _grid(self, rows: Sequence[Sequence[int]], shifts: Sequence[int], width: int) -> Grid:
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for place, shift, row in zip(tokens, shifts, rows, strict=True):
            place[shift : shift + len(row)] = torch.tensor(row, dtype=torch.long)
        lengths = torch.tensor([max(len(row), 1) for row in rows])  # a row of padding alone has a position too
        return Grid(*(part.to(self.device) for part in (tokens, torch.tensor(shifts), lengths)))


class _Reader(NamedTuple):
    """A model, and what it remembers."""

    decoder: BaseModel
    cache: KVCache
    kw_args: dict[str, Any]

    def read(self, grid: Grid, start: int, stop: int, targets: Tensor | None = None) -> TargetScores:
        """Read columns, so many at a time; what they predict is scored where a target is."""
        if targets is None:
            targets = grid.tokens.new_full((len(grid.tokens), stop - start), SKIPPED)
        inputs = StepInputs.of(grid, self.kw_args)
        parts = []
        for first in range(start, stop, TOKENS_AT_ONCE):
            last = min(first + TOKENS_AT_ONCE, stop)
            call = inputs.at(self.decoder, first, last, len(self.cache))
            wanted = targets[:, first - start : last - start]
            parts.append(scores_of_targets(self.decoder, grid.tokens[:, first:last], wanted, mems=self.cache, **call))
        return TargetScores(*(torch.cat(each, dim=1) for each in zip(*parts, strict=True)))
