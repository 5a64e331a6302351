"""Strategies: how the next token of each row is chosen.

Shapes: b rows, n tokens so far.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Self, final

import torch
from torch import Tensor

from swissarmy.core.errors import HookCallError
from swissarmy.generation.processors import LogitsProcessor, temperature, top_k, top_p
from swissarmy.nn.kv_cache import KVCache


class Strategy(ABC):
    """Chooses tokens one column at a time; after an end token a row only repeats it."""

    def __init__(self, end_tokens: Iterable[int] = ()) -> None:
        """Set the tokens that end a row."""
        self.end_tokens = tuple(end_tokens)
        self.ended: Tensor | None = None

    def ending_at(self, end_tokens: Iterable[int]) -> Self:
        """The same strategy with these end tokens."""
        other = copy.copy(self)
        other.end_tokens = tuple(end_tokens)
        return other

    def reset(self, batch_size: int, device: torch.device) -> None:
        """Begin a new batch."""
        self.ended = torch.zeros(batch_size, dtype=torch.bool, device=device)

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return self.ended is not None and bool(self.end_tokens) and bool(self.ended.all())

    def forward(self, logits: Tensor, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """Append a column to tokens `[b, n]`, chosen from logits `[b, vocab]`; the cache goes with the rows."""
        if torch.isnan(logits).any():
            raise HookCallError(f"the logits of column {tokens.shape[1]} hold NaN: the model or its input is broken.")
        chosen = self._choose(logits)
        if self.end_tokens and self.ended is not None:
            chosen = torch.where(self.ended, self.end_tokens[0], chosen)
            self.ended = self.ended | torch.isin(chosen, torch.tensor(self.end_tokens, device=chosen.device))
        return torch.cat((tokens, chosen[:, None]), dim=1), mems

    def finalize(self, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """The result, when all columns are filled or every row has ended."""
        return tokens, mems

    @abstractmethod
    def _choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, `[b]`."""


@final
class GreedyStrategy(Strategy):
    """The most likely token, always."""

    def _choose(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)


@final
class SamplingStrategy(Strategy):
    """A token drawn from the probabilities. With a seed, a row's draws do not depend on the other rows."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        end_tokens: Iterable[int] = (),
    ) -> None:
        """Set what is drawn from.

        Args:
            temperature: Below one sharper, above one flatter.
            top_k: Draw only from so many most likely tokens.
            top_p: Draw only from the most likely tokens that together reach this probability.
            seed: Makes the draws repeatable.
            end_tokens: Tokens that end a row.

        Raises:
            ConfigError: A value outside its range.
        """
        super().__init__(end_tokens)
        self.processors = _processors(temperature, top_k, top_p)
        self.seed = seed
        self.generators: list[torch.Generator] = []

    def reset(self, batch_size: int, device: torch.device) -> None:
        """Begin a new batch: the same seed gives the same draws."""
        super().reset(batch_size, device)
        self.generators = [torch.Generator() for _ in range(batch_size)]
        for row, generator in enumerate(self.generators):
            if self.seed is None:
                generator.seed()
            else:
                generator.manual_seed(self.seed + row)

    def _choose(self, logits: Tensor) -> Tensor:
        """By inverting the cumulated probabilities: one number a row decides, and never for an impossible token."""
        logits = logits.float()
        for process in self.processors:
            logits = process(logits)
        cumulated = logits.softmax(dim=-1).double().cumsum(dim=-1)
        drawn = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators])
        threshold = drawn.to(logits.device)[:, None] * cumulated[:, -1:]
        return (cumulated > threshold).int().argmax(dim=-1)


def _processors(heat: float, k: int | None, p: float | None) -> list[LogitsProcessor]:
    chosen = [temperature(heat)]
    if k is not None:
        chosen.append(top_k(k))
    if p is not None:
        chosen.append(top_p(p))
    return chosen
