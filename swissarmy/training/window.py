"""One step's window: all its micro-batches forward and backward, and what they were, summed over all ranks.

Gradients are of the sum of losses. Nothing is divided before everything is added up, so that neither the number of
micro-batches nor that of ranks, nor how full each of them is, changes what a step does.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from swissarmy.core.errors import ConfigError
from swissarmy.training.gradients import squared_norm
from swissarmy.training.precision import LossScaler, PrecisionOptions, autocast
from swissarmy.training.ranks import Ranks

Number = float | Tensor
ForwardStep = Callable[[Any, Any], tuple[Tensor, Number] | tuple[Tensor, Number, Mapping[str, tuple[Number, Number]]]]
"""`forward_step(batch, model)` gives the sum of the losses of a micro-batch (a scalar tensor with a gradient), how many
tokens or samples that is the sum over, and, if it likes, other sums and counts by name: always the same names."""
_Step = TypeVar("_Step", bound=Callable[..., Any])


def nats_per_token(forward_step: _Step) -> _Step:
    """Say of a forward step that its loss is the cross-entropy of tokens in nats; evaluations give its exponential
    then, the perplexity. The stock steps of tokens are marked so.

    ```python
    @sat.nats_per_token
    def next_token(batch, model): ...
    ```
    """
    forward_step.nats_per_token = True  # type: ignore[attr-defined]
    return forward_step


def is_in_nats_per_token(forward_step: ForwardStep) -> bool:
    """Whether a forward step, or what it is a `functools.partial` of, is marked so."""
    while isinstance(forward_step, partial):
        forward_step = forward_step.func
    return getattr(forward_step, "nats_per_token", False)


@final
@dataclass(frozen=True, kw_only=True)
class Sums:
    """What micro-batches add up to, over all of them and all ranks."""

    loss: float
    count: float
    metrics: Mapping[str, tuple[float, float]]
    tokens: int
    samples: int
    squared_norm: float = 0.0
    """Of the gradient of the sum of losses, times the square of the loss scale."""
    flags: tuple[int, ...] = ()
    """How many ranks raised each flag."""

    @property
    def mean_loss(self) -> float:
        """The loss per token or sample; zero where none was counted."""
        return _ratio(self.loss, self.count)

    @property
    def mean_metrics(self) -> dict[str, float]:
        """Each metric's mean, by name."""
        return {name: _ratio(total, count) for name, (total, count) in self.metrics.items()}


@final
class Accumulator:
    """Adds up what forward steps give, on the device, until one read brings it to the host.

    Sums of several ranks are by position: before the first ones, the ranks agree on what metrics there are, and a rank
    that is given others later tells all of them.

    Args:
        ranks: Who shares the sums.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._names: tuple[str, ...] | None = None
        self._have_agreed = False
        self._begin()

    def _begin(self) -> None:
        self._totals: Tensor | None = None
        self._others: tuple[str, ...] | None = None
        self._tokens = self._samples = 0

    def add(self, batch: Any, loss_sum: Tensor, count: Number, metrics: Mapping[str, tuple[Number, Number]]) -> None:
        """Add a micro-batch."""
        names = tuple(sorted(metrics))
        self._names = names if self._names is None else self._names
        if names != self._names:
            self._others = names
            return
        numbers = [loss_sum, count, *(number for name in names for number in metrics[name])]
        vector = torch.stack([self._scalar(number) for number in numbers])
        self._totals = vector if self._totals is None else self._totals + vector
        self._tokens += tokens_of(batch)
        self._samples += samples_of(batch)

    @property
    def own_loss(self) -> Tensor:
        """This rank's `[loss sum, count]`, on its device."""
        return self._own()[:2]

    def sums(self, squared_norm: Tensor | None = None, flags: Sequence[bool] = ()) -> Sums:
        """All ranks' sums, and begin anew; the host waits here, and nowhere else in a step.

        Raises:
            ConfigError: On every rank: one of them has other metrics than another, or than it had before; or what was
                counted is no number of tokens or samples.
        """
        names = self._agree()
        own = self._own()
        own = torch.cat([own, own.new_tensor([self._tokens, self._samples])])
        own = own if self.ranks.counts else torch.zeros_like(own)
        norm = torch.zeros((), device=own.device) if squared_norm is None else squared_norm.to(own.device)
        raised = own.new_tensor([self._others is not None, *flags], dtype=own.dtype)
        loss, count, *rest = self.ranks.sum(torch.cat([own, norm.to(own.dtype)[None], raised]))
        pairs = [(rest[2 * index], rest[2 * index + 1]) for index in range(len(names))]
        tokens, samples, norm_over_ranks, have_others, *all_raised = rest[2 * len(names) :]
        if have_others:
            self.ranks.together(self._check_names)
        self._begin()
        if not 0 <= count < math.inf:
            raise ConfigError(
                f"forward_step's counts add up to {count:g}; they are to say of how many tokens or samples loss_sum is "
                "the sum."
            )
        return Sums(
            loss=loss,
            count=count,
            metrics=dict(zip(names, pairs, strict=True)),
            tokens=int(tokens),
            samples=int(samples),
            squared_norm=norm_over_ranks,
            flags=tuple(map(int, all_raised)),
        )

    def _own(self) -> Tensor:
        """This rank's sums: the loss, how many, and each metric's two."""
        if self._totals is not None:
            return self._totals
        return torch.zeros(2 + 2 * len(self._names or ()), dtype=self.ranks.number_type, device=self.ranks.device)

    def _agree(self) -> tuple[str, ...]:
        """The names of the metrics, which are those of every rank."""
        names = self._names or ()
        if not self._have_agreed:
            given = {f"metric '{name}'": "given" for name in names}
            self.ranks.check_agreement("the metrics that forward_step gives", given)
            self._have_agreed = True
        return names

    def _check_names(self) -> None:
        if self._others is not None:
            raise ConfigError(
                f"forward_step gave the metrics {[*self._others]}, and before {[*(self._names or ())]}: give all "
                "always, with a count of 0 where there is nothing to count."
            )

    def _scalar(self, number: Number) -> Tensor:
        if isinstance(number, DTensor):
            number = number.full_tensor()
        if isinstance(number, Tensor):
            return number.detach().to(self.ranks.device, self.ranks.number_type).reshape(())
        return torch.tensor(float(number), dtype=self.ranks.number_type, device=self.ranks.device)


@final
@dataclass(frozen=True, kw_only=True)
class Window:
    """What a step's micro-batches were; the gradients are in the model."""

    sums: Sums
    own_loss: Tensor
    """This rank's `[sum, count]`, on its device."""
    sample_ids: tuple[int, ...]
    """The global numbers of this rank's samples; empty where batches carry none."""
    waited: float
    """Seconds that this rank waited for the loader."""


def run_window(
    model: nn.Module,
    batches: Iterator[Any],
    forward_step: ForwardStep,
    *,
    accumulation: int,
    precision: PrecisionOptions,
    scaler: LossScaler,
    totals: Accumulator,
    flags: Callable[[], Sequence[bool]] = tuple,
) -> Window:
    """Take the next micro-batches forward and backward, and add up what they were.

    Args:
        model: Its gradients are added to.
        batches: The loader's.
        forward_step: What is computed.
        accumulation: How many micro-batches.
        precision: What products are computed in.
        scaler: What losses are multiplied with before `backward`.
        totals: The run's, with the ranks that share the sums; empty, and empty again afterwards.
        flags: What this rank wants all to know, asked for at the end.

    Raises:
        ConfigError: `forward_step` gave something else than it should.
    """
    sample_ids, waited, device = list[int](), 0.0, totals.ranks.device
    for micro in range(accumulation):
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        sample_ids += sample_ids_of(batch)
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(micro == accumulation - 1)
        with autocast(precision, device.type):
            loss_sum, count, metrics = call_step(forward_step, to_device(batch, device), model)
        _check_gradient(loss_sum)
        scaler.scaled(loss_sum).backward()  # type: ignore[no-untyped-call]
        totals.add(batch, loss_sum, count, metrics)
    own_loss = totals.own_loss
    sums = totals.sums(squared_norm(model.parameters(), totals.ranks.world_size), flags())
    return Window(sums=sums, own_loss=own_loss, sample_ids=tuple(sample_ids), waited=waited)


def call_step(
    forward_step: ForwardStep, batch: Any, model: nn.Module
) -> tuple[Tensor, Number, Mapping[str, tuple[Number, Number]]]:
    """What a forward step gives, with metrics.

    Raises:
        ConfigError: It gave something else than a scalar tensor, a number, and a sum and a count for each name.
    """
    match forward_step(batch, model):
        case Tensor() as loss_sum, count:
            metrics: Mapping[str, tuple[Number, Number]] = {}
        case Tensor() as loss_sum, count, Mapping() as metrics:
            pass
        case other:
            raise ConfigError(
                f"forward_step gives (loss_sum, count) or (loss_sum, count, metrics), not {_kind(other)}."
            )
    if loss_sum.dim():
        raise ConfigError(f"forward_step's loss_sum is a tensor {list(loss_sum.shape)}; it must be a scalar: a sum.")
    if not _is_number(count):
        raise ConfigError(f"forward_step's count is {_kind(count)}; it must be one number.")
    for name, each in metrics.items():
        is_pair = isinstance(each, tuple | list) and len(each) == 2 and all(_is_number(number) for number in each)
        if not is_pair or not isinstance(name, str):
            raise ConfigError(
                f"forward_step's metric {name!r} is {_kind(each)}; it must be (sum, count), two numbers of which the "
                "mean over all batches and ranks is made, such as (right, len(labels))."
            )
    return loss_sum, count, metrics


def _check_gradient(loss_sum: Tensor) -> None:
    """Whether there is something to go backward from.

    Raises:
        ConfigError: There is not.
    """
    if not loss_sum.requires_grad:
        raise ConfigError(
            "forward_step's loss_sum has no gradient: no parameter that trains is behind it. Was it detached, made "
            "with .item(), or computed under torch.no_grad()? Does the part of the model that it uses train?"
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; the copy runs beside what is computed."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


def tokens_of(batch: Any) -> int:
    """How many tokens a batch of the stock collators has, padding left out; of any other batch the samples."""
    if not isinstance(batch, Mapping):
        return samples_of(batch)
    real = [batch[name] for name in ("padding_mask", "decoder_padding_mask") if isinstance(batch.get(name), Tensor)]
    if isinstance(documents := batch.get("document_ids"), Tensor):
        real = [documents >= 0]
    if real:
        return sum(int(mask.sum()) for mask in real)
    ids = batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else samples_of(batch)


def samples_of(batch: Any) -> int:
    """How many samples a batch has: the rows of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()), 0)


def is_empty(batch: Any) -> bool:
    """Whether a batch is of no samples: there is nothing in it, or none of its tensors has a row."""
    leaves = tree_leaves(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    return not leaves or (bool(tensors) and not any(tensor.shape[0] for tensor in tensors))


def sample_ids_of(batch: Any) -> list[int]:
    """The global numbers of a batch's samples, where it carries them as `sample_ids`."""
    ids = batch.get("sample_ids") if isinstance(batch, Mapping) else None
    return ids.tolist() if isinstance(ids, Tensor) else []


def _ratio(total: float, count: float) -> float:
    return total / count if count else (0.0 if total == 0 else math.nan)


def _is_number(value: object) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_kind(each) for each in value)})"
    if isinstance(value, Tensor) and value.dim():
        return f"a tensor {list(value.shape)}"
    return f"a {type(value).__name__}"
