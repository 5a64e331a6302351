"""`train`: from a model, a forward step and data to a trained model, on a laptop or on many hosts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

from swissarmy.backbone.model import Model
from swissarmy.data.loading.batches import Collate
from swissarmy.data.prepare import CreateDataset
from swissarmy.data.samples.function_encoder import Encode
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.training.callbacks.base import Callback, Evaluation, Run
from swissarmy.training.callbacks.early_stop import EarlyStop
from swissarmy.training.callbacks.evaluate import Evaluate, take_averaged_weights
from swissarmy.training.callbacks.log import log_callbacks
from swissarmy.training.callbacks.save import Save, resume
from swissarmy.training.checkpoint.checkpoints import Checkpoints
from swissarmy.training.checkpoint.final import save_final
from swissarmy.training.checkpoint.lock import RunLock
from swissarmy.training.checkpoint.signals import StopSignals
from swissarmy.training.config import TrainConfig
from swissarmy.training.ema import WeightAverage
from swissarmy.training.folder import FINAL, check_folder, forget_run, open_folder, write_config
from swissarmy.training.loop import train_steps
from swissarmy.training.memory import keep_freed_memory
from swissarmy.training.optimizer import make_optimizer
from swissarmy.training.parallel.materialize import Weights
from swissarmy.training.parallel.shared_samples import plain_tensors_are_whole
from swissarmy.training.precision import LossScaler
from swissarmy.training.prepare import (
    check_arguments,
    check_model,
    check_ranks_agree,
    in_training_mode,
    make_loaders,
    own_random_state,
    prepare_model,
)
from swissarmy.training.ranks import joined_ranks
from swissarmy.training.sample_sizes import sized_for
from swissarmy.training.spikes import Spikes
from swissarmy.training.window import ForwardStep


@final
@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended; the same on every rank."""

    step: int
    """How many steps were done, skipped ones included, and those before it was resumed."""
    loss: float | None
    """The mean loss of the last step; `None` if none was taken."""
    evaluations: Mapping[str, Evaluation]
    """The last evaluation of the `valid` and of the `test` data."""
    skipped: int
    """How many steps were skipped."""
    stop_reason: str | None
    """Why it ended before its last step; `None`: it did not."""
    signal: int | None
    """The signal that ended it, if one did: it can be resumed, and there is no `final/`."""
    folder: Path
    """The run's folder."""

    @classmethod
    def of(cls, run: Run) -> "TrainResult":
        """The result of a run that has ended."""
        return cls(
            step=run.step,
            loss=None if run.last is None else run.last.loss,
            evaluations=run.evaluations,
            skipped=run.skipped,
            stop_reason=run.stop_reason,
            signal=run.signal,
            folder=run.folder,
        )


def train(
    model: Model,
    forward_step: ForwardStep,
    create_dataset: CreateDataset | None,
    config: TrainConfig,
    *,
    callbacks: Sequence[Callback] = (),
    tokenizer: Tokenizer | None = None,
    encode: Encode | None = None,
    collate: Collate | None = None,
    weights: Weights | None = None,
) -> TrainResult:
    """Train a model.

    It runs in this process, in the processes that `torchrun` started, or in a process group that is there already. All
    that can fail without a step is tried before the first one.

    Args:
        model: It is trained in place, and has in the end the weights that `final/` has: with `ema_decay` or
            `schedule_free` their average.
        forward_step: From a batch and the model to the sum of its losses and how many they are, and perhaps metrics.
        create_dataset: Opens a path of the config; `None` for the stock one, which goes by the extension.
        config: Everything else. A resolved copy is written to the run's folder.
        callbacks: What else is to happen; they come before the stock ones.
        tokenizer: Makes ids, where records are text; it is kept beside the final model.
        encode: Makes a sample of a record, instead of the encoder that the config describes; a function of the record
            will do.
        collate: Makes a batch of samples, instead of the collator that the config describes.
        weights: Fills a model on the meta device, after it was sharded.

    Raises:
        ConfigError: The config, the model, the data and the processes do not fit each other.
        DataError: Data cannot be read.
        CheckpointError: A checkpoint cannot be written, or read to resume from.
        TrainingError: Too many steps in a row had to be skipped.
    """
    check_arguments(model, config, callbacks, weights)
    with ExitStack() as contexts:
        ranks = contexts.enter_context(joined_ranks(config))
        contexts.enter_context(own_random_state(config.seed + ranks.data_rank, ranks.device))
        folder = ranks.on_first(partial(open_folder, config))
        contexts.enter_context(RunLock(folder, ranks))
        ranks.on_first(partial(check_folder, config))
        signals = contexts.enter_context(StopSignals())
        if config.keep_memory and ranks.device.type == "cpu":
            keep_freed_memory()

        check_model(model, forward_step, config, ranks)
        config = sized_for(config, model)
        loaders = ranks.together(
            partial(make_loaders, config, model, forward_step, ranks, tokenizer, create_dataset, encode, collate)
        )
        check_ranks_agree(config, model, loaders, ranks)
        contexts.enter_context(in_training_mode(model))
        contexts.enter_context(plain_tensors_are_whole())
        prepare_model(model, config, ranks, weights)
        optimizer = make_optimizer(model, config)
        checkpoints = Checkpoints(folder, config, ranks, timeout=config.distributed_timeout)
        assert loaders.train is not None, "the config refuses a run without train data"
        assert loaders.train.num_steps is not None, "the config refuses a run without end"
        run = Run(
            config=config,
            model=model,
            forward_step=forward_step,
            optimizer=optimizer,
            scaler=LossScaler(config),
            ema=None if config.ema_decay is None else WeightAverage(model, config.ema_decay),
            spikes=Spikes(config),
            loaders=loaders,
            ranks=ranks,
            folder=folder,
            train_iters=loaders.train.num_steps,
            tokenizer=tokenizer,
            callbacks=(*callbacks, *_stock_callbacks(config, signals, checkpoints)),
        )
        resume(run, checkpoints)
        _carry_out(run, signals, checkpoints)
        return TrainResult.of(run)


def _stock_callbacks(config: TrainConfig, signals: StopSignals, checkpoints: Checkpoints) -> Iterator[Callback]:
    """Those that look come before those that may end the run; what is saved comes last, with what all have counted."""
    yield from log_callbacks(config)
    yield Evaluate(signals)
    if config.early_stopping is not None:
        yield EarlyStop(config.early_stopping)
    yield Save(checkpoints)


def _carry_out(run: Run, signals: StopSignals, checkpoints: Checkpoints) -> None:
    """Start or resume, take the steps, and give the model away; callbacks hear of the end, however it comes."""
    try:
        for callback in run.callbacks:
            callback.on_start(run)
        run.ranks.on_first(partial(write_config, run.config, run.folder))
        train_steps(run, signals, checkpoints)
        for callback in run.callbacks:
            callback.on_finish(run)
        if run.signal is None:
            take_averaged_weights(run)
            save_final(run.model, run.folder / FINAL, run.tokenizer, run.ranks)
    except BaseException as error:
        with suppress(Exception):  # what went wrong first is what counts
            _tell_of_the_end(run, error)
        raise
    else:
        _tell_of_the_end(run, None)
    finally:
        if run.step == 0 and run.ranks.is_first and not (run.folder / FINAL).exists():
            forget_run(run.folder)


def _tell_of_the_end(run: Run, error: BaseException | None) -> None:
    """Call every `on_end`, in order, also where one of them fails."""
    with ExitStack() as calls:
        for callback in reversed(run.callbacks):
            calls.callback(callback.on_end, run, error)
