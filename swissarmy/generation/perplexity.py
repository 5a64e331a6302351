"""`evaluate_perplexity`: how well a model predicts texts, summed over tokens.

Rows are packed to the left first, so that neither padding nor a neighbour changes a number. Logits of a whole text
never exist: see `TargetScoresMixin`.
Shapes: b rows, s tokens of the longest row, v vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import HookCallError
from swissarmy.generation.eval_mode import in_eval_mode
from swissarmy.generation.packed_rows import SKIPPED, PackedRows, Rows, grid_of
from swissarmy.generation.rank_sums import summed_over_ranks
from swissarmy.generation.target_scores import TargetScoresMixin, check_predicts, scores_of_targets
from swissarmy.mixins.cache import CachedAutoRegressiveMixin
from swissarmy.nn.kv_cache import KVCache
from swissarmy.nn.masks import Mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TOKENS_AT_ONCE = 1024
"""How many tokens of a window are read in one step."""


class Perplexity(NamedTuple):
    """How well texts were predicted."""

    perplexity: float
    """`exp(nll)`."""
    nll: float
    """Mean negative log-likelihood of a token, in nats."""
    tokens: int
    """How many tokens were scored: `nll * tokens` is the sum, to be added to those of other batches and ranks."""


@overload
def evaluate_perplexity(
    model: Model,
    tokens: Rows,
    attention_mask: Mask | Tensor | int | None = ...,
    position_ids: Tensor | None = ...,
    loss_mask: Rows | None = ...,
    invalid_slices: Iterable[slice] = ...,
    reduction: Literal["mean"] = ...,
    stride: int | None = ...,
    process_group: "ProcessGroup | None" = ...,
    **kw_args: Any,
) -> Perplexity: ...


@overload
def evaluate_perplexity(
    model: Model,
    tokens: Rows,
    attention_mask: Mask | Tensor | int | None = ...,
    position_ids: Tensor | None = ...,
    loss_mask: Rows | None = ...,
    invalid_slices: Iterable[slice] = ...,
    *,
    reduction: Literal["none"],
    stride: int | None = ...,
    process_group: "ProcessGroup | None" = ...,
    **kw_args: Any,
) -> Tensor: ...


@torch.no_grad()
def evaluate_perplexity(
    model: Model,
    tokens: Rows,
    attention_mask: Mask | Tensor | int | None = None,
    position_ids: Tensor | None = None,
    loss_mask: Rows | None = None,
    invalid_slices: Iterable[slice] = (),
    reduction: Literal["mean", "none"] = "mean",
    stride: int | None = None,
    process_group: "ProcessGroup | None" = None,
    **kw_args: Any,
) -> Perplexity | Tensor:
    """Score each token by those before it; a row's first token is read and not scored.

    Over ranks, each gives rows of its own, any number of them or none, and gets the result of all: sums of losses and
    of tokens are added in float64, so that the number of ranks and the way rows are dealt change nothing.

    Args:
        model: A causal model, or an encoder-decoder (then `input_ids=` is its source, and each row of `tokens` its
            target behind the start token). One in training mode is in evaluation mode meanwhile.
        tokens: `[s]`, `[b, s]`, or a list of `[s]` of any lengths. What is below 0 is ignored, wherever it stands:
            the tokens around it are neighbours.
        attention_mask: The model's natural mask when `None`; else a mask, -1 (causal) or a tensor `[s, s]` or
            `[b|1, heads|1, s, s]` with 1 = visible.
        position_ids: `[s]` or `[b, s]`; counted from each row's first token when omitted.
        loss_mask: Shaped like `tokens`; 0 = read and not scored.
        invalid_slices: Vocabulary ids that cannot be predicted: their logits are -inf. As a target such an id costs
            infinitely much.
        reduction: `mean`, or `none` for the loss of each token.
        stride: Read texts longer than the model's maximum in windows of that length, each so many tokens on: a token
            has the whole window before it less at most the stride. Windows are read piece by piece, with the cache.
        process_group: The ranks that the rows are dealt over, such as `torch.distributed.group.WORLD`; every one of
            them makes this call. When omitted, this process counts alone, whether or not it has others beside it. A
            rank without rows leaves the model out, so a model whose forward pass is itself a joint one (sharded, say)
            needs as many batches on every rank.
        **kw_args: For the model.

    Returns:
        A `Perplexity`, the same on every rank; with `reduction="none"` negative log-likelihoods in nats of this rank's
        own tokens, shaped like `tokens` (a list: padded on the right), 0 where nothing was scored.

    Raises:
        HookCallError: No token to score on any rank, a model that does not predict the next token, or arguments that
            do not fit; on the other ranks, that one of them failed.
    """
    scored = None
    try:
        if reduction not in ("mean", "none"):
            raise HookCallError(f"reduction={reduction!r} is neither 'mean' nor 'none'.")
        mixin = TargetScoresMixin(tuple(invalid_slices))
        with in_eval_mode(model):
            scored = _scored(model, mixin, tokens, attention_mask, position_ids, loss_mask, stride, kw_args)
    finally:  # after an error too: the other ranks wait for this one's numbers
        own = None if scored is None else (scored.nll, scored.num_tokens)
        nll, count = summed_over_ranks(own, size=2, group=process_group, device=model.device)
    if not count:
        raise HookCallError(
            "there is no token to score: a row's first token only begins it, and tokens below 0 and those with "
            "loss_mask 0 do not count."
        )
    mean = nll / count
    return scored.losses if reduction == "none" else Perplexity(_exp(mean), mean, int(count))


class _Scored(NamedTuple):
    """What this rank's tokens cost."""

    losses: Tensor
    """Shaped like the tokens."""
    num_tokens: int
    """How many were scored."""

    @property
    def nll(self) -> float:
        """The sum, in nats."""
        return float(self.losses.sum(dtype=torch.float64))


def _scored(
    model: Model,
    mixin: TargetScoresMixin,
    tokens: Rows,
    attention_mask: Mask | Tensor | int | None,
    position_ids: Tensor | None,
    loss_mask: Rows | None,
    stride: int | None,
    kw_args: dict[str, Any],
) -> _Scored:
    """This rank's part."""
    if not isinstance(tokens, Tensor) and not tokens:
        return _Scored(torch.zeros(0, 0), 0)
    grid = grid_of(tokens, fill=-1).to(model.device)
    shape = tokens.shape if isinstance(tokens, Tensor) else grid.shape
    counted = torch.ones_like(grid) if loss_mask is None else grid_of(loss_mask, fill=0).to(model.device)
    packed = PackedRows.of(grid, counted)
    count = int((packed.targets != SKIPPED).sum())
    if count == 0:
        return _Scored(torch.zeros(shape, device=model.device), 0)
    # a plain model that is not causal does not decode, and can still be scored under a mask of the caller's
    decoder, step_kw_args = (model, kw_args) if isinstance(model, BaseModel) else model.for_decoding(**kw_args)
    check_predicts(decoder, is_masked=attention_mask is not None)
    decoder = decoder.with_mixin("target-scores", mixin)
    if _needs_windows(decoder, packed, stride, has_own_mask=attention_mask is not None or position_ids is not None):
        assert stride is not None
        losses = _strided(decoder, packed, stride, step_kw_args)
    else:
        where = packed.where(attention_mask, position_ids)
        losses = scores_of_targets(decoder, packed.tokens, packed.targets, **where, **step_kw_args).losses
    return _Scored(packed.unpack(losses).view(shape), count)


def _exp(nll: float) -> float:
    """`exp`, infinite where no float is large enough."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _needs_windows(decoder: BaseModel, packed: PackedRows, stride: int | None, *, has_own_mask: bool) -> bool:
    """Whether the text is to be read in pieces; a short one is read at once whatever the stride."""
    if stride is None:
        return False
    length, window = packed.tokens.shape[1], _window(decoder, stride)
    if length > window and has_own_mask:
        raise HookCallError("with a stride, windows move over the text: leave attention_mask and position_ids out.")
    return length > min(window, TOKENS_AT_ONCE) and not has_own_mask


def _strided(decoder: BaseModel, packed: PackedRows, stride: int, kw_args: dict[str, Any]) -> Tensor:
    """The losses of a text longer than a window: each window scores what the one before it did not reach."""
    if decoder.find_mixin(CachedAutoRegressiveMixin) is None:
        decoder = decoder.with_mixin("auto-regressive", CachedAutoRegressiveMixin())
    length, window = packed.tokens.shape[1], _window(decoder, stride)
    targets, losses = packed.targets, []
    for start, scored_from in _windows(length, window, stride):
        cache = KVCache(decoder.config.num_layers, capacity=window)
        stop = min(start + window, length)
        wanted = targets[:, start:stop].clone()
        wanted[:, : scored_from - start] = SKIPPED
        if stop < length:
            wanted[:, -1] = SKIPPED  # the next window predicts that one
        blocks = [torch.split(each, TOKENS_AT_ONCE, dim=1) for each in (packed.tokens[:, start:stop], wanted)]
        for tokens, part in zip(*blocks, strict=True):
            first = start + len(cache)
            losses.append((first, scores_of_targets(decoder, tokens, part, mems=cache, **kw_args).losses))
    total = losses[0][1].new_zeros(targets.shape)
    for first, part in losses:
        total[:, first : first + part.shape[1]] += part
    return total


def _windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Where each window starts, and from which position on it predicts."""
    yield 0, 0
    for start in range(stride, length - window + stride, stride):
        yield start, start + window - stride - 1


def _window(decoder: BaseModel, stride: int) -> int:
    longest = decoder.config.max_sequence_length
    if not 0 < stride < longest:
        raise HookCallError(
            f"stride={stride} must be at least 1 and below {longest}, the model's maximum: the rest of a window is "
            f"context. {longest // 2} is a good choice."
        )
    return longest
