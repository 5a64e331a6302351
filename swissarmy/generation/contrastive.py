"""Contrastive search (Su et al. 2022): a likely token that does not repeat what the text already says.

Of the k most likely tokens v the one with the highest

    (1 - alpha) * p(v) - alpha * max over earlier tokens x of cos(h(v), h(x))

is chosen, h being the last hidden state after the final norm, of v when it is read at its place. All k are read in one
step, as k rows that differ in their last token: the choice among them falls when their hidden states are there, and
the row that wins is continued with k tokens in turn.
Shapes: b rows, k candidates of each, n tokens so far, s columns read in a step, h hidden size.
"""

from collections.abc import Iterable
from typing import Any, Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.backbone.model import BaseModel
from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.generation.grid import GAP
from swissarmy.generation.strategies import Strategy, StrategyOptions, check_logits
from swissarmy.nn.kv_cache import KVCache

_NEVER = float("-inf")


@final
class LastHiddenStatesMixin(BaseMixin):
    """Keeps, for one run, what the model made of every position it read in the last step.

    Hooks: `layer_forward` (wraps). Parameters: none.
    """

    def __init__(self) -> None:
        """Nothing was read yet."""
        super().__init__()
        self.read: Tensor | None = None

    @non_conflict
    def layer_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Run the layer; the last one's output, normalised as for the head, is kept: `[b, s, h]`."""
        result: Tensor = old_impl(hidden_states, mask, **kw_args)
        transformer = kw_args["transformer"]
        if kw_args["layer_id"] == transformer.config.num_layers - 1:
            norm: nn.Module | None = transformer.final_norm
            self.read = result if norm is None else norm(result)
        return result

    def take(self) -> Tensor | None:
        """What was read since this was last asked, `[b, s, h]`."""
        read, self.read = self.read, None
        return read


@final
class ContrastiveStrategy(Strategy):
    """Contrastive search. It reads the last token too, so all tokens together must fit the model's maximum length."""

    def __init__(
        self,
        penalty_alpha: float = 0.6,
        top_k: int = 4,
        *,
        end_tokens: Iterable[int] = (),
        **options: Unpack[StrategyOptions],
    ) -> None:
        """Set what weighs how much.

        Args:
            penalty_alpha: Between 0, greedy, and 1, as unlike the text before as the candidates allow.
            top_k: How many candidates each token has; 1 is greedy.
            end_tokens: Tokens that end a row.
            **options: As for every strategy, see `StrategyOptions`; probabilities are those after the processors.

        Raises:
            ConfigError: A value outside its range.
        """
        super().__init__(end_tokens, **options)
        if not 0 <= penalty_alpha <= 1:
            raise ConfigError(f"penalty_alpha={penalty_alpha} must be between 0 and 1.")
        if top_k < 1:
            raise ConfigError(f"top_k={top_k} must be at least 1.")
        self.penalty_alpha, self.top_k = penalty_alpha, top_k

    def attach(self, decoder: BaseModel) -> BaseModel:
        """The decoder with a mixin that keeps its last hidden states."""
        self.hidden_states = LastHiddenStatesMixin()
        return decoder.with_mixin("contrastive-hidden-states", self.hidden_states)

    def reset(self, batch_size: int, device: torch.device, gaps: Tensor | None = None) -> None:
        """Begin a new batch."""
        super().reset(batch_size, device, gaps)
        self.rows = torch.arange(batch_size, device=device)
        self.context: Tensor | None = None  # [b, n, h], of length 1, of every token that is settled
        self.probabilities: Tensor | None = None  # [b, k], of the candidates that are being read
        self.choosing = torch.zeros(batch_size, dtype=torch.bool, device=device)

    @property
    def reads_last_column(self) -> bool:
        """The choice among the last candidates depends on it."""
        return True

    def forward(self, logits: Tensor, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """Settle the last column of tokens `[b * k, n]` (at first `[b, n]`), and put k candidates after it."""
        kept = self._settle(tokens)
        logits, tokens, column = logits[kept], tokens[kept], tokens.shape[1]
        live = self.live(tokens)
        check_logits(logits, live, column)
        processed = self.process(logits, tokens)
        check_logits(processed, live, column)
        scores, candidates = processed.topk(min(self.top_k, processed.shape[1]), dim=-1)
        self.probabilities = processed.softmax(dim=-1).gather(1, candidates)
        self.ruled_out, self.choosing = torch.isneginf(scores), live
        if self.end_tokens and self.ended is not None:
            candidates = torch.where(self.ended[:, None], self.end_tokens[0], candidates)
        order = kept.repeat_interleave(candidates.shape[1])
        mems.reorder(order)
        repeated = tokens.repeat_interleave(candidates.shape[1], dim=0)
        return torch.cat((repeated, candidates.view(-1, 1)), dim=1), mems

    def finalize(self, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """The rows `[b, n]`; candidates that were not read, because the run was cut short, are left out."""
        if self.probabilities is None:  # there was nothing to choose
            return tokens, mems
        if self.hidden_states.read is not None:
            surplus = self.hidden_states.read.shape[1]
            kept = self._settle(tokens)
            mems.trim(surplus)
        else:
            each = self.probabilities.shape[1]
            kept = self.rows * each
            last = tokens[:, -1].view(-1, each)
            agreed = (last == last[:, :1]).all(dim=1).repeat_interleave(each)
            tokens = torch.cat((tokens[:, :-1], torch.where(agreed, tokens[:, -1], GAP)[:, None]), dim=1)
        mems.reorder(kept)
        return tokens[kept], mems

    def _settle(self, tokens: Tensor) -> Tensor:
        """Choose among the candidates that were read last: which of the rows of tokens `[b * k, n]` stay, `[b]`."""
        read = self.hidden_states.take()
        assert read is not None
        directions = F.normalize(read.float() if read.dtype != torch.float64 else read, dim=-1)
        if self.probabilities is None or self.context is None:
            if read.shape[1] != tokens.shape[1]:
                raise HookCallError(
                    "contrastive search compares each token with the hidden states of all before it, and mems do not "
                    "hold them: leave mems out."
                )
            self.context = directions
            return self.rows
        known, candidates = self.context.shape[1], self.probabilities.shape[1]
        similarity = directions[:, 0].view(-1, candidates, directions.shape[2]) @ self.context.transpose(1, 2)
        real = tokens[self.rows * candidates, :known] >= 0
        degeneration = similarity.masked_fill(~real[:, None], _NEVER).amax(dim=-1)
        scores = (1 - self.penalty_alpha) * self.probabilities - self.penalty_alpha * degeneration
        scores = scores.masked_fill(self.ruled_out, _NEVER)
        check_logits(scores, self.choosing, known)
        kept = self.rows * candidates + torch.where(self.choosing, scores.argmax(dim=-1), 0)
        self.context = torch.cat((self.context, directions[kept]), dim=1)
        self._note_ends(tokens[kept, known], self.choosing)
        return kept
