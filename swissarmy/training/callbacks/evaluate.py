"""Evaluation during a run: the valid set before it, at intervals and at the end, the test set once."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, final

import torch

from swissarmy.data.loading.loader import Loader
from swissarmy.training.callbacks.base import Callback, Evaluation, Run, StepReport
from swissarmy.training.checkpoint.signals import StopSignals
from swissarmy.training.evaluate import evaluate, has_samples, perplexity, reshard
from swissarmy.training.optimizer import take_weights_to_evaluate, weights_to_evaluate

_LOG = logging.getLogger(__name__)


@final
class Evaluate(Callback):
    """Evaluates with the averaged weights where the run keeps them.

    Where a signal ends the run, also during an evaluation, time is short: what is due then is evaluated when the run is
    resumed.

    Args:
        signals: Looked at before each batch.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_start(self, run: Run) -> None:
        """Evaluate before the first step, where that is wanted, or what was due when a signal came."""
        if run.step:
            self._evaluate_if_due(run)
        elif run.config.eval_on_start:
            self._evaluate_valid(run)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Evaluate where it is due."""
        self._evaluate_if_due(run)

    def on_finish(self, run: Run) -> None:
        """Evaluate what the run ends with."""
        self._evaluate_valid(run)
        self._evaluate(run, "test", run.loaders.test, None)

    def _evaluate_if_due(self, run: Run) -> None:
        if run.config.eval_interval is not None and run.step % run.config.eval_interval == 0:
            self._evaluate_valid(run)

    def _evaluate_valid(self, run: Run) -> None:
        self._evaluate(run, "valid", run.loaders.valid, run.config.eval_iters)

    def _evaluate(self, run: Run, name: str, loader: Loader | None, max_batches: int | None) -> None:
        last = run.evaluations.get(name)
        if run.signal is not None or not has_samples(loader) or (last is not None and last.step == run.step):
            return
        began = time.perf_counter()
        with averaged_weights(run):
            sums = evaluate(
                run.model,
                self._until_a_signal(run, loader),
                run.forward_step,
                ranks=run.ranks,
                precision=run.config,
                max_batches=max_batches,
            )
        if run.signal is not None:
            return
        if not sums.count:
            _LOG.warning("step %d: nothing was counted in the %s data", run.step, name)
            return
        metrics = sums.mean_metrics
        if (exponential := perplexity(run.forward_step, sums)) is not None:
            metrics["perplexity"] = exponential
        seconds = time.perf_counter() - began
        run.was_evaluated(
            Evaluation(
                step=run.step, name=name, loss=sums.mean_loss, count=sums.count, metrics=metrics, seconds=seconds
            )
        )

    def _until_a_signal(self, run: Run, loader: Loader) -> Iterator[Any]:
        """Batches, for as long as no rank has to end."""
        for batch in loader:
            raised = torch.tensor(self.signals.raised(), dtype=run.ranks.number_type, device=run.ranks.device)
            run.heed_signals(run.ranks.sum(raised))
            if run.signal is not None:
                return
            yield batch


def averaged_weights(run: Run) -> ExitStack:
    """Inside, the model has the weights to evaluate; afterwards those it trains with, to the bit."""
    contexts = ExitStack()
    reshard(run.model)
    contexts.callback(reshard, run.model)
    contexts.enter_context(weights_to_evaluate(run.optimizer))
    if run.ema is not None:
        contexts.enter_context(run.ema.applied())
    return contexts


def take_averaged_weights(run: Run) -> None:
    """Give the model the weights to evaluate for good: no step follows."""
    reshard(run.model)
    take_weights_to_evaluate(run.optimizer)
    if run.ema is not None:
        run.ema.apply()
