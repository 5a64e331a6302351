"""`WrappingStrategy`: what strategies have in common that leave the choice to another one."""

import copy
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel
from swissarmy.generation.processors import LogitsProcessor, ProcessorOfARun
from swissarmy.generation.strategies import Strategy
from swissarmy.nn.kv_cache import KVCache


class WrappingStrategy(Strategy):
    """Another strategy that chooses, with something around it; a subclass says what."""

    def __init__(self, strategy: Strategy) -> None:
        """Set who chooses."""
        super().__init__(strategy.end_tokens)
        self.strategy = strategy

    def ending_at(self, end_tokens: Iterable[int]) -> Self:
        """The same strategy with these end tokens."""
        other = super().ending_at(end_tokens)
        other.strategy = self.strategy.ending_at(other.end_tokens)
        return other

    def with_processors(self, processors: Iterable[LogitsProcessor | ProcessorOfARun]) -> Self:
        """The same strategy, whose choices these processors take part in."""
        other = copy.copy(self)
        other.strategy = self.strategy.with_processors(processors)
        return other

    @property
    def reads_last_column(self) -> bool:
        """Whether the strategy wants that."""
        return self.strategy.reads_last_column

    def attach(self, decoder: BaseModel) -> BaseModel:
        """The model that the strategy wants."""
        return self.strategy.attach(decoder)

    def reset(self, batch_size: int, device: torch.device, gaps: Tensor | None = None) -> None:
        """Begin a new batch."""
        super().reset(batch_size, device, gaps)
        self.strategy.reset(batch_size, device, gaps)

    @property
    def is_done(self) -> bool:
        """Whether the strategy is."""
        return self.strategy.is_done

    def propose(self, tokens: Tensor) -> Tensor:
        """What the strategy guesses."""
        return self.strategy.propose(tokens)

    def forward(self, logits: Tensor, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """What the strategy chooses."""
        return self.strategy.forward(logits, tokens, mems)

    def finalize(self, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """The strategy's result."""
        return self.strategy.finalize(tokens, mems)

    def live(self, tokens: Tensor) -> Tensor:
        """Which rows the strategy still chooses for."""
        return self.strategy.live(tokens)
