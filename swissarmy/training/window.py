"""One step's window: all its micro-batches forward and backward, and what they were, summed over all ranks.

Gradients are of the sum of losses. Nothing is divided before everything is added up, so that neither the number of
micro-batches nor that of ranks, nor how full each of them is, changes what a step does.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from swissarmy.core.errors import ConfigError
from swissarmy.training.gradients import squared_norm
from swissarmy.training.precision import LossScaler, PrecisionOptions, autocast
from swissarmy.training.ranks import Ranks

Number = float | Tensor
ForwardStep = Callable[[Any, Any], tuple[Tensor, Number] | tuple[Tensor, Number, Mapping[str, tuple[Number, Number]]]]
"""`forward_step(batch, model)` gives the sum of the losses of a micro-batch (a scalar tensor with a gradient), how many
tokens or samples that is the sum over, and, if it likes, other sums and counts by name."""


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

    Args:
        ranks: Who shares the sums.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.totals: Tensor | None = None
        self.names: tuple[str, ...] = ()
        self.tokens = self.samples = 0

    def add(self, batch: Any, loss_sum: Tensor, count: Number, metrics: Mapping[str, tuple[Number, Number]]) -> None:
        """Add a micro-batch.

        Raises:
            ConfigError: It has other metrics than those before.
        """
        numbers = [loss_sum, count, *(number for pair in metrics.values() for number in pair)]
        vector = torch.stack([self._scalar(number) for number in numbers])
        if self.totals is None:
            self.totals, self.names = vector, tuple(metrics)
        elif self.names != tuple(metrics):
            raise ConfigError(
                f"forward_step gave the metrics {[*metrics]}, and before {[*self.names]}: give all always."
            )
        else:
            self.totals += vector
        self.tokens += tokens_of(batch)
        self.samples += samples_of(batch)

    @property
    def own_loss(self) -> Tensor:
        """This rank's `[loss sum, count]`, on its device."""
        empty = torch.zeros(2, dtype=self.ranks.number_type, device=self.ranks.device)
        return empty if self.totals is None else self.totals[:2]

    def sums(self, squared_norm: Tensor | None = None, flags: Sequence[bool] = ()) -> Sums:
        """All ranks' sums; the host waits here, and nowhere else in a step."""
        own = self.own_loss if self.totals is None else self.totals
        own = torch.cat([own, own.new_tensor([self.tokens, self.samples])])
        own = own if self.ranks.counts else torch.zeros_like(own)
        norm = torch.zeros((), device=own.device) if squared_norm is None else squared_norm.to(own.device)
        numbers = self.ranks.sum(torch.cat([own, norm.to(own.dtype)[None], own.new_tensor(flags, dtype=own.dtype)]))
        loss, count, *rest = numbers
        pairs = [(rest[2 * index], rest[2 * index + 1]) for index in range(len(self.names))]
        tokens, samples, norm_over_ranks, *raised = rest[2 * len(self.names) :]
        return Sums(
            loss=loss,
            count=count,
            metrics=dict(zip(self.names, pairs, strict=True)),
            tokens=int(tokens),
            samples=int(samples),
            squared_norm=norm_over_ranks,
            flags=tuple(map(int, raised)),
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
    ranks: Ranks,
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
        ranks: Who shares the sums.
        flags: What this rank wants all to know, asked for at the end.

    Raises:
        ConfigError: `forward_step` gave something else than it should.
    """
    totals, sample_ids, waited = Accumulator(ranks), list[int](), 0.0
    for micro in range(accumulation):
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        sample_ids += sample_ids_of(batch)
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(micro == accumulation - 1)
        with autocast(precision, ranks.device.type):
            loss_sum, count, metrics = call_step(forward_step, to_device(batch, ranks.device), model)
        scaler.scaled(loss_sum).backward()  # type: ignore[no-untyped-call]
        totals.add(batch, loss_sum, count, metrics)
    sums = totals.sums(squared_norm(model.parameters(), ranks.world_size), flags())
    return Window(sums=sums, own_loss=totals.own_loss, sample_ids=tuple(sample_ids), waited=waited)


def call_step(
    forward_step: ForwardStep, batch: Any, model: nn.Module
) -> tuple[Tensor, Number, Mapping[str, tuple[Number, Number]]]:
    """What a forward step gives, with metrics.

    Raises:
        ConfigError: It gave something else than a scalar tensor, a number, and sums and counts by name.
    """
    match forward_step(batch, model):
        case Tensor() as loss_sum, int() | float() | Tensor() as count:
            metrics: Mapping[str, tuple[Number, Number]] = {}
        case Tensor() as loss_sum, int() | float() | Tensor() as count, Mapping() as metrics:
            pass
        case other:
            raise ConfigError(
                f"forward_step gives (loss_sum, count) or (loss_sum, count, metrics), not {_kind(other)}."
            )
    if loss_sum.dim():
        raise ConfigError(f"forward_step's loss_sum is a tensor {list(loss_sum.shape)}; it must be a scalar: a sum.")
    return loss_sum, count, metrics


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


def sample_ids_of(batch: Any) -> list[int]:
    """The global numbers of a batch's samples, where it carries them as `sample_ids`."""
    ids = batch.get("sample_ids") if isinstance(batch, Mapping) else None
    return ids.tolist() if isinstance(ids, Tensor) else []


def _ratio(total: float, count: float) -> float:
    return total / count if count else (0.0 if total == 0 else math.nan)


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(each).__name__ for each in value)})"
    return f"a {type(value).__name__}"
