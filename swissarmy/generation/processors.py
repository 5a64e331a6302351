"""Logits processors: each takes scores `[b, vocab]` and the tokens so far `[b, n]`, and gives scores.

A token that is ruled out has the score -inf and keeps it: no processor brings a token back. In the tokens, -1 stands
where a row has none (before it begins and after it is over, in a batch of rows of different lengths) and never counts.
The same function serves every strategy; your own is any callable of this form, given as `processors=[...]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swissarmy.core.errors import ConfigError

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""`(logits [b, vocab], tokens [b, n]) -> logits [b, vocab]`."""

_NEVER = float("-inf")


class ProcessorOfARun(ABC):
    """What makes a processor for each run, because it counts from where the run begins; given like a processor."""

    @abstractmethod
    def begin(self, end_tokens: Sequence[int]) -> LogitsProcessor:
        """The processor of one run; its first call sees the tokens before the first that is chosen."""


def temperature(value: float) -> LogitsProcessor:
    """Divide by `value`: below one sharper, above one flatter."""
    if not value > 0:
        raise ConfigError(f"temperature={value} must be above 0; for the most likely token use sat.GreedyStrategy().")
    return lambda logits, tokens: logits / value


def top_k(k: int) -> LogitsProcessor:
    """Keep the `k` most likely tokens (Fan et al. 2018); a `k` over the vocabulary keeps all."""
    if k < 1:
        raise ConfigError(f"top_k={k} must be at least 1; leave it out to keep every token.")

    def keep(logits: Tensor, tokens: Tensor) -> Tensor:
        lowest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
        return logits.masked_fill(logits < lowest, _NEVER)

    return keep


def top_p(p: float) -> LogitsProcessor:
    """Keep the smallest set of most likely tokens whose probabilities reach `p` (Holtzman et al. 2020)."""
    if not 0 < p <= 1:
        raise ConfigError(f"top_p={p} must be above 0 and at most 1.")

    def keep(logits: Tensor, tokens: Tensor) -> Tensor:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= p
        return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), _NEVER)

    return keep


def min_p(p: float) -> LogitsProcessor:
    """Keep the tokens that are at least `p` times as likely as the most likely one (Nguyen et al. 2024)."""
    if not 0 <= p <= 1:
        raise ConfigError(f"min_p={p} must be between 0 and 1.")

    def keep(logits: Tensor, tokens: Tensor) -> Tensor:
        probabilities = logits.softmax(dim=-1)
        return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), _NEVER)

    return keep


def typical_p(p: float) -> LogitsProcessor:
    """Keep the tokens whose surprise is nearest to the expected one, until they reach `p` (Meister et al. 2023)."""
    if not 0 < p <= 1:
        raise ConfigError(f"typical_p={p} must be above 0 and at most 1.")

    def keep(logits: Tensor, tokens: Tensor) -> Tensor:
        log_probabilities = logits.log_softmax(dim=-1)
        probabilities = log_probabilities.exp()
        entropy = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)
        distance, order = (-log_probabilities - entropy).abs().sort(dim=-1)
        ordered = probabilities.gather(-1, order)
        last = (ordered.cumsum(dim=-1) < p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        beyond = distance > distance.gather(-1, last)
        return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), _NEVER)

    return keep


def repetition_penalty(penalty: float) -> LogitsProcessor:
    """Divide the positive, multiply the negative scores of tokens that occurred by `penalty` (Keskar et al. 2019)."""
    if not penalty > 0:
        raise ConfigError(f"repetition_penalty={penalty} must be above 0; 1 changes nothing.")

    def penalize(logits: Tensor, tokens: Tensor) -> Tensor:
        lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(_counts(tokens, logits) > 0, lowered, logits)

    return penalize


def presence_penalty(penalty: float) -> LogitsProcessor:
    """Subtract `penalty` from the score of every token that occurred in the row (the OpenAI API's parameter)."""
    _finite(presence_penalty=penalty)
    return lambda logits, tokens: logits - penalty * (_counts(tokens, logits) > 0).to(logits.dtype)


def frequency_penalty(penalty: float) -> LogitsProcessor:
    """Subtract `penalty` for each time that the token occurred in the row (the OpenAI API's parameter)."""
    _finite(frequency_penalty=penalty)
    return lambda logits, tokens: logits - penalty * _counts(tokens, logits).to(logits.dtype)


def no_repeat_ngram(size: int) -> LogitsProcessor:
    """Rule out a token that would complete `size` tokens in a row that occurred before (Paulus et al. 2018)."""
    if size < 1:
        raise ConfigError(f"no_repeat_ngram_size={size} must be at least 1; leave it out to allow repetition.")

    def rule_out(logits: Tensor, tokens: Tensor) -> Tensor:
        if tokens.shape[1] < size:
            return logits
        ngrams = tokens.unfold(1, size, 1)
        beginning = tokens[:, None, tokens.shape[1] - size + 1 :]
        repeats = (ngrams[..., :-1] == beginning).all(dim=-1) & (ngrams >= 0).all(dim=-1)
        return logits.masked_fill(_counts(torch.where(repeats, ngrams[..., -1], -1), logits) > 0, _NEVER)

    return rule_out


def bad_words(words: Iterable[Sequence[int]]) -> LogitsProcessor:
    """Rule out the last token of each of these sequences of ids where the others precede it."""
    listed = [tuple(word) for word in words]
    if not all(listed) or min((token for word in listed for token in word), default=0) < 0:
        raise ConfigError(f"bad_words={listed} must be sequences of one or more ids >= 0.")

    def rule_out(logits: Tensor, tokens: Tensor) -> Tensor:
        hidden = torch.zeros_like(logits, dtype=torch.bool)
        for *beginning, last in listed:
            if len(beginning) <= tokens.shape[1] and last < logits.shape[1]:
                end = tokens[:, tokens.shape[1] - len(beginning) :]
                hidden[:, last] |= (end == torch.tensor(beginning, device=end.device)).all(dim=-1)
        return logits.masked_fill(hidden, _NEVER)

    return rule_out


def suppressed_tokens(ids: Iterable[int]) -> LogitsProcessor:
    """Rule out these tokens."""
    listed = _ids("suppressed_tokens", ids)
    return lambda logits, tokens: logits.masked_fill(_one_of(listed, logits), _NEVER)


def forced_tokens(at: Mapping[int, int]) -> LogitsProcessor:
    """Rule out all but the token `at[i]` where a row has `i` tokens so far, its prompt counted."""
    _ids("forced_tokens", [*at, *at.values()])

    def rule_out(logits: Tensor, tokens: Tensor) -> Tensor:
        length = (tokens >= 0).sum(dim=-1)
        for position, token in at.items():
            other = ~_one_of([token], logits)
            logits = logits.masked_fill((length == position)[:, None] & other, _NEVER)
        return logits

    return rule_out


def min_length(length: int, end_tokens: Iterable[int]) -> LogitsProcessor:
    """Rule out the end tokens until a row has `length` tokens, its prompt counted."""
    listed = _ids("end_tokens", end_tokens)
    if length < 0:
        raise ConfigError(f"min_length={length} must not be negative.")

    def rule_out(logits: Tensor, tokens: Tensor) -> Tensor:
        short = (tokens >= 0).sum(dim=-1) < length
        return logits.masked_fill(short[:, None] & _one_of(listed, logits), _NEVER)

    return rule_out


def by_tokens(
    *,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    bad_words: Iterable[Sequence[int]] | None = None,
    suppressed_tokens: Iterable[int] | None = None,
    forced_tokens: Mapping[int, int] | None = None,
) -> list[LogitsProcessor]:
    """The processors of those options that are given, in this order."""
    return _made(
        (_penalize_repetition, repetition_penalty),
        (_penalize_presence, presence_penalty),
        (_penalize_frequency, frequency_penalty),
        (no_repeat_ngram, no_repeat_ngram_size),
        (_rule_out_words, bad_words),
        (_suppress, suppressed_tokens),
        (_force, forced_tokens),
    )


def by_shape(
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
) -> list[LogitsProcessor]:
    """The processors of those options that are given, in this order; they look at the scores alone."""
    return _made(
        (_heat, temperature),
        (_keep_k, top_k),
        (_keep_p, top_p),
        (_keep_min_p, min_p),
        (_keep_typical, typical_p),
    )


# the options of a strategy have the names of the functions
_penalize_repetition, _penalize_presence = repetition_penalty, presence_penalty
_penalize_frequency, _rule_out_words = frequency_penalty, bad_words
_suppress, _force = suppressed_tokens, forced_tokens
_heat, _keep_k, _keep_p, _keep_min_p, _keep_typical = temperature, top_k, top_p, min_p, typical_p


def _made(*options: tuple[Callable[[Any], LogitsProcessor], Any]) -> list[LogitsProcessor]:
    return [make(value) for make, value in options if value is not None]


def _counts(tokens: Tensor, logits: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs, `[b, vocab]`."""
    vocab = logits.shape[-1]
    place = torch.where((tokens >= 0) & (tokens < vocab), tokens, vocab)
    counts = torch.zeros(len(tokens), vocab + 1, dtype=torch.long, device=logits.device)
    return counts.scatter_add_(1, place, torch.ones_like(place))[:, :vocab]


def _one_of(ids: Sequence[int], logits: Tensor) -> Tensor:
    """Which tokens of the vocabulary are listed, `[vocab]`."""
    listed = torch.tensor(ids, dtype=torch.long, device=logits.device)
    return torch.isin(torch.arange(logits.shape[-1], device=logits.device), listed)


def _ids(name: str, ids: Iterable[int]) -> list[int]:
    listed = list(ids)
    if any(token < 0 for token in listed):
        raise ConfigError(f"{name}={listed} must be numbers >= 0.")
    return listed


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not abs(value) < float("inf"):
            raise ConfigError(f"{name}={value} must be a finite number; 0 changes nothing.")
