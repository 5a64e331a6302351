"""`evaluate_perplexity`: how well a model predicts texts, summed over tokens.

Rows are packed to the left first, so that neither padding nor a neighbour changes a number. The head runs inside a
mixin, on the positions that are scored and a slice at a time: logits of a whole text never exist.
Shapes: b rows, s tokens of the longest row, v vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, final, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import HookCallError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.generation.packed_rows import SKIPPED, PackedRows, Rows, grid_of
from swissarmy.mixins.cache import CachedAutoRegressiveMixin
from swissarmy.mixins.heads import ClassificationHeadMixin, NoHeadMixin, PoolerMixin
from swissarmy.nn.kv_cache import KVCache
from swissarmy.nn.masks import Mask

LOGITS_AT_ONCE = 1 << 25
"""How many logits the head makes at a time: 128 MiB in float32."""
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
    **kw_args: Any,
) -> Perplexity | Tensor:
    """Score each token by those before it; a row's first token is read and not scored.

    Args:
        model: A causal model, or an encoder-decoder (then `input_ids=` is its source, and each row of `tokens` its
            target behind the start token). In evaluation mode, unless dropout is wanted.
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
        **kw_args: For the model.

    Returns:
        A `Perplexity`; with `reduction="none"` negative log-likelihoods in nats shaped like `tokens` (a list: padded
        on the right), 0 where nothing was scored.

    Raises:
        HookCallError: No token to score, a model that does not predict the next token, or arguments that do not fit.
    """
    if reduction not in ("mean", "none"):
        raise HookCallError(f"reduction={reduction!r} is neither 'mean' nor 'none'.")
    grid = grid_of(tokens, fill=-1).to(model.device)
    counted = torch.ones_like(grid) if loss_mask is None else grid_of(loss_mask, fill=0).to(model.device)
    packed = PackedRows.of(grid, counted)
    count = int((packed.targets != SKIPPED).sum())
    if count == 0:
        raise HookCallError(
            "there is no token to score: a row's first token only begins it, and tokens below 0 and those with "
            "loss_mask 0 do not count."
        )
    # a plain model that is not causal does not decode, and can still be scored under a mask of the caller's
    decoder, step_kw_args = (model, kw_args) if isinstance(model, BaseModel) else model.for_decoding(**kw_args)
    _check(decoder, is_masked=attention_mask is not None)
    decoder = decoder.with_mixin("perplexity-loss", _LossMixin(tuple(invalid_slices)))
    if _needs_windows(decoder, packed, stride, has_own_mask=attention_mask is not None or position_ids is not None):
        assert stride is not None
        losses = _strided(decoder, packed, stride, step_kw_args)
    else:
        where = packed.where(attention_mask, position_ids)
        losses = _losses(decoder, packed.tokens, targets=packed.targets, **where, **step_kw_args)
    if reduction == "none":
        return packed.unpack(losses).view(tokens.shape if isinstance(tokens, Tensor) else grid.shape)
    nll = losses.sum(dtype=torch.float64) / count
    return Perplexity(float(nll.exp()), float(nll), count)


@final
class _LossMixin(BaseMixin):
    """In place of logits `[b, s, v]`, what each target costs, `[b, s]`: the head runs on a few positions at a time.

    Hooks: `final_forward` (wraps). Parameters: none.
    """

    def __init__(self, invalid_slices: Sequence[slice]) -> None:
        """Set which ids cannot be predicted."""
        super().__init__()
        self.invalid_slices = invalid_slices

    @non_conflict
    def final_forward(self, hidden_states: Tensor, *, old_impl: Hook, loss_targets: Tensor, **kw_args: Any) -> Tensor:
        """Losses in nats, 0 where the target is `SKIPPED`; float32 at least."""
        vocabulary = max(kw_args["transformer"].config.vocab_size, 1)
        at_once = max(1, LOGITS_AT_ONCE // (len(hidden_states) * vocabulary))
        exact = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        losses = hidden_states.new_zeros(loss_targets.shape, dtype=exact)
        columns = (loss_targets != SKIPPED).any(dim=0).nonzero().flatten()
        for chosen in torch.split(columns, at_once) if len(columns) else ():
            logits = old_impl(hidden_states[:, chosen], **kw_args)
            losses[:, chosen] = self._loss(logits, loss_targets[:, chosen], exact)
        return losses

    def _loss(self, logits: Any, targets: Tensor, exact: torch.dtype) -> Tensor:
        if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape or logits.shape[-1] <= targets.max():
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise HookCallError(
                f"the model's head gives {shape} for targets {list(targets.shape)} up to id {int(targets.max())}: "
                "perplexity needs logits [b, s, vocab]."
            )
        if self.invalid_slices:
            ruled_out = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            for each in self.invalid_slices:
                ruled_out[each] = True
            logits = logits.masked_fill(ruled_out, float("-inf"))
        flat = logits.flatten(0, 1).to(exact)
        losses = F.cross_entropy(flat, targets.flatten(), ignore_index=SKIPPED, reduction="none")
        return losses.view(targets.shape)


def _check(decoder: BaseModel, *, is_masked: bool) -> None:
    """Refuse models that do not say what comes next."""
    if not decoder.config.causal and not is_masked:
        raise HookCallError(
            "the model reads texts from both sides, so no token is predicted from those before it: perplexity needs "
            "a causal model, an encoder-decoder, or an attention_mask that says what a token sees."
        )
    for kind in (ClassificationHeadMixin, PoolerMixin, NoHeadMixin):
        name = decoder.find_mixin(kind)
        if name is not None:
            raise HookCallError(
                f"the model's head '{name}' ({kind.__name__}) gives no logits over the vocabulary: perplexity needs "
                "a language model."
            )


def _losses(decoder: BaseModel, tokens: Tensor, *, targets: Tensor, **kw_args: Any) -> Tensor:
    """What each target costs, `[b, s]`."""
    losses: Tensor = decoder(tokens, loss_targets=targets, **kw_args)[0]
    return losses


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
            losses.append((start + len(cache), _losses(decoder, tokens, targets=part, mems=cache, **kw_args)))
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
