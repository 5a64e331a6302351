"""Cross-entropy of given tokens without the logits of all positions at once.

Logits over a vocabulary are the largest tensor of a language model's training step, and are needed for one number a
position. Here the head runs on some positions at a time. Where the head is a plain product, the gradients of that piece
are made with it, in the forward pass, so that nothing is kept and nothing computed twice (Hsu et al. 2024, Liger);
`torch.nn.functional.linear_cross_entropy` does the same with MKL's products, which take about twice as long on the
processors that `nn/linear.py` is about. Any other head is run again in the backward pass.

Shapes: n positions, h hidden size, v vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from swissarmy.core.errors import HookCallError
from swissarmy.nn.linear import linear
from swissarmy.nn.precision import precise, precise_type

IGNORED = -100
"""A target that is not scored."""
LOGITS_AT_ONCE = 1 << 25
"""How many logits are made at a time: 128 MiB in float32."""
TOKENS_AT_ONCE = 1 << 12
"""For how many tokens of the vocabulary a gradient is added up at a time."""


class TokenLosses(NamedTuple):
    """What a model gives in place of logits when it is called with `targets`."""

    total: Tensor
    """The sum of the losses in nats, with its gradient; float32 at least."""
    each: Tensor
    """The losses one by one, as `targets`, without gradient; 0 where the target is -100."""
    correct: Tensor
    """Whether the likeliest token is the target, as `targets`; false where that is -100."""


def token_losses(
    hidden_states: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Any],
    *,
    vocabulary: int,
    weight: Tensor | None = None,
) -> TokenLosses:
    """The losses of what a head makes of hidden states.

    Args:
        hidden_states: `[b, s, h]`.
        targets: `[b, s]`, -100 where nothing is scored. On a CPU, where looking costs nothing, only scored positions
            go through the head.
        head: From `[1, m, h]` to logits `[1, m, v]`, which may be shared by vocabulary (tensor parallelism).
        vocabulary: How many logits it gives, more or less.
        weight: `[v, h]`, where the head is the product with it and nothing else.

    Raises:
        HookCallError: Shapes that do not fit, or a head that gives no logits over tokens.
    """
    if targets.shape != hidden_states.shape[:2]:
        raise HookCallError(
            f"targets are {list(targets.shape)} and the model's positions {list(hidden_states.shape[:2])}."
        )
    if type(hidden_states) is not Tensor:
        from swissarmy.nn.shared_positions import OwnPositions  # at call time, as below
        from swissarmy.nn.shared_vocabulary import whole

        own = OwnPositions.of(hidden_states, targets, IGNORED)
        if own is not None:
            here = _losses_here(
                own.states, own.targets, own.head(head), vocabulary, own.weight(weight), select=weight is not None
            )
            return TokenLosses(own.total(here.total), own.gathered(here.each), own.gathered(here.correct))
        hidden_states = whole(hidden_states)
    return _losses_here(hidden_states, targets, head, vocabulary, weight)


def _losses_here(
    hidden_states: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Any],
    vocabulary: int,
    weight: Tensor | None,
    *,
    select: bool = True,
) -> TokenLosses:
    """Of positions that are all here; without `select` all of them go through the head, as other processes count on."""
    states, wanted = hidden_states.flatten(0, 1), targets.flatten()
    if select and targets.device.type == "cpu" and not torch.compiler.is_compiling():
        scored = (wanted != IGNORED).nonzero()[:, 0]
        states, wanted = states[scored], wanted[scored]
    else:
        scored = torch.arange(len(wanted), device=wanted.device)
    if weight is not None:
        _check_targets(wanted, len(weight))
        weight = weight if torch.is_grad_enabled() else weight.detach()  # the function below cannot tell
        total, own, is_own = _LinearLosses.apply(states, weight, wanted)  # type: ignore[no-untyped-call]
    else:
        total, own, is_own = _head_losses(states, wanted, head, max(1, LOGITS_AT_ONCE // vocabulary))
    each = own.new_zeros(targets.numel()).index_copy_(0, scored, own)
    correct = is_own.new_zeros(targets.numel()).index_copy_(0, scored, is_own)
    return TokenLosses(total, each.view(targets.shape), correct.view(targets.shape))


def _head_losses(
    states: Tensor, targets: Tensor, head: Callable[[Tensor], Any], rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of losses, losses, and whether each target is the likeliest; so many positions at a time, made twice."""

    def losses(states: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        return _losses_of(head(states[None]), own)

    pieces = list(zip(torch.split(states, rows), torch.split(targets, rows), strict=True))
    run = losses if len(pieces) == 1 else partial(checkpoint, losses, use_reentrant=False)
    each, correct = (torch.cat(parts) for parts in zip(*(run(*piece) for piece in pieces), strict=True))
    return each.sum(), each.detach(), correct


@final
class _LinearLosses(torch.autograd.Function):
    """Sum of losses, losses, and whether each target is the likeliest; gradients of the sum are made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take some positions at a time."""
        need_states, need_weight, _ = ctx.needs_input_grad
        dtype = precise_type(hidden_states.dtype)
        each = torch.empty(targets.shape, dtype=dtype, device=targets.device)
        correct = torch.empty(targets.shape, dtype=torch.bool, device=targets.device)
        grad_states = torch.empty_like(hidden_states) if need_states else None
        grad_weight = torch.zeros_like(weight) if need_weight else None  # where nothing is scored too, as other ranks
        for here in _slices(len(targets), max(1, LOGITS_AT_ONCE // len(weight))):
            states, scored = hidden_states[here], targets[here] != IGNORED
            places = torch.where(scored, targets[here], 0)[:, None]
            logits = linear(states, weight).to(dtype)
            largest, own = logits.amax(dim=1, keepdim=True), logits.gather(1, places)
            exponentials = logits.sub_(largest).exp_()  # in the memory of the logits, as all that follows
            sums = exponentials.sum(dim=1, keepdim=True)
            each[here] = torch.where(scored, (sums.log() + largest - own)[:, 0], 0.0)
            correct[here] = scored & (largest == own)[:, 0]
            if not (need_states or need_weight):
                continue
            slope = exponentials.mul_(scored[:, None] / sums)
            slope.scatter_add_(1, places, -scored[:, None].to(dtype))
            slope = slope.to(hidden_states.dtype)
            if grad_states is not None:
                grad_states[here] = linear(slope, weight.t())
            if grad_weight is not None:
                for tokens in _slices(len(weight), TOKENS_AT_ONCE):  # whole, its factors' copies would be the peak
                    grad_weight[tokens] += linear(slope[:, tokens].t(), states.t())
        ctx.gradients = grad_states, grad_weight
        ctx.mark_non_differentiable(each, correct)
        return each.sum(), each, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, Tensor | None, None]:
        """Hand out what was made, times the gradient of the sum."""
        if ctx.gradients is None:
            raise HookCallError("the gradients of token losses can be taken once: call the model again.")
        states, weight = (None if made is None else made.mul_(grad.to(made.dtype)) for made in ctx.gradients)
        ctx.gradients = None  # no second copy of the head's gradient stays alive
        return states, weight, None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _losses_of(logits: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses `[n]`, and whether each target is the likeliest, from logits `[1, n, v]`."""
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != len(targets):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise HookCallError(
            f"the model's head gives {shape} for {len(targets)} targets: `targets` needs logits [b, s, vocab]."
        )
    _check_targets(targets, logits.shape[2])
    scored = targets != IGNORED
    safe = torch.where(scored, targets, 0)
    if type(logits) is Tensor:
        terms = loss_terms(logits[0], safe)
    else:
        from swissarmy.nn.shared_vocabulary import shared_loss_terms  # at call time, as above

        terms = shared_loss_terms(logits, safe)
    return torch.where(scored, terms.normalizer - terms.own, 0.0), scored & (terms.largest == terms.own.detach())


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    """Refuse targets outside the vocabulary, on a CPU, where looking costs nothing.

    Raises:
        HookCallError: With one of them.
    """
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = targets[(targets != IGNORED) & ((targets < 0) | (targets >= vocabulary))]
    if len(outside):
        raise HookCallError(
            f"targets hold {int(outside[0])}; this model's vocabulary has {vocabulary}, from 0 on; {IGNORED} stands "
            "for a position that is not scored."
        )


class LossTerms(NamedTuple):
    """What the loss of each position is made of, `[n]` each."""

    own: Tensor
    """The target's logit."""
    normalizer: Tensor
    """The logarithm of the sum of all exponentials."""
    largest: Tensor
    """The largest logit, without gradient."""


def loss_terms(logits: Tensor, targets: Tensor) -> LossTerms:
    """From logits `[n, v]` and targets `[n]`."""
    logits = precise(logits)
    return LossTerms(logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(dim=1), logits.detach().amax(dim=1))
