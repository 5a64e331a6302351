"""`TrainConfig`: everything about a run that is no code, in one flat place."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from swissarmy.core.config import Config
from swissarmy.core.errors import ConfigError
from swissarmy.data.config import DataConfig
from swissarmy.data.objectives.options import ObjectiveOptions
from swissarmy.training.callbacks.log import LogOptions
from swissarmy.training.checkpoint.options import CheckpointOptions
from swissarmy.training.evaluate import EvaluationOptions
from swissarmy.training.memory import MemoryOptions
from swissarmy.training.optimizer import OptimizerOptions
from swissarmy.training.parallel.mesh import ParallelOptions
from swissarmy.training.precision import PrecisionOptions
from swissarmy.training.schedule import ScheduleOptions
from swissarmy.training.spikes import SkipOptions


class BatchSizes(NamedTuple):
    """How a step's samples are shared."""

    global_batch_size: int
    """Samples of a step, over all ranks and micro-batches."""
    accumulation: int
    """Micro-batches of a step, on each rank."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(Config):
    """How long a run is, how large its steps are, and what of the model trains."""

    output: str
    """The run's folder: its config, metrics, checkpoints, and at last the model in `final/`."""
    train_iters: int | None = None
    """How many steps; or give `epochs`."""
    epochs: float | None = None
    """How often to go through the train data; or give `train_iters`."""
    batch_size: int | None = None
    """Samples of a micro-batch, on each rank. Of this, `global_batch_size` and `accumulation`, two give the third."""
    global_batch_size: int | None = None
    """Samples of a step, over all ranks and micro-batches."""
    accumulation: int | None = None
    """Micro-batches of a step; 1 where nothing else follows from the two sizes."""
    trainable: tuple[str, ...] = ()
    """Train only parameters whose names match (`mixins.lora`, `*.layers.11.*`); all, or as the model is, when empty."""
    compile: bool = False
    """Whether layers are compiled, each when it is first called."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Save memory by computing layers again in the backward pass: whole ones, or all but their products."""
    checkpoint_every_layers: int = 1
    """Which layers: every one, every second, ..."""

    def problems(self) -> Iterator[str]:
        """Lengths and sizes that are missing, twice there, or out of range."""
        if not self.output:
            yield "output is empty: give a folder for the run."
        if (self.train_iters is None) == (self.epochs is None):
            yield "give either train_iters or epochs."
        for name in ("train_iters", "batch_size", "global_batch_size", "accumulation", "checkpoint_every_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}={value} must be at least 1."
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            yield f"epochs={self.epochs} must be a number above 0."
        if self.batch_size is None and self.global_batch_size is None:
            yield "give batch_size (of each rank) or global_batch_size."

    def batch_sizes(self, data_size: int) -> BatchSizes:
        """The sizes of a step, where so many ranks read different samples.

        Raises:
            ConfigError: They do not fit each other.
        """
        whole, each, parts = self.global_batch_size, self.batch_size, self.accumulation
        if whole is None:
            assert each is not None, "the config refuses neither of the two"
            return BatchSizes(each * data_size * (parts or 1), parts or 1)
        if each is None:
            return BatchSizes(whole, parts or 1)
        one_round = each * data_size
        found = parts or max(whole // one_round, 1)
        if found * one_round != whole:
            times = f" x accumulation={parts}" if parts else ""
            near = found * one_round
            raise ConfigError(
                f"global_batch_size={whole} is not batch_size={each} x {data_size} ranks{times}: give {near}, or two "
                "of the three."
            )
        return BatchSizes(whole, found)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    MemoryOptions,
    SkipOptions,
    LogOptions,
    EvaluationOptions,
    CheckpointOptions,
    ParallelOptions,
    PrecisionOptions,
    ScheduleOptions,
    OptimizerOptions,
    ObjectiveOptions,
    DataConfig,
    RunOptions,
):
    """A run. The names are those of the fields here, of the keys in a YAML file, and of flags: `--train-iters 1000`.

    One `seed` decides the order of the data, and dropout; new weights are the caller's. A dataclass lists the fields of
    its last base first: those of the run come first.
    """

    def problems(self) -> Iterator[str]:
        """What every group of options has to say, each thing once."""
        groups = [group for group in reversed(TrainConfig.__bases__) if issubclass(group, Config)]
        yield from dict.fromkeys(problem for group in groups for problem in group.problems(self))
        if self.optimizer == "schedule_free" and self.lr_decay_style != "constant":
            yield f"lr_decay_style={self.lr_decay_style!r}: schedule_free takes a constant one, with or without warmup."
        if not self.train_data and (self.valid_data or self.test_data):
            yield "train_data is empty: give at least one file, folder or pattern to train on."

    def to_save(self) -> dict[str, Any]:
        """What is written beside the run: values from which the same config is made again."""
        return self.to_dict()
