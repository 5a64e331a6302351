"""Logits processors: each takes scores `[b, vocab]` and gives scores, with tokens ruled out at -inf."""

from collections.abc import Callable

import torch
from torch import Tensor

from swissarmy.core.errors import ConfigError

LogitsProcessor = Callable[[Tensor], Tensor]


def temperature(value: float) -> LogitsProcessor:
    """Divide by `value`: below one sharper, above one flatter."""
    if not value > 0:
        raise ConfigError(f"temperature={value} must be above 0; for the most likely token use sat.GreedyStrategy().")
    return lambda logits: logits / value


def top_k(k: int) -> LogitsProcessor:
    """Keep the `k` most likely tokens; a `k` over the vocabulary keeps all."""
    if k < 1:
        raise ConfigError(f"top_k={k} must be at least 1; leave it out to keep every token.")

    def keep(logits: Tensor) -> Tensor:
        lowest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
        return logits.masked_fill(logits < lowest, float("-inf"))

    return keep


def top_p(p: float) -> LogitsProcessor:
    """Keep the smallest set of most likely tokens whose probabilities reach `p` (Holtzman et al. 2020)."""
    if not 0 < p <= 1:
        raise ConfigError(f"top_p={p} must be above 0 and at most 1.")

    def keep(logits: Tensor) -> Tensor:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= p
        return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))

    return keep
