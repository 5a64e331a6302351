"""Evaluation during a run: the valid set before it, at intervals and at the end, the test set once."""

import logging
import time
from contextlib import ExitStack
from typing import final

from swissarmy.core.errors import ConfigError
from swissarmy.data.loading.loader import Loader
from swissarmy.training.callbacks.base import Callback, Evaluation, Run, StepReport
from swissarmy.training.evaluate import evaluate, perplexity, reshard
from swissarmy.training.optimizer import weights_to_evaluate

_LOG = logging.getLogger(__name__)


@final
class Evaluate(Callback):
    """Evaluates with the averaged weights where the run keeps them. What a signal ends is not evaluated first."""

    def on_start(self, run: Run) -> None:
        """Evaluate first, where that is wanted, in a run that is not resumed.

        Raises:
            ConfigError: There are no valid data, and settings that want some.
        """
        config = run.config
        asked = config.eval_on_start or config.eval_interval is not None or config.early_stopping is not None
        if asked and not _has_samples(run.loaders.valid):
            setting = "eval_interval" if config.eval_interval is not None else "eval_on_start"
            raise ConfigError(f"there is nothing to evaluate on: give valid_data or split, or leave out {setting}.")
        if config.eval_on_start and run.step == 0:
            self._evaluate(run, "valid", run.loaders.valid, config.eval_iters)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Evaluate where it is due."""
        interval = run.config.eval_interval
        is_due = interval is not None and report.step % interval == 0
        if run.signal is None and (is_due or run.is_last_step):
            self._evaluate(run, "valid", run.loaders.valid, run.config.eval_iters)
        if run.signal is None and run.is_last_step:
            self._evaluate(run, "test", run.loaders.test, None)

    def _evaluate(self, run: Run, name: str, loader: Loader | None, max_batches: int | None) -> None:
        if loader is None or not _has_samples(loader):
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
        if (exponential := perplexity(sums)) is not None:
            metrics["perplexity"] = exponential
        seconds = time.perf_counter() - began
        run.was_evaluated(
            Evaluation(
                step=run.step, name=name, loss=sums.mean_loss, count=sums.count, metrics=metrics, seconds=seconds
            )
        )


def averaged_weights(run: Run) -> ExitStack:
    """Inside, the model has the weights to evaluate and to give away."""
    contexts = ExitStack()
    reshard(run.model)
    contexts.callback(reshard, run.model)
    contexts.enter_context(weights_to_evaluate(run.optimizer))
    if run.ema is not None:
        contexts.enter_context(run.ema.applied())
    return contexts


def _has_samples(loader: Loader | None) -> bool:
    return loader is not None and bool(loader.batches.order.num_samples)
