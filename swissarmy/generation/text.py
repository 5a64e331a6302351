"""`generate` and `stream`: text in, text out."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.core.errors import HookCallError
from swissarmy.generation.autoregressive_sampling import GAP, Grid, fill_sequence, steps
from swissarmy.generation.strategies import GreedyStrategy, Strategy


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


def generate(
    model: Model,
    tokenizer: TokenizerLike,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    strategy: Strategy | None = None,
    **kw_args: Any,
) -> list[str]:
    """Continue texts (for an encoder-decoder: answer them); rows end at the tokenizer's end tokens.

    Args:
        model: A causal model or an encoder-decoder.
        tokenizer: Encodes the prompts and decodes what comes.
        prompts: One text or several, of any lengths.
        max_new_tokens: The most tokens that a row gets.
        strategy: Chooses the tokens; greedy when omitted.
        **kw_args: For the model, in every step.

    Returns:
        The new text of each prompt, without the prompt.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or max_new_tokens == 0:
        return [""] * len(texts)
    strategy = _ending(strategy, tokenizer)
    rows, extra, given = _prepare(model, tokenizer, texts, max_new_tokens)
    tokens, _ = fill_sequence(model, rows, strategy=strategy, **extra, **kw_args)
    return [
        tokenizer.decode(_new_ids(row.tolist(), start, strategy.end_tokens))
        for row, start in zip(tokens, given, strict=True)
    ]


def stream(
    model: Model,
    tokenizer: StreamingTokenizerLike,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    strategy: Strategy | None = None,
    **kw_args: Any,
) -> Iterator[str]:
    """Continue one text and yield the new text piece by piece; the pieces together are what `generate` gives."""
    if max_new_tokens == 0:
        return
    strategy = _ending(strategy, tokenizer)
    rows, extra, given = _prepare(model, tokenizer, [prompt], max_new_tokens)
    decoder = tokenizer.stream()
    for tokens, _ in steps(model, Grid.of(rows, 1, model.device), strategy, **extra, **kw_args):
        new = _new_ids(tokens[0].tolist(), given[0], strategy.end_tokens)
        if len(new) == tokens.shape[1] - given[0]:
            yield decoder.put(new[-1])
    yield decoder.end()


def _prepare(
    model: Model, tokenizer: TokenizerLike, texts: Sequence[str], max_new_tokens: int
) -> tuple[list[Tensor], dict[str, Any], list[int]]:
    """Rows with gaps to fill, what else the model is given, and how many tokens of each row were given."""
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
    return [torch.cat((torch.tensor(row), gap)) for row in ids], extra, [len(row) for row in ids]


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


def _ending(strategy: Strategy | None, tokenizer: TokenizerLike) -> Strategy:
    """The strategy, ending rows where the tokenizer says so unless it has end tokens of its own."""
    strategy = strategy or GreedyStrategy()
    return strategy if strategy.end_tokens else strategy.ending_at(tokenizer.eos_token_ids)


def _new_ids(row: Sequence[int], start: int, end_tokens: Sequence[int]) -> list[int]:
    """What was generated, up to the first end token."""
    new = row[start:]
    stops = [index for index, token in enumerate(new) if token in end_tokens or token == GAP]
    return list(new[: stops[0]]) if stops else list(new)
