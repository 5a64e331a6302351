"""Speculative decoding: guess several tokens, read them in one step, keep those that the strategy would have chosen.

The result is that of the plain strategy, greedy or sampling with a seed, to the rounding of a product with several
rows. In a batch, as many guesses are kept as come true in every row.
Shapes: b rows, n tokens so far.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.core.errors import ConfigError
from swissarmy.generation.autoregressive_sampling import with_cache
from swissarmy.generation.eval_mode import in_eval_mode
from swissarmy.generation.grid import GAP
from swissarmy.generation.strategies import GreedyStrategy, TokenStrategy
from swissarmy.generation.wrapping import WrappingStrategy
from swissarmy.nn.kv_cache import KVCache


class GuessingStrategy(WrappingStrategy):
    """Another strategy, and a way to guess what it will choose; for one of your own, define `propose`."""

    def __init__(self, strategy: TokenStrategy | None = None, *, num_guesses: int) -> None:
        """Set whose choices are guessed, greedy when omitted, and how many at a time.

        Raises:
            ConfigError: A strategy that does not choose one token a row, or no guesses.
        """
        strategy = strategy or GreedyStrategy()
        if not isinstance(strategy, TokenStrategy):
            raise ConfigError(f"{type(strategy).__name__} cannot be guessed: it must choose one token for each row.")
        if num_guesses < 1:
            raise ConfigError(f"num_guesses={num_guesses} must be at least 1.")
        super().__init__(strategy)
        self.num_guesses = num_guesses


@final
class PromptLookupStrategy(GuessingStrategy):
    """Guesses that what followed the last tokens before follows them again (Saxena 2023); for texts that quote."""

    def __init__(self, strategy: TokenStrategy | None = None, *, num_guesses: int = 8, max_ngram: int = 3) -> None:
        """Set what is looked up.

        Args:
            strategy: Whose choices are guessed; greedy when omitted.
            num_guesses: How many tokens are guessed at a time.
            max_ngram: How many last tokens are looked for; fewer, down to one, if they occur nowhere.

        Raises:
            ConfigError: A value below 1.
        """
        super().__init__(strategy, num_guesses=num_guesses)
        if max_ngram < 1:
            raise ConfigError(f"max_ngram={max_ngram} must be at least 1.")
        self.max_ngram = max_ngram

    def propose(self, tokens: Tensor) -> Tensor:
        """What followed the last occurrence of each row's last tokens; as many as every live row has."""
        live = self.strategy.live(tokens).tolist()
        found = [self._followed(row[row >= 0]) if alive else None for row, alive in zip(tokens, live, strict=True)]
        count = min((len(each) for each in found if each is not None), default=0)
        filling = self.end_tokens[0] if self.end_tokens else GAP
        guesses = torch.full((len(tokens), count), filling, dtype=tokens.dtype, device=tokens.device)
        for row, each in zip(guesses, found, strict=True):
            if each is not None:
                row[:] = each[:count]
        return guesses

    def _followed(self, row: Tensor) -> Tensor:
        for size in range(min(self.max_ngram, len(row) - 1), 0, -1):
            places = (row[:-1].unfold(0, size, 1) == row[-size:]).all(dim=-1).nonzero().flatten()
            if len(places):
                start = int(places[-1]) + size
                return row[start : start + self.num_guesses]
        return row[:0]


@final
class SpeculativeStrategy(GuessingStrategy):
    """A smaller model with the same vocabulary guesses, greedily (Leviathan et al. 2023)."""

    def __init__(
        self,
        draft_model: Model,
        strategy: TokenStrategy | None = None,
        *,
        num_guesses: int = 4,
        draft_kw_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Set who guesses.

        Args:
            draft_model: The model that guesses.
            strategy: Whose choices are guessed; greedy when omitted.
            num_guesses: How many tokens are guessed at a time.
            draft_kw_args: For the draft model, in every step; for an encoder-decoder its source, one row for each.

        Raises:
            ConfigError: No guesses.
        """
        super().__init__(strategy, num_guesses=num_guesses)
        self.draft_model, self.draft_kw_args = draft_model, dict(draft_kw_args or {})

    def reset(self, batch_size: int, device: torch.device, gaps: Tensor | None = None) -> None:
        """Begin a new batch: the draft model has read nothing."""
        super().reset(batch_size, device, gaps)
        with in_eval_mode(self.draft_model):
            decoder, self.step_kw_args = self.draft_model.for_decoding(**self.draft_kw_args)
        self.decoder = with_cache(decoder)
        self.cache = KVCache(self.decoder.config.num_layers)
        self.read = torch.zeros(batch_size, 0, dtype=torch.long, device=device)

    def propose(self, tokens: Tensor) -> Tensor:
        """What the draft model would go on with, as far as there are gaps."""
        left = self.num_guesses if self.gaps is None else self.gaps.shape[1] - 1 - tokens.shape[1]
        known = tokens.shape[1]
        for _ in range(min(self.num_guesses, left)):
            tokens = torch.cat((tokens, self._next(tokens)[:, None]), dim=1)
        return tokens[:, known:]

    def _next(self, tokens: Tensor) -> Tensor:
        """The draft model's most likely token of each row, `[b]`; what it has read already is not read again."""
        both = min(self.read.shape[1], tokens.shape[1])
        same = (self.read[:, :both] == tokens[:, :both]).all(dim=0).int().cumprod(dim=0)
        kept = min(int(same.sum()), tokens.shape[1] - 1)
        self.cache.trim(self.read.shape[1] - kept)
        self.read = tokens
        call = dict(self.step_kw_args)
        begins = (tokens >= 0).int().argmax(dim=1, keepdim=True)
        if bool(begins.any()):
            columns = torch.arange(tokens.shape[1], device=tokens.device)[None]
            call["position_ids"] = (columns[:, kept:] - begins).clamp(min=0)
            call["padding_mask"] = columns >= begins
        fed = tokens[:, kept:].clamp(min=0)
        with in_eval_mode(self.draft_model):
            logits: Tensor = self.decoder(fed, mems=self.cache, logits_to_keep=1, **call)[0]
        return logits[:, -1].argmax(dim=-1)
