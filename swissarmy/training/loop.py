"""The loop: what a run does, step by step. Everything else about it is a callback."""

import logging
import math
import time
from collections.abc import Iterator

import torch
from torch import nn

from swissarmy.training.callbacks.base import RankTrouble, Run, Skip, StepReport
from swissarmy.training.checkpoint.checkpoints import Checkpoints
from swissarmy.training.checkpoint.signals import StopSignals
from swissarmy.training.gradients import clip_factor
from swissarmy.training.optimizer import set_learning_rate, take_step
from swissarmy.training.own_part import own_part
from swissarmy.training.schedule import learning_rate
from swissarmy.training.spikes import TrainingError
from swissarmy.training.window import Accumulator, Window, run_window

_LOG = logging.getLogger(__name__)


def train_steps(run: Run, signals: StopSignals, checkpoints: Checkpoints) -> None:
    """Take the steps of a run, from where it stands to its end, or until something stops it.

    A window that gives a loss or a gradient that is not finite on any rank is discarded on all of them: weights and
    optimizer stay as they were; the schedule and the data go on.

    Raises:
        TrainingError: Too many windows in a row were discarded.
        CheckpointError: A checkpoint could not be written in the background.
    """

    def flags() -> tuple[bool, ...]:
        return *signals.raised(), checkpoints.failed

    loader = run.loaders.train
    assert loader is not None, "a run has data to train on"
    batches, totals = iter(loader), Accumulator(run.ranks)

    while not run.is_last_step:
        began = time.perf_counter()
        lr = learning_rate(run.config, run.step, run.train_iters)
        set_learning_rate(run.optimizer, lr)
        window = run_window(
            run.model,
            batches,
            run.forward_step,
            accumulation=loader.batches.layout.accumulation,
            precision=run.config,
            scaler=run.scaler,
            totals=totals,
            flags=flags,
        )
        run.step += 1
        whole = window.sums.count * run.scaler.scale  # what gradients are the sum over, instead of the mean
        grad_norm = math.sqrt(window.sums.squared_norm) / (whole or 1.0)
        problem = run.spikes.problem(window.sums.mean_loss, grad_norm)
        if problem is not None:
            _discard(run, window, problem)
        else:
            _take(run, window, grad_norm, whole)
        _adapt_scale(run, window, grad_norm)
        run.last = _report(window, step=run.step, lr=lr, grad_norm=grad_norm, began=began, skipped=problem)
        _heed_flags(run, window, checkpoints)
        for callback in run.callbacks:
            callback.on_step(run, run.last)
        if run.skipped_in_a_row >= run.config.max_skipped:
            raise _too_many_skipped(run, problem)


def _take(run: Run, window: Window, grad_norm: float, whole: float) -> None:
    """Take the step of a window; none where nothing was counted."""
    if window.sums.count == 0:
        _LOG.warning("step %d: nothing was counted on any rank, so no step is taken", run.step)
        run.optimizer.zero_grad(set_to_none=True)
        run.skipped_in_a_row += 1
        return
    take_step(run.optimizer, clip_factor(grad_norm, run.config.clip_grad_norm) / whole)
    run.spikes.remember(window.sums.mean_loss, grad_norm)
    run.skipped_in_a_row = 0
    if run.ema is not None:
        run.ema.update()


def _discard(run: Run, window: Window, problem: str) -> None:
    """Let go of a window's gradients, and tell what every rank saw in it."""
    run.skipped += 1
    run.skipped_in_a_row += 1
    loss_sum, count = window.own_loss.tolist()
    own = RankTrouble(
        rank=run.ranks.rank,
        loss_sum=loss_sum,
        count=count,
        sample_ids=window.sample_ids,
        bad_gradients=tuple(_bad_gradients(run.model)),
    )
    everyones = tuple(run.ranks.gather(own))
    skip = Skip(step=run.step, reason=problem, in_a_row=run.skipped_in_a_row, ranks=everyones)
    for callback in run.callbacks:
        callback.on_skip(run, skip)
    run.optimizer.zero_grad(set_to_none=True)


def _adapt_scale(run: Run, window: Window, grad_norm: float) -> None:
    """Tell the loss scale what became of the gradients; while it looks for its size, what is skipped is its doing."""
    overflowed = not math.isfinite(grad_norm)
    if overflowed and math.isfinite(window.sums.mean_loss) and run.scaler.is_searching:
        run.skipped_in_a_row = 0
    run.scaler.update(overflowed=overflowed)


def _report(window: Window, *, step: int, lr: float, grad_norm: float, began: float, skipped: str | None) -> StepReport:
    sums = window.sums
    return StepReport(
        step=step,
        loss=sums.mean_loss,
        count=sums.count,
        metrics=sums.mean_metrics,
        lr=lr,
        grad_norm=grad_norm,
        tokens=sums.tokens,
        samples=sums.samples,
        seconds=time.perf_counter() - began,
        waited=window.waited,
        skipped=skipped,
    )


def _bad_gradients(model: nn.Module, limit: int = 8) -> Iterator[str]:
    """The first parameters whose gradient is not finite on this rank."""
    for name, parameter in model.named_parameters():
        gradient = None if parameter.grad is None else own_part(parameter.grad)
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            yield name
            limit -= 1
            if not limit:
                return


def _heed_flags(run: Run, window: Window, checkpoints: Checkpoints) -> None:
    """What happened on one rank concerns all, and all hear of it in the same step."""
    *raised, failed = window.sums.flags
    if failed:
        checkpoints.wait()  # raises
    run.heed_signals(raised)


def _too_many_skipped(run: Run, problem: str | None) -> TrainingError:
    first, why = run.step - run.skipped_in_a_row + 1, problem or "nothing was counted"
    return TrainingError(
        f"steps {first} to {run.step} were all skipped (max_skipped={run.config.max_skipped}); of the last, {why}. "
        "The weights are those from before. Look at the samples that the log names, lower lr, or clip more."
    )
