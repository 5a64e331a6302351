"""`fill_sequence`: a model written for teacher forcing fills the gaps of sequences, one column after another.

Rows of different lengths are shifted so that their first gaps stand in one column: what precedes is one prefill, and
every column after it is generated in one step for all rows. Shapes: b rows, c columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import HookCallError
from swissarmy.generation.eval_mode import in_eval_mode
from swissarmy.generation.grid import GAP, Grid, put_back, rows_of_padded
from swissarmy.generation.perplexity import evaluate_perplexity
from swissarmy.generation.step_inputs import LogAttentionWeightsMixin, MasksAndPositions, StepInputs
from swissarmy.generation.strategies import GreedyStrategy, Strategy, check_strategy
from swissarmy.mixins.cache import CachedAutoRegressiveMixin
from swissarmy.mixins.heads import LMHeadMixin
from swissarmy.nn.kv_cache import KVCache

__all__ = ["GAP", "Grid", "evaluate_perplexity", "fill_sequence", "filling_sequence", "steps", "with_cache"]


def fill_sequence(
    model: Model,
    seq: Tensor | Sequence[Tensor],
    batch_size: int = 1,
    *,
    strategy: Strategy | None = None,
    max_memory_length: int | None = None,
    mems: Tensor | None = None,
    log_attention_weights: Tensor | None = None,
    get_masks_and_position_ids: MasksAndPositions | None = None,
    **kw_args: Any,
) -> tuple[Tensor, Tensor]:
    """Generate every `-1` in sequences; given tokens stay, wherever they stand.

    Args:
        model: A causal model, or an encoder-decoder (then `input_ids=` is its source and `seq` the target). One in
            training mode is in evaluation mode while it reads, so that there is no dropout.
        seq: Token ids `[len]` or `[b, len]`, or a list of `[len]` of any lengths; each row begins with a given token.
            A batch `[b, len]` may be padded, left or right: `padding_mask=[b, len]` is 1 at its tokens and gaps.
        batch_size: How many rows to make of a single sequence.
        strategy: Chooses the tokens; greedy when omitted.
        max_memory_length: How many positions are remembered: each token sees itself and so many before it, in the
            prefill as in every step. All when omitted.
        mems: What an earlier call returned, for sequences of one length that begin with the same tokens. When it holds
            `max_memory_length` positions, these are the ones right before the last token in front of the first gap.
        log_attention_weights: Added to the scores of self-attention in every layer; broadcasts to
            `[b, heads, len, len]`, queries by keys.
        get_masks_and_position_ids: Gives the attention mask and the position ids of the sequences, for models that see
            their prompt in both directions. It is called with `seq` if that is `[len]`, else with `[b, len]`, -1 after
            each row's end; the mask covers the whole length (a mask, or a tensor with 1 = visible), the position ids
            are `[b|1, len]` or, for models with two rows of positions, `[b|1, 2, len]`. Either may be `None`.
        **kw_args: For the model, in every step.

    Returns:
        Tokens `[n, len]` (int64, -1 after a row's end), and `mems` `[num_layers, n, mem_len, 2 * kv_heads * head_dim]`;
        n is b, or several times b for a strategy that returns several sequences of each row.

    Raises:
        HookCallError: A row that begins with a gap or is empty, `mems` that leave no token to go on from, or a mask,
            position ids or weights that do not cover the sequences.
    """
    strategy = strategy or GreedyStrategy()
    padding = None if model.parts else kw_args.pop("padding_mask", None)
    grid = Grid.of(seq if padding is None else rows_of_padded(seq, padding), batch_size, model.device)
    with torch.no_grad():
        run = _Run(
            model,
            grid,
            kw_args,
            mems=mems,
            max_memory_length=max_memory_length,
            log_attention_weights=log_attention_weights,
            get_masks_and_position_ids=get_masks_and_position_ids,
            seq=seq.to(model.device) if isinstance(seq, Tensor) and seq.dim() == 1 else None,
        )
        for _ in run.steps(strategy):
            pass
        tokens = run.finish(strategy)
    if padding is not None:
        assert isinstance(seq, Tensor)
        tokens = put_back(tokens, seq, padding)
    return tokens, run.cache.to_mems()


filling_sequence = fill_sequence


def steps(
    model: Model, grid: Grid, strategy: Strategy, *, mems: Tensor | None = None, **kw_args: Any
) -> Iterator[tuple[Tensor, KVCache]]:
    """Yield the tokens so far `[b, c]`, -1 where a row has none, and the cache, after each column is chosen."""
    with torch.no_grad():
        yield from _Run(model, grid, kw_args, mems=mems).steps(strategy)


@final
class _Run:
    """One generation: the model with its cache, and how far it has come."""

    def __init__(
        self,
        model: Model,
        grid: Grid,
        kw_args: dict[str, Any],
        *,
        mems: Tensor | None = None,
        max_memory_length: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.grid = model, grid
        with in_eval_mode(model):
            decoder, step_kw_args = model.for_decoding(**kw_args)
        self.given = StepInputs.of(grid, step_kw_args, max_memory_length=max_memory_length, **options)
        self.inputs = self.given
        self.decoder = with_cache(decoder)
        if self.inputs.log_attention_weights is not None:
            self.decoder = self.decoder.with_mixin("log-attention-weights", LogAttentionWeightsMixin())
        self.columns = grid.gaps.any(dim=0).tolist()
        self.memory = max_memory_length
        width = grid.tokens.shape[1]
        self.cache = _start(self.decoder, grid, mems, capacity=width)
        first_gap = self._next_gap(0)
        self.tokens = grid.known[:, :first_gap]
        self.fed = len(self.cache)
        if self.memory is not None and self.fed >= self.memory:
            self.cache.keep_newest(self.memory)
            self.fed = first_gap - 1
        if self.fed >= first_gap:
            raise HookCallError(
                f"mems hold {self.fed} positions and the first gap is at {first_gap}: nothing is left to read."
            )

    def steps(self, strategy: Strategy) -> Iterator[tuple[Tensor, KVCache]]:
        """Yield tokens and cache after each column; a strategy's guesses are read along and kept if they come true."""
        check_strategy(strategy)
        width = self.grid.tokens.shape[1]
        strategy.reset(len(self.tokens), self.tokens.device, self.grid.gaps)
        self.decoder = strategy.attach(self.decoder)
        if self.tokens.shape[1] == width:
            self._feed(self.tokens[:, self.fed :])
            self._remember(0)
            yield self.tokens, self.cache
        while self.tokens.shape[1] < width:
            guesses = self._guesses(strategy)
            known = self.tokens.shape[1]
            logits = self._feed(torch.cat((self.tokens[:, self.fed :], guesses), dim=1), keep=guesses.shape[1] + 1)
            for index in range(guesses.shape[1] + 1):
                if self.columns[known + index]:
                    self._settle(*strategy.forward(logits[:, index], self.tokens, self.cache))
                    yield self.tokens, self.cache
                else:
                    self._append_given(known + index + 1)
                came_true = index < guesses.shape[1] and torch.equal(self.tokens[:, -1], guesses[:, index])
                if strategy.is_done or not came_true:
                    break
            self._remember(known + guesses.shape[1] - (self.tokens.shape[1] - 1))
            if strategy.is_done:
                return
            self._append_given(self._next_gap(self.tokens.shape[1]))
        if strategy.reads_last_column and self.fed < width:
            self._feed(self.tokens[:, self.fed :])

    def finish(self, strategy: Strategy) -> Tensor:
        """The strategy's result as rows `[n, len]`; what it forgot is read again."""
        tokens, self.cache = strategy.finalize(self.tokens, self.cache)
        self._repeat_for(len(tokens))
        if not len(self.cache):
            self.fed = 0
            self._feed(tokens[:, :-1])
            self._remember(0)
        return self.grid.unshift(torch.cat((tokens, self.grid.known[:, tokens.shape[1] :]), dim=1))

    def _feed(self, tokens: Tensor, *, keep: int = 1) -> Tensor:
        """Read columns; logits of the last `keep`, `[b, keep, vocab]`."""
        stop = self.fed + tokens.shape[1]
        call = self.inputs.at(self.decoder, self.fed, stop, len(self.cache))
        with in_eval_mode(self.model):
            logits: Tensor = self.decoder(tokens.clamp(min=0), mems=self.cache, logits_to_keep=keep, **call)[0]
        self.fed = stop
        vocab = self.decoder.config.vocab_size
        if logits.dim() != 3 or (logits.shape[2] != vocab and self.decoder.find_mixin(LMHeadMixin) is None):
            raise HookCallError(
                f"the model's head gives {list(logits.shape)}, not logits over its vocabulary of {vocab}: "
                "load the causal language model, or add sat.LMHeadMixin in place of the head."
            )
        return logits

    def _settle(self, grown: Tensor, cache: KVCache) -> None:
        """Take over what a strategy chose, but for rows whose next token is given or that are over."""
        self._repeat_for(len(grown))
        column = grown.shape[1] - 1
        chosen = torch.where(self.grid.gaps[:, column], grown[:, -1], self.grid.known[:, column])
        self.tokens, self.cache = torch.cat((grown[:, :-1], chosen[:, None]), dim=1), cache

    def _repeat_for(self, rows: int) -> None:
        """A strategy made several rows of each, or has come down to fewer of them."""
        if rows != len(self.grid.tokens):
            self.inputs = self.given.repeated(rows // len(self.given.grid.tokens))
            self.grid = self.inputs.grid

    def _append_given(self, stop: int) -> None:
        self.tokens = torch.cat((self.tokens, self.grid.known[:, self.tokens.shape[1] : stop]), dim=1)

    def _remember(self, surplus: int) -> None:
        """Forget guesses that did not come true, and what is too old."""
        if surplus:
            self.cache.trim(surplus)
            self.fed -= surplus
        if self.memory is not None:
            self.cache.keep_newest(self.memory)

    def _guesses(self, strategy: Strategy) -> Tensor:
        """What to read along, `[b, guessed]`; given tokens take their places, and no guess goes past the last gap."""
        start, last = self.tokens.shape[1], len(self.columns) - 1 - self.columns[::-1].index(True)
        guesses = strategy.propose(self.tokens)[:, : last - start]
        span = slice(start, start + guesses.shape[1])
        return torch.where(self.grid.gaps[:, span], guesses, self.grid.known[:, span])

    def _next_gap(self, start: int) -> int:
        """The first column from `start` on in which something is generated."""
        return start + [*self.columns[start:], True].index(True)


def with_cache(model: BaseModel) -> BaseModel:
    """The model itself if it has a cache mixin, else a view of it that does."""
    if model.find_mixin(CachedAutoRegressiveMixin) is not None:
        return model
    return model.with_mixin("auto-regressive", CachedAutoRegressiveMixin())


def _start(model: BaseModel, grid: Grid, mems: Tensor | None, *, capacity: int) -> KVCache:
    config = model.config
    if mems is None:
        return KVCache(config.num_layers, capacity=capacity)
    if grid.is_ragged:
        raise HookCallError("mems continue sequences whose first gaps stand at one place; these differ.")
    want = (config.num_layers, len(grid.tokens), 2 * config.kv_heads * config.head_size)
    if (mems.shape[0], mems.shape[1], mems.shape[3]) != want:
        raise HookCallError(
            f"mems are {list(mems.shape)}; this model and batch need [{want[0]}, {want[1]}, mem_len, {want[2]}]."
        )
    return KVCache.from_mems(mems, num_key_value_heads=config.kv_heads, capacity=capacity)
