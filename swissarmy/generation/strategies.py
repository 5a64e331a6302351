"""Strategies: how the next token of each row is chosen.

Shapes: b rows, n tokens so far, c columns in all.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Self, TypedDict, Unpack, final

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel
from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.generation.processors import LogitsProcessor, ProcessorOfARun, by_shape, by_tokens
from swissarmy.nn.kv_cache import KVCache


class StrategyOptions(TypedDict, total=False):
    """What every strategy takes by keyword; each is a function of `swissarmy.generation.processors`."""

    processors: Sequence[LogitsProcessor | ProcessorOfARun]
    """Your own, after those that the other options make and before temperature and what follows it."""
    min_length: int
    """How many tokens a row gets at least before an end token."""
    repetition_penalty: float | None
    """Makes tokens that occurred less likely, by a factor."""
    presence_penalty: float | None
    """Makes tokens that occurred less likely, by a difference."""
    frequency_penalty: float | None
    """The same for each time that they occurred."""
    no_repeat_ngram_size: int | None
    """So many tokens in a row never occur twice."""
    bad_words: Iterable[Sequence[int]] | None
    """Sequences of ids that are never generated."""
    suppressed_tokens: Iterable[int] | None
    """Ids that are never generated."""
    forced_tokens: Mapping[int, int] | None
    """For a position in the row, the id that stands there."""


class Strategy(ABC):
    """Chooses tokens one column at a time, until it `is_done`; `finalize` makes the result.

    For one of your own, define `forward`; or, on `TokenStrategy`, just `choose`.
    """

    def __init__(self, end_tokens: Iterable[int] = (), **options: Unpack[StrategyOptions]) -> None:
        """Set the tokens that end a row, and how logits are changed before a token is chosen.

        Raises:
            ConfigError: A value outside its range.
        """
        self.end_tokens = tuple(end_tokens)
        self.min_length = options.pop("min_length", 0)
        if self.min_length < 0:
            raise ConfigError(f"min_length={self.min_length} must not be negative.")
        own = list(options.pop("processors", ()))
        self.processors: list[LogitsProcessor | ProcessorOfARun] = [*by_tokens(**options), *own]  # type: ignore[misc]
        self.narrowing: list[LogitsProcessor] = []
        """What comes last: temperature, and the choice of the tokens that are drawn from."""
        self.ended: Tensor | None = None
        self.gaps: Tensor | None = None
        self._of_this_run: list[LogitsProcessor] | None = None

    def ending_at(self, end_tokens: Iterable[int]) -> Self:
        """The same strategy with these end tokens."""
        other = copy.copy(self)
        other.end_tokens = tuple(end_tokens)
        return other

    def with_processors(self, processors: Iterable[LogitsProcessor | ProcessorOfARun]) -> Self:
        """The same strategy with these processors after its own, and before temperature and what follows it."""
        other = copy.copy(self)
        other.processors = [*self.processors, *processors]
        return other

    def attach(self, decoder: BaseModel) -> BaseModel:
        """The model that a run decodes with: the one it has, or `decoder.with_mixin(...)` to see more than logits."""
        return decoder

    def reset(self, batch_size: int, device: torch.device, gaps: Tensor | None = None) -> None:
        """Begin a new batch.

        Args:
            batch_size: How many rows it has.
            device: Where its tokens are.
            gaps: `[b, c]`, which tokens are to be chosen; all when omitted. What is chosen elsewhere does not count.
        """
        self.ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.gaps = gaps
        self._of_this_run = self._begun()

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return self.ended is not None and bool(self.end_tokens) and bool(self.ended.all())

    @property
    def reads_last_column(self) -> bool:
        """Whether the last column is read too before `finalize`, for a choice that depends on what the model sees."""
        return False

    def propose(self, tokens: Tensor) -> Tensor:
        """A guess of what follows tokens `[b, n]`, `[b, guessed]`; read along, and kept as far as it comes true."""
        return tokens[:, :0]

    @abstractmethod
    def forward(self, logits: Tensor, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """Append a column to tokens `[b, n]`, chosen from logits `[b, vocab]`; the cache goes with the rows.

        In the tokens, -1 stands where a row has none: before it begins and after it is over. Several rows may be made
        of each: tokens `[times * b, n + 1]`, those of one row together, and the cache reordered like them.
        """

    def process(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """The logits `[b, vocab]` after all processors, in float32 or better."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for processor in self._begun() if self._of_this_run is None else self._of_this_run:
            logits = processor(logits, tokens)
        if self.min_length and self.end_tokens:
            short = self._generated(tokens) < self.min_length
            ends = torch.tensor(self.end_tokens, device=logits.device)
            hidden = torch.isin(torch.arange(logits.shape[-1], device=logits.device), ends)
            logits = logits.masked_fill(short[:, None] & hidden, float("-inf"))
        for processor in self.narrowing:
            logits = processor(logits, tokens)
        return logits

    def finalize(self, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """The result, when all columns are filled or every row has ended.

        An empty cache says that the tokens must be read again for what the result remembers.
        """
        return tokens, mems

    def live(self, tokens: Tensor) -> Tensor:
        """Which rows have not ended and have their next token chosen, `[b]`."""
        live = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        if self.gaps is not None:
            live = self.gaps[:, tokens.shape[1]]
        return live if self.ended is None else live & ~self.ended

    def _note_ends(self, chosen: Tensor, live: Tensor) -> None:
        """Live rows whose chosen token `[b]` is an end token have ended."""
        if self.end_tokens and self.ended is not None:
            ending = torch.isin(chosen, torch.tensor(self.end_tokens, device=chosen.device))
            self.ended = self.ended | (ending & live)

    def _begun(self) -> list[LogitsProcessor]:
        """The processors; those that follow one run are made for it."""
        return [each.begin(self.end_tokens) if isinstance(each, ProcessorOfARun) else each for each in self.processors]

    def _generated(self, tokens: Tensor) -> Tensor:
        """How many tokens of each row were chosen, `[b]`; all of them where no gaps are known."""
        return ((tokens >= 0) if self.gaps is None else self.gaps[:, : tokens.shape[1]]).sum(dim=1)


class TokenStrategy(Strategy):
    """Chooses each row's token from that row's own logits."""

    def forward(self, logits: Tensor, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """Append the chosen tokens `[b]` to tokens `[b, n]`; an ended row gets the first of the end tokens.

        Raises:
            HookCallError: Logits that are not numbers, or a row whose tokens are all ruled out.
        """
        column, live = tokens.shape[1], self.live(tokens)
        check_logits(logits, live, column)
        processed = self.process(logits, tokens)
        if processed is not logits:
            check_logits(processed, live, column)
        chosen = self.choose(processed, live)
        if self.end_tokens and self.ended is not None:
            chosen = torch.where(self.ended, self.end_tokens[0], chosen)
        self._note_ends(chosen, live)
        return torch.cat((tokens, chosen[:, None]), dim=1), mems

    @abstractmethod
    def choose(self, logits: Tensor, live: Tensor) -> Tensor:
        """The next token of each row, `[b]`, from processed logits `[b, vocab]`; of rows not in `live` any token."""


@final
class GreedyStrategy(TokenStrategy):
    """The most likely token, always."""

    def choose(self, logits: Tensor, live: Tensor) -> Tensor:
        return logits.argmax(dim=-1)


@final
class SamplingStrategy(TokenStrategy):
    """A token drawn from the probabilities; a row's draws do not depend on the other rows."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        seed: int | None = None,
        end_tokens: Iterable[int] = (),
        **options: Unpack[StrategyOptions],
    ) -> None:
        """Set what is drawn from.

        Args:
            temperature: Below one sharper, above one flatter.
            top_k: Draw only from so many most likely tokens.
            top_p: Draw only from the most likely tokens that together reach this probability.
            min_p: Draw only from tokens at least so many times as likely as the most likely one.
            typical_p: Draw only from the tokens of the most typical surprise that together reach this probability.
            seed: Makes the draws repeatable; without one they follow `torch.manual_seed`.
            end_tokens: Tokens that end a row.
            **options: As for every strategy, see `StrategyOptions`.

        Raises:
            ConfigError: A value outside its range.
        """
        super().__init__(end_tokens, **options)
        self.narrowing = by_shape(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
        self.seed = seed
        self.generators: list[torch.Generator] = []

    def reset(self, batch_size: int, device: torch.device, gaps: Tensor | None = None) -> None:
        """Begin a new batch: the same seed gives the same draws."""
        super().reset(batch_size, device, gaps)
        self.generators = row_generators(self.seed, batch_size)

    def choose(self, logits: Tensor, live: Tensor) -> Tensor:
        numbers = torch.zeros(len(logits), dtype=torch.float64)
        for row in live.nonzero().flatten().tolist():  # a row that is given its token draws none, as if it were alone
            numbers[row] = torch.rand((), generator=self.generators[row], dtype=torch.float64)
        return draw(logits, numbers)


def check_strategy(strategy: object) -> None:
    """Refuse what cannot choose tokens one after another.

    Raises:
        HookCallError: It is no strategy, or one that fills all gaps at once.
    """
    if not isinstance(strategy, Strategy):
        name = strategy.__name__ if isinstance(strategy, type) else type(strategy).__name__
        raise HookCallError(
            f"strategy={name} is not an instance of sat.Strategy, such as sat.GreedyStrategy(); "
            "sat.IterativeEntropyFilterStrategy is for sat.fill_sequence_in_parallel."
        )


def row_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """A source of random numbers for each row; without a seed they follow torch's own, which gives one number."""
    first = int(torch.randint(2**62, ())) if seed is None else seed
    return [torch.Generator().manual_seed(first + row) for row in range(rows)]


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """The token `[b]` that each of the numbers `[b]`, in [0, 1), picks from the probabilities of logits `[b, vocab]`.

    By inverting the cumulated probabilities: one number a row decides, and never for an impossible token.
    """
    cumulated = logits.softmax(dim=-1).double().cumsum(dim=-1)
    total = cumulated[:, -1:]
    threshold = (numbers[:, None].to(logits.device) * total).minimum(total.nextafter(torch.zeros_like(total)))
    return (cumulated > threshold).int().argmax(dim=-1)


def check_logits(logits: Tensor, live: Tensor, column: int, *, times: int = 1) -> None:
    """Refuse live rows of logits `[b * times, vocab]` from which no token can be chosen."""
    best = torch.where(live, logits.amax(dim=-1), 0)
    if torch.isfinite(best).all():
        return
    place = int((~torch.isfinite(best)).nonzero()[0])
    row = place // times
    if torch.isneginf(best[place]):
        raise HookCallError(
            f"every token is ruled out in row {row}, column {column}: the model's logits are all -inf, or the "
            "strategy's processors leave nothing to choose."
        )
    kind = "NaN" if torch.isnan(best[place]) else "infinite values"
    raise HookCallError(f"the logits of row {row}, column {column} hold {kind}: the model or its input is broken.")
