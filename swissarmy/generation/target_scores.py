"""`TargetScoresMixin`: what given tokens cost under a model, without the logits of a whole text.

Shapes: b rows, s positions, v vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from swissarmy.backbone.model import BaseModel
from swissarmy.core.errors import HookCallError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.generation.packed_rows import SKIPPED
from swissarmy.mixins.heads import ClassificationHeadMixin, NoHeadMixin, PoolerMixin

LOGITS_AT_ONCE = 1 << 25
"""How many logits the head makes at a time: 128 MiB in float32."""


class TargetScores(NamedTuple):
    """How well the model predicts a token at each position."""

    losses: Tensor
    """`[b, s]`: negative log-likelihoods in nats, 0 where the target is `SKIPPED`; float32 at least."""
    is_likeliest: Tensor
    """`[b, s]`: whether greedy decoding would choose the target; true where that is `SKIPPED`."""


@final
class TargetScoresMixin(BaseMixin):
    """In place of logits `[b, s, v]`, the scores of `loss_targets` `[b, s]`; the head sees a few positions at a time.

    Hooks: `final_forward` (wraps). Parameters: none.
    """

    def __init__(self, invalid_slices: Sequence[slice] = ()) -> None:
        """Set which ids cannot be predicted."""
        super().__init__()
        self.invalid_slices = invalid_slices

    @non_conflict
    def final_forward(
        self, hidden_states: Tensor, *, old_impl: Hook, loss_targets: Tensor, **kw_args: Any
    ) -> TargetScores:
        """Run the head where a target is, a slice at a time."""
        vocabulary = max(kw_args["transformer"].config.vocab_size, 1)
        at_once = max(1, LOGITS_AT_ONCE // (len(hidden_states) * vocabulary))
        exact = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        losses = torch.zeros(loss_targets.shape, dtype=exact, device=loss_targets.device)
        is_likeliest = torch.ones_like(loss_targets, dtype=torch.bool)
        columns = (loss_targets != SKIPPED).any(dim=0).nonzero().flatten()
        for chosen in torch.split(columns, at_once) if len(columns) else ():
            targets = loss_targets[:, chosen]
            logits = self._allowed(_checked(old_impl(hidden_states[:, chosen], **kw_args), targets))
            flat = logits.flatten(0, 1).to(exact)
            own = F.cross_entropy(flat, targets.flatten(), ignore_index=SKIPPED, reduction="none")
            losses[:, chosen] = own.view(targets.shape)
            is_likeliest[:, chosen] = (logits.argmax(dim=-1) == targets) | (targets == SKIPPED)
        return TargetScores(losses, is_likeliest)

    def _allowed(self, logits: Tensor) -> Tensor:
        if not self.invalid_slices:
            return logits
        ruled_out = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        for each in self.invalid_slices:
            ruled_out[each] = True
        return logits.masked_fill(ruled_out, float("-inf"))


def scores_of_targets(decoder: BaseModel, tokens: Tensor, targets: Tensor, **kw_args: Any) -> TargetScores:
    """Call a model that has a `TargetScoresMixin`: tokens and targets `[b, s]`."""
    scores: TargetScores = decoder(tokens, loss_targets=targets, **kw_args)[0]
    return scores


def check_predicts(decoder: BaseModel, *, is_masked: bool = False) -> None:
    """Refuse models that do not say what comes next.

    Args:
        decoder: The model, or the part of it that decodes.
        is_masked: Whether the caller says by a mask what a token sees.

    Raises:
        HookCallError: It reads from both sides, or its head gives no logits over the vocabulary.
    """
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


def _checked(logits: Any, targets: Tensor) -> Tensor:
    """The head's logits `[b, s, v]`, if they are that; put together, if processes share the vocabulary."""
    if isinstance(logits, Tensor) and type(logits) is not Tensor:
        from swissarmy.nn.shared_vocabulary import whole  # at call time: a model in one process needs none of this

        logits = whole(logits)
    if isinstance(logits, Tensor) and logits.shape[:-1] == targets.shape and logits.shape[-1] > targets.max():
        return logits
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise HookCallError(
        f"the model's head gives {shape} for targets {list(targets.shape)} up to id {int(targets.max())}: "
        "perplexity needs logits [b, s, vocab]."
    )
