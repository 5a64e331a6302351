"""The flags of the commands that generate: how tokens are chosen."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swissarmy.cli.loading import ModelOptions

if TYPE_CHECKING:
    from swissarmy.generation.strategies import Strategy


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(ModelOptions):
    """The flags that `sat generate` and `sat chat` share."""

    temperature: float | None = None
    """Draw tokens, below 1 sharper and above 1 flatter. Without this, top-k, top-p and seed: the likeliest token."""
    top_k: int | None = None
    """Draw only from so many likeliest tokens."""
    top_p: float | None = None
    """Draw only from the likeliest tokens that together reach this probability."""
    seed: int | None = None
    """Makes the draws repeatable."""

    def problems(self) -> Iterator[str]:
        """Values outside their ranges."""
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            yield f"--temperature {self.temperature} must be above 0; for the likeliest token leave it out"
        if self.top_k is not None and self.top_k < 1:
            yield f"--top-k {self.top_k} must be at least 1"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"--top-p {self.top_p} must be above 0 and at most 1"

    def strategy(self, *, first_row: int = 0) -> "Strategy":
        """What the flags ask for; rows count from `first_row`, so that a seed serves every batch of many."""
        from swissarmy.generation.strategies import GreedyStrategy, SamplingStrategy

        if self.temperature is self.top_k is self.top_p is self.seed is None:
            return GreedyStrategy()
        return SamplingStrategy(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed + first_row,
        )
