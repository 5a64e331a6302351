"""`generate` and `stream`: text in, text out."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.generation.autoregressive_sampling import GAP, Grid, fill_sequence, steps
from swissarmy.generation.constraints import json_schema_constraint, regex_constraint
from swissarmy.generation.perplexity import evaluate_perplexity
from swissarmy.generation.progress import ReportingStrategy, bar
from swissarmy.generation.stopping import Clock, StoppingStrategy, StopStrings
from swissarmy.generation.strategies import GreedyStrategy, Strategy, check_strategy

FinishReason = Literal["end", "stop", "length", "time"]


class TokenizerLike(Protocol):
    """What `generate` needs of a tokenizer; `sat.load_tokenizer` gives one."""

    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Text to ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""


class TextStreamLike(Protocol):
    """Turns tokens into text as they come, never half a character."""

    def put(self, token_id: int) -> str:
        """The text that became certain with this token."""

    def end(self) -> str:
        """What is left."""


class StreamingTokenizerLike(TokenizerLike, Protocol):
    """What `stream` needs of a tokenizer."""

    def stream(self) -> TextStreamLike:
        """A decoder for tokens that come one by one."""


class Generation(NamedTuple):
    """One generated text, token by token."""

    text: str
    """The new text, without the prompt and without a stop string."""
    tokens: list[int]
    """The new tokens; those of a stop string too, an end token not."""
    logprobs: list[float]
    """The log-probability of each token under the model, in nats, before temperature and the like."""
    finish_reason: FinishReason
    """Why the text ends: an end token, a stop string, `max_new_tokens` or `max_time`."""


def generate(
    model: Model,
    tokenizer: TokenizerLike,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    strategy: Strategy | None = None,
    stop: str | Sequence[str] = (),
    max_time: float | None = None,
    regex: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    progress: bool = False,
    **kw_args: Any,
) -> list[str]:
    """Continue texts (for an encoder-decoder: answer them); rows end at the tokenizer's end tokens.

    Args:
        model: A causal model or an encoder-decoder.
        tokenizer: Encodes the prompts and decodes what comes.
        prompts: One text or several, of any lengths.
        max_new_tokens: The most tokens that a row gets.
        strategy: Chooses the tokens; greedy when omitted.
        stop: A text ends before the first of these strings.
        max_time: Seconds after which no further token is begun.
        regex: Each text that ends before `max_new_tokens` matches this regular expression, see `regex_constraint`.
        json_schema: Each text that ends before `max_new_tokens` is JSON of this schema, see `json_schema_constraint`.
        progress: Whether to show a bar on standard error, if that is a terminal.
        **kw_args: For the model, in every step.

    Returns:
        The new text of each prompt, without the prompt; several of each if the strategy gives several.

    Raises:
        HookCallError: A prompt without tokens, or a value outside its range.
        ConfigError: A regular expression or schema that cannot be followed.
        MissingExtraError: It needs the extra `constrained`.
    """
    strategy = chooser(strategy, tokenizer, regex=regex, json_schema=json_schema)
    limits = _Limits(max_new_tokens, StopStrings(stop), Clock(max_time), progress)
    return [row.text for row in _fill(model, tokenizer, prompts, strategy, limits, kw_args).rows]


def generate_with_logprobs(
    model: Model,
    tokenizer: TokenizerLike,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    strategy: Strategy | None = None,
    stop: str | Sequence[str] = (),
    max_time: float | None = None,
    regex: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    progress: bool = False,
    **kw_args: Any,
) -> list[Generation]:
    """What `generate` gives, with the tokens, how likely each was, and why the text ends.

    The log-probabilities come from reading the finished texts once more, all together: they are those of
    `evaluate_perplexity`, whatever the strategy. Arguments and errors are those of `generate`.
    """
    strategy = chooser(strategy, tokenizer, regex=regex, json_schema=json_schema)
    limits = _Limits(max_new_tokens, StopStrings(stop), Clock(max_time), progress)
    filled = _fill(model, tokenizer, prompts, strategy, limits, kw_args)
    if not any(row.tokens for row in filled.rows):
        return filled.rows
    texts = [torch.tensor([*context, *row.tokens]) for context, row in zip(filled.contexts, filled.rows, strict=True)]
    losses = evaluate_perplexity(model, texts, reduction="none", **filled.extra, **kw_args)
    scored = []
    for row, context, loss in zip(filled.rows, filled.contexts, losses, strict=True):
        own = loss[len(context) : len(context) + len(row.tokens)]
        scored.append(row._replace(logprobs=(-own).tolist()))
    return scored


@torch.no_grad()  # so made that the caller's own setting holds between the pieces
def stream(
    model: Model,
    tokenizer: StreamingTokenizerLike,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    strategy: Strategy | None = None,
    stop: str | Sequence[str] = (),
    max_time: float | None = None,
    regex: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    **kw_args: Any,
) -> Iterator[str]:
    """Continue one text and yield the new text piece by piece; the pieces together are what `generate` gives.

    Arguments and errors are those of `generate`, without a bar; a strategy that follows several texts at a time cannot
    be streamed.
    """
    stops, clock = StopStrings(stop), Clock(max_time)
    if max_new_tokens == 0:
        return
    strategy = chooser(strategy, tokenizer, regex=regex, json_schema=json_schema)
    rows, extra = _prepare(model, tokenizer, [prompt], max_new_tokens)
    start, decoder = int((rows[0] != GAP).sum()), tokenizer.stream()
    for tokens, _ in steps(model, Grid.of(rows, 1, model.device), strategy, **extra, **kw_args):
        token = last_token(tokens, strategy)
        yield stops.put("" if token is None else decoder.put(token))
        if stops.found or clock.is_over or tokens.shape[1] - start >= max_new_tokens:
            break
    if not stops.found:
        yield stops.put(decoder.end())
    yield stops.end()


class _Limits(NamedTuple):
    """When to stop, apart from end tokens; and whether a bar shows how far it is until then."""

    max_new_tokens: int
    stops: StopStrings
    clock: Clock
    progress: bool


class _Filled(NamedTuple):
    """What was generated, and what it followed."""

    rows: list[Generation]
    contexts: list[list[int]]
    """The tokens before the new ones, of each row."""
    extra: dict[str, Any]
    """What else the model was given, row by row."""


def _fill(
    model: Model,
    tokenizer: TokenizerLike,
    prompts: str | Sequence[str],
    strategy: Strategy,
    limits: _Limits,
    kw_args: dict[str, Any],
) -> _Filled:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or limits.max_new_tokens == 0:
        return _Filled([Generation("", [], [], "length")] * len(texts), [[]] * len(texts), {})
    rows, extra = _prepare(model, tokenizer, texts, limits.max_new_tokens)
    contexts = [row[: -limits.max_new_tokens].tolist() for row in rows]
    with bar(limits.max_new_tokens, shown=limits.progress) as report:
        watched = _watched(strategy, tokenizer, limits, report, start=max(map(len, contexts)))
        tokens, _ = fill_sequence(model, rows, strategy=watched, **extra, **kw_args)
    times = len(tokens) // len(rows)
    contexts = [context for context in contexts for _ in range(times)]
    extra = {name: tensor.repeat_interleave(times, dim=0) for name, tensor in extra.items()}
    made = [
        _generation(row.tolist()[len(context) :], tokenizer, strategy.end_tokens, limits)
        for row, context in zip(tokens, contexts, strict=True)
    ]
    return _Filled(made, contexts, extra)


def _watched(
    strategy: Strategy, tokenizer: TokenizerLike, limits: _Limits, report: Callable[[int], None], *, start: int
) -> Strategy:
    """The strategy, and around it what the limits ask for."""
    if limits.progress:
        strategy = ReportingStrategy(strategy, report, start)
    if not limits.stops.strings and limits.clock.deadline is None:
        return strategy

    def is_over(new: Sequence[int]) -> bool:
        ids = _new_ids(new, strategy.end_tokens)
        return len(ids) < len(new) or limits.stops.cut(tokenizer.decode(ids)) is not None

    return StoppingStrategy(strategy, limits.clock, is_over if limits.stops.strings else lambda new: False, start)


def _generation(new: Sequence[int], tokenizer: TokenizerLike, end_tokens: Sequence[int], limits: _Limits) -> Generation:
    """A row's text from what was generated, `GAP` where nothing was."""
    ids = _new_ids(new, end_tokens)
    text = tokenizer.decode(ids)
    before = limits.stops.cut(text)
    if before is not None:
        sizes = range(len(ids) + 1)
        size = bisect_left(sizes, True, key=lambda size: limits.stops.cut(tokenizer.decode(ids[:size])) is not None)
        return Generation(before, ids[:size], [], "stop")
    if len(ids) < len(new) and new[len(ids)] != GAP:
        return Generation(text, ids, [], "end")
    return Generation(text, ids, [], "length" if len(ids) == limits.max_new_tokens else "time")


def _prepare(
    model: Model, tokenizer: TokenizerLike, texts: Sequence[str], max_new_tokens: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Rows with gaps to fill, and what else the model is given."""
    if max_new_tokens < 0:
        raise HookCallError(f"max_new_tokens={max_new_tokens} must not be negative.")
    ids = [tokenizer.encode(text) for text in texts]
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise HookCallError(f"the prompt {text!r} has no tokens: give some text, or a begin token.")
    extra: dict[str, Any] = {}
    if model.parts:
        extra, ids = _source(ids, model.device), [[_start_token(model)]] * len(ids)
    gap = torch.full((max_new_tokens,), GAP)
    return [torch.cat((torch.tensor(row), gap)) for row in ids], extra


def _source(ids: Sequence[Sequence[int]], device: torch.device) -> dict[str, Any]:
    """An encoder's input: ids `[b, t]` padded on the right, and which of them are real."""
    lengths = torch.tensor([len(row) for row in ids])
    real = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    padded = torch.zeros(real.shape, dtype=torch.long)
    padded[real] = torch.tensor([token for row in ids for token in row])
    return {"input_ids": padded.to(device), "padding_mask": real.to(device)}


def _start_token(model: Model) -> int:
    """The token that a decoder starts from, as its checkpoint says."""
    values = {} if model.source is None else model.source.values
    for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id"):
        if values.get(name) is not None:
            return int(values[name])
    return 0


def chooser(
    strategy: Strategy | None,
    tokenizer: TokenizerLike,
    *,
    regex: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
) -> Strategy:
    """The strategy with the tokenizer's end tokens, and within a constraint if there is one."""
    strategy = ending(strategy, tokenizer)
    if regex is not None and json_schema is not None:
        raise ConfigError("regex and json_schema are two constraints: give one of them.")
    if regex is not None:
        return strategy.with_processors([regex_constraint(tokenizer, regex)])
    if json_schema is not None:
        return strategy.with_processors([json_schema_constraint(tokenizer, json_schema)])
    return strategy


def ending(strategy: Strategy | None, tokenizer: TokenizerLike) -> Strategy:
    """The strategy, ending rows where the tokenizer says so unless it has end tokens of its own."""
    strategy = strategy or GreedyStrategy()
    check_strategy(strategy)
    return strategy if strategy.end_tokens else strategy.ending_at(tokenizer.eos_token_ids)


def last_token(tokens: Tensor, strategy: Strategy) -> int | None:
    """The newest token of the one row `[1, n]`, `None` if it ends the text.

    Raises:
        HookCallError: There are several rows.
    """
    if len(tokens) != 1:
        raise HookCallError(
            f"{type(strategy).__name__} follows several texts at a time, and knows which to keep only at the end: use "
            "sat.generate (on the command line, --no-stream)."
        )
    token = int(tokens[0, -1])
    return None if token in strategy.end_tokens or token == GAP else token


def _new_ids(new: Sequence[int], end_tokens: Sequence[int]) -> list[int]:
    """What was generated, up to the first end token."""
    stops = [index for index, token in enumerate(new) if token in end_tokens or token == GAP]
    return list(new[: stops[0]]) if stops else list(new)
