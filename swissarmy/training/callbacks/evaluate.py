"""Evaluation during a run: the valid set before it, at intervals and at the end, the test set once."""

import logging
import time
from contextlib import ExitStack
from typing import final

from swissarmy.data.loading.loader import Loader
from swissarmy.training.callbacks.base import Callback, Evaluation, Run, StepReport
from swissarmy.training.evaluate import evaluate, has_samples, perplexity, reshard
from swissarmy.training.optimizer import take_weights_to_evaluate, weights_to_evaluate

_LOG = logging.getLogger(__name__)


@final
class Evaluate(Callback):
    """Evaluates with the averaged weights where the run keeps them.

    Where a signal ends the run, time is short: what is due after that step is evaluated when the run is resumed.
    """

    def on_start(self, run: Run) -> None:
        """Evaluate before the first step, where that is wanted, or what was due when a signal came."""
        if run.step:
            self._evaluate_if_due(run)
        elif run.config.eval_on_start:
            self._evaluate(run, "valid", run.loaders.valid, run.config.eval_iters)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Evaluate where it is due."""
        if run.signal is None:
            self._evaluate_if_due(run)

    def _evaluate_if_due(self, run: Run) -> None:
        interval = run.config.eval_interval
        if run.is_last_step or (interval is not None and run.step % interval == 0):
            self._evaluate(run, "valid", run.loaders.valid, run.config.eval_iters)
        if run.is_last_step:
            self._evaluate(run, "test", run.loaders.test, None)

    def _evaluate(self, run: Run, name: str, loader: Loader | None, max_batches: int | None) -> None:
        last = run.evaluations.get(name)
        if not has_samples(loader) or (last is not None and last.step == run.step):
            return
        began = time.perf_counter()
        with averaged_weights(run):
            sums = evaluate(
                run.model,
                loader,
                run.forward_step,
                ranks=run.ranks,
                precision=run.config,
                max_batches=max_batches,
            )
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
