"""The forward step of knowledge distillation: a student learns from a teacher's logits, its hidden states, and labels.

`loss = (1 - label_share) * T^2 * KL(teacher || student) + label_share * cross_entropy + hidden_weight * hidden`, where
both distributions of the first term are softened by the temperature T (Hinton et al. 2015), and the last term is the
distance of hidden states, averaged over the pairs of layers of the model (Jiang et al. 2020; cosine: Sanh et al. 2019).

Shapes: b rows, s positions, h hidden size, c classes or tokens, n scored places.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.data.samples.examples import IGNORED
from swissarmy.models._distillation import DistillationModel, DistillationOutput
from swissarmy.nn.precision import precise
from swissarmy.training.steps.inputs import model_inputs, needed

HiddenLoss = Literal["mse", "cosine"]
Metrics = dict[str, tuple[Tensor, int]]


def distillation_step(
    batch: Mapping[str, Tensor],
    model: DistillationModel,
    *,
    temperature: float = 2.0,
    label_share: float = 0.5,
    hidden_weight: float = 1.0,
    hidden_loss: HiddenLoss = "mse",
) -> tuple[Tensor, int, Metrics]:
    """The losses of a batch; `functools.partial(distillation_step, temperature=4.0)` makes a step of other weights.

    Args:
        batch: What the models are called with, and one of: `labels` (or `targets`) `[b]` of whole rows or `[b, s]` of
            tokens, -100 where nothing is scored; `loss_mask` `[b, s]`, for models that predict each next token of
            `input_ids`. With `document_ids` `[b, s]`, tokens see those of their own document only.
        model: Teacher and student.
        temperature: What logits are divided by for the soft targets.
        label_share: The weight of the labels, from 0 (only the teacher counts) to 1.
        hidden_weight: The weight of the distance of hidden states, which is there if the model compares layers.
        hidden_loss: `mse`: mean squared difference; `cosine`: one minus the cosine.

    Returns:
        The sum of the losses of all scored places (rows or tokens), their number, and the sums of each term and of how
        often the student's first choice is the teacher's.

    Raises:
        ConfigError: Weights that are none.
        HookCallError: The batch says not what is scored, or not in the shape of the logits.
    """
    _check(temperature, label_share, hidden_weight, hidden_loss)
    result: DistillationOutput = model(**model_inputs(batch, model))
    scored = _Scored.of(batch, result.logits)
    ours, theirs = precise(scored.pick(result.logits)), precise(scored.pick(result.teacher_logits))
    soft = soft_target_loss(ours, theirs, temperature)
    hard = F.cross_entropy(ours, scored.targets, reduction="sum")
    hidden = _hidden_distance(result.hidden_states, scored, hidden_loss, ours)
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    loss = (1 - label_share) * soft + label_share * hard + hidden_weight * hidden
    terms = {"soft_loss": soft, "label_loss": hard, "hidden_loss": hidden, "agreement": agreed}
    return loss, len(ours), {name: (term.detach(), len(ours)) for name, term in terms.items()}


def soft_target_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(teacher || student)` of `[n, c]`, summed; the square keeps gradients as large at every temperature."""
    ours, theirs = (F.log_softmax(each / temperature, dim=-1) for each in (logits, teacher_logits))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


@final
@dataclass(frozen=True)
class _Scored:
    """Which places count, and what is right there."""

    pick: Callable[[Tensor], Tensor]
    """The scored places of a tensor `[b, s, ...]` (`[b, ...]` where rows are scored), `[n, ...]`."""
    targets: Tensor
    """`[n]`."""
    rows: bool
    """Whether whole rows are scored."""
    real: Tensor | None
    """`[b, s]`, where rows are scored: the tokens that are no padding."""

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], logits: Tensor) -> "_Scored":
        labels = needed(batch, "labels", "targets", "loss_mask")
        if labels is not batch.get("loss_mask"):
            if labels.shape != logits.shape[:-1]:
                raise HookCallError(f"labels are {list(labels.shape)}, and there are logits {list(logits.shape)}.")
            here = labels != IGNORED
            return cls(lambda each: each[here], labels[here], labels.dim() == 1, batch.get("padding_mask"))
        ahead = batch["loss_mask"][:, 1:].bool()
        return cls(lambda each: each[:, :-1][ahead], batch["input_ids"][:, 1:][ahead], False, None)

    def states(self, hidden_states: Tensor) -> Tensor:
        """`[b, s, h]` to `[n, k, h]`: the states of each scored token alone, or all of each scored row."""
        picked = self.pick(hidden_states)
        return picked if self.rows else picked[:, None]

    def weights(self, states: Tensor) -> Tensor:
        """The share of each of the states `[n, k, h]` in its place, `[n, k]`."""
        real = self.pick(self.real) if self.rows and self.real is not None else torch.ones_like(states[..., 0])
        return real.to(states.dtype) / real.sum(dim=1, keepdim=True).clamp(min=1)


def _hidden_distance(
    pairs: tuple[tuple[Tensor, Tensor], ...], scored: _Scored, kind: HiddenLoss, like: Tensor
) -> Tensor:
    """The mean over pairs of layers of the distances of hidden states, summed over scored places."""
    total = like.new_zeros(())
    for ours, theirs in pairs:
        a, b = precise(scored.states(ours)), precise(scored.states(theirs))
        distance = (a - b).square().mean(-1) if kind == "mse" else 1 - F.cosine_similarity(a, b, dim=-1)
        total = total + (distance * scored.weights(a)).sum()
    return total / max(len(pairs), 1)


def _check(temperature: float, label_share: float, hidden_weight: float, hidden_loss: str) -> None:
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} must be positive.")
    if not 0 <= label_share <= 1:
        raise ConfigError(f"label_share={label_share} must be from 0 to 1.")
    if not hidden_weight >= 0:
        raise ConfigError(f"hidden_weight={hidden_weight} must not be negative.")
    if hidden_loss not in ("mse", "cosine"):
        raise ConfigError(f"hidden_loss='{hidden_loss}' is neither 'mse' nor 'cosine'.")
