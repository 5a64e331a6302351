"""Evaluation: exact means over a whole set, the same at any number of ranks."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from swissarmy.core.config import Config
from swissarmy.data.loading.loader import Loader
from swissarmy.generation.eval_mode import in_eval_mode
from swissarmy.training.precision import PrecisionOptions, autocast
from swissarmy.training.ranks import Ranks
from swissarmy.training.window import (
    Accumulator,
    ForwardStep,
    Sums,
    call_step,
    is_empty,
    is_in_nats_per_token,
    to_device,
)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Config):
    """When a run is evaluated, and on how much."""

    eval_interval: int | None = None
    """Evaluate every so many steps, and at the end; at the end only when `None`."""
    eval_on_start: bool = False
    """Evaluate before the first step too: what the model can do as it is."""
    eval_iters: int | None = None
    """On how many batches of the valid data; on all when `None`. The test data is always read whole."""
    eval_batch_size: int | None = None
    """Samples of an evaluation batch, over all ranks; those of a micro-batch in training when `None`."""
    early_stopping: int | None = None
    """End the run after so many evaluations without a lower loss."""

    def problems(self) -> Iterator[str]:
        """Numbers out of range."""
        for name in ("eval_interval", "eval_iters", "eval_batch_size", "early_stopping"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}={value} must be at least 1, or null."
        if self.early_stopping is not None and self.eval_interval is None:
            yield "early_stopping needs an eval_interval."


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    forward_step: ForwardStep,
    *,
    ranks: Ranks | None = None,
    precision: PrecisionOptions | None = None,
    max_batches: int | None = None,
) -> Sums:
    """Add up the losses and metrics of a set, in evaluation mode; dropout is as before afterwards.

    Every sample counts once, whatever the number of ranks. Every rank runs the model equally often, as sharded models
    need it: a rank whose share of the last batch is empty repeats another batch, which does not count.

    Args:
        model: Sharded or not.
        batches: A loader's, of an order that ends.
        forward_step: As in training.
        ranks: Who shares the work; this process alone when omitted.
        precision: What products are computed in; as the model is when omitted.
        max_batches: Of how many batches; all when `None`.
    """
    ranks, precision = ranks or Ranks(), precision or PrecisionOptions()
    totals = Accumulator(ranks)
    with ExitStack() as contexts:
        contexts.callback(reshard, model)
        contexts.enter_context(in_eval_mode(model))
        contexts.enter_context(torch.no_grad())
        contexts.enter_context(autocast(precision, ranks.device.type))
        for batch, counts in _with_stand_ins(islice(batches, max_batches), ranks):
            loss_sum, count, metrics = call_step(forward_step, to_device(batch, ranks.device), model)
            if counts:
                totals.add(batch, loss_sum, count, metrics)
            else:
                totals.add({}, torch.zeros(()), 0, dict.fromkeys(metrics, (0.0, 0.0)))
    return totals.sums()


def has_samples(loader: Loader | None) -> TypeGuard[Loader]:
    """Whether there is something to evaluate on."""
    return loader is not None and bool(loader.batches.order.num_samples)


def reshard(model: nn.Module) -> None:
    """Let go of gathered parameters. Without a backward pass they stay, and hide what is done to the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def perplexity(forward_step: ForwardStep, sums: Sums) -> float | None:
    """The exponential of a loss in nats per token; `None` where the forward step does not say that it is one."""
    if not is_in_nats_per_token(forward_step):
        return None
    return math.inf if sums.mean_loss >= 700 else math.exp(sums.mean_loss)


def _with_stand_ins(batches: Iterator[Any], ranks: Ranks) -> Iterator[tuple[Any, bool]]:
    """Batches, and whether they count; for an empty one the first that was not, or another rank's."""
    stand_in: Any = None
    for batch in batches:
        own_is_empty = is_empty(batch)
        if stand_in is None and any(ranks.gather(own_is_empty)):
            stand_in = next((each for each in ranks.gather(batch) if not is_empty(each)), None)
            if stand_in is None:  # on every rank: records that cannot be read were left out
                continue
        stand_in = batch if stand_in is None else stand_in
        yield (stand_in, False) if own_is_empty else (batch, True)
