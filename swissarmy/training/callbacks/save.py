"""Checkpoints during a run, and going on from one."""

import logging
from typing import final

from swissarmy.training.callbacks.base import Callback, Run, StepReport
from swissarmy.training.callbacks.metrics_file import METRICS
from swissarmy.training.checkpoint.checkpoints import Checkpoints
from swissarmy.training.checkpoint.state import TrainState

_LOG = logging.getLogger(__name__)


@final
class Save(Callback):
    """Saves at intervals and at the end, where there are intervals; where a signal ends the run, always.

    Args:
        checkpoints: Where to.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_step(self, run: Run, report: StepReport) -> None:
        """Save where it is due; after the last step, what else is due comes first."""
        interval = run.config.save_interval
        if interval is not None and report.step % interval == 0 and not run.is_last_step:
            run.was_saved(self.checkpoints.save(state_of(run)))

    def on_finish(self, run: Run) -> None:
        """Save what the run ends with, unless it is there."""
        is_due = run.config.save_interval is not None or run.signal is not None
        if is_due and run.step and run.step != self.checkpoints.newest:
            run.was_saved(self.checkpoints.save(state_of(run)))

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Wait for what is still being written; if a rank that takes part is gone, that fails at once."""
        self.checkpoints.wait()


def state_of(run: Run) -> TrainState:
    """All that a run goes on from."""
    return TrainState(
        model=run.model,
        optimizer=run.optimizer,
        ema=run.ema,
        scaler=run.scaler,
        loader=run.loaders.train,
        step=run.step,
        extra={**run.state_dict(), "config": run.config.to_save()},
    )


def resume(run: Run, checkpoints: Checkpoints) -> None:
    """Go on from the newest checkpoint, if there is one and the run is to be resumed.

    Raises:
        CheckpointError: There is none and there must be, or it does not fit.
        FingerprintError: The data changed.
    """
    state = state_of(run)
    if checkpoints.resume(state) is not None:
        run.step = state.step
        run.load_state_dict(state.extra)
        if run.step > run.train_iters:
            _LOG.warning("%s is at step %d, beyond its new last step %d", run.folder, run.step, run.train_iters)
    elif (run.folder / METRICS).exists():
        _LOG.warning("%s holds a run without a checkpoint to resume from: it begins anew", run.folder)
