"""What a run tells of itself: each record goes to `metrics.jsonl`, `log.txt`, the terminal, and the trackers.

A record is that of its step alone and no mean over steps, so that a resumed run writes what an uninterrupted one does;
only speeds are over the steps since the record before.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn

from swissarmy.backbone.model import Model
from swissarmy.core.config import Config
from swissarmy.data.config import DataConfig
from swissarmy.data.order.sample_order import SampleOrder
from swissarmy.data.order.weights import parse_stages, parse_weights
from swissarmy.training.callbacks.base import Callback, Evaluation, Run, Skip, StepReport
from swissarmy.training.callbacks.display import display
from swissarmy.training.callbacks.lines import Lines, duration
from swissarmy.training.callbacks.metrics_file import METRICS, MetricsFile
from swissarmy.training.callbacks.profile import ProfileCallback
from swissarmy.training.callbacks.report import ReportCallback, report_path
from swissarmy.training.callbacks.sinks import Record, Sink
from swissarmy.training.callbacks.trackers import trackers
from swissarmy.training.flops import TrainingCost
from swissarmy.training.throughput import Meter, peak_flops, peak_memory

_LOG = logging.getLogger(__name__)
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LogOptions(Config):
    """What is told of a run, where, and how often."""

    log_interval: int = 10
    """Steps from one record to the next; the first and the last step always have one."""
    live: bool | None = None
    """Whether a display is redrawn in place, in place of lines; `None`: on a terminal."""
    tensorboard: bool = False
    """Whether records go to TensorBoard, into the folder `tensorboard` of the run."""
    wandb: bool = False
    """Whether records go to Weights & Biases."""
    trackio: bool = False
    """Whether records go to trackio."""
    project: str | None = None
    """The project at Weights & Biases and trackio; `swissarmy` when `None`."""
    run_name: str | None = None
    """What the run is called there; the name of its folder when `None`."""
    profile: tuple[int, int] | None = None
    """The first and the last step that are profiled, into the folder `profile` of the run."""

    def problems(self) -> Iterator[str]:
        """Intervals that are none."""
        if self.log_interval < 1:
            yield f"log_interval={self.log_interval} must be at least 1"
        if self.profile is not None and (len(self.profile) != 2 or not 1 <= self.profile[0] <= self.profile[1]):
            yield f"profile={self.profile} must be the first and the last step to profile, from 1 on"


def log_callbacks(options: LogOptions) -> list[Callback]:
    """What makes a run visible, as the options say; reports of skipped steps come first."""
    profile = [] if options.profile is None else [ProfileCallback(*options.profile)]
    return [ReportCallback(), LogCallback(options), *profile]


@final
class LogCallback(Callback):
    """Makes the records of a run on its first rank, and hands them to all sinks.

    Args:
        options: Where they go.
        sinks: Where they go besides.
    """

    def __init__(self, options: LogOptions, sinks: Sequence[Sink] = ()) -> None:
        self.options = options
        self.tokens = 0
        """How many tokens the model was trained on."""
        self.samples = 0
        self._added = tuple(sinks)
        self._sinks: list[Sink] = []
        self._failed: list[Sink] = []
        self._meter = Meter(options.log_interval)
        self._unwritten: StepReport | None = None
        self._sources: list[str] = []
        self._handler: _ToSinks | None = None
        self._start = time.monotonic()

    def on_start(self, run: Run) -> None:
        """Open the files, and say what is about to happen.

        Raises:
            MissingExtraError: A tracker is not installed.
            OSError: A file cannot be written.
        """
        self._start = time.monotonic()
        run.ranks.on_first(lambda: self._open(run))

    def _open(self, run: Run) -> None:
        self._meter, self._sources = _meter(self.options.log_interval, run), _drawn(run.config)
        made = trackers(run, self.options)
        evaluated = [name for name, each in run.evaluations.items() if each.step == run.step]
        self._sinks = [
            MetricsFile(run.folder / METRICS, step=run.step, evaluated=evaluated),
            Lines.into(run.folder / "log.txt", run.train_iters),
            display(run, live=self.options.live),
            *made,
            *self._added,
        ]
        self._handler = _ToSinks(self._sinks)
        logging.getLogger("swissarmy").addHandler(self._handler)
        for line in _opening(run):
            self._note(line)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Write a record, if it is due."""
        self.tokens += report.tokens
        self.samples += report.samples
        if not run.ranks.is_first:
            return
        self._meter.add(report)
        is_due = report.step == 1 or report.step % self.options.log_interval == 0 or run.is_last_step
        self._unwritten = None if is_due else report
        self._write_step(run, report, [sink for sink in self._sinks if is_due or sink.every_step])

    def on_finish(self, run: Run) -> None:
        """Write a record of the last step, where nobody knew that it was the last."""
        if self._unwritten is not None:
            self._write_step(run, self._unwritten, [sink for sink in self._sinks if not sink.every_step])

    def on_skip(self, run: Run, skip: Skip) -> None:
        """Write a record with the samples of the window."""
        samples = sorted({number for trouble in skip.ranks for number in trouble.sample_ids})
        report = str(report_path(run.folder, skip.step).relative_to(run.folder))
        fields = {"reason": skip.reason, "in_a_row": skip.in_a_row, "sample_ids": samples, "report": report}
        self._write({"kind": "skip", "step": skip.step, "time": time.time(), **fields})

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> None:
        """Write a record."""
        fields = {**vars(evaluation), "metrics": dict(evaluation.metrics), "best_loss": _best(run, evaluation)}
        self._write({"kind": "evaluation", "step": evaluation.step, "time": time.time(), **fields})

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Say how it went, and close the files."""
        for line in _closing(run, error, time.monotonic() - self._start) if self._sinks else ():
            self._note(line)
        if self._handler is not None:
            logging.getLogger("swissarmy").removeHandler(self._handler)
            self._handler = None
        while self._sinks:
            self._tell([self._sinks.pop()], lambda sink: sink.close())

    def state_dict(self) -> dict[str, Any]:
        """What was counted."""
        return {"tokens": self.tokens, "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.tokens, self.samples = int(state["tokens"]), int(state["samples"])

    def _write_step(self, run: Run, report: StepReport, sinks: Sequence[Sink]) -> None:
        if sinks:
            self._write(self._record(run, report), sinks)

    def _record(self, run: Run, report: StepReport) -> Record:
        return {
            "kind": "step",
            "step": report.step,
            "time": time.time(),
            "loss": report.loss,
            "metrics": dict(report.metrics),
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "count": report.count,
            "tokens": self.tokens,
            "samples": self.samples,
            "skipped": run.skipped,
            **self._meter.speeds(),
            "seconds_left": max(run.train_iters - report.step, 0) * self._meter.seconds,
            "memory": peak_memory(run.ranks.device),
            "blend": self._blend(run),
        }

    def _blend(self, run: Run) -> dict[str, float]:
        """The share of each source in the samples so far, where there are several."""
        batches = None if run.loaders.train is None else run.loaders.train.batches
        if batches is None or len(self._sources) < 2 or not isinstance(batches.order, SampleOrder):
            return {}
        uses = batches.order.uses(run.step * batches.layout.global_batch_size)
        return {name: use.share for name, use in zip(self._sources, uses, strict=False)}

    def _write(self, record: Record, sinks: Sequence[Sink] | None = None) -> None:
        self._tell(self._sinks if sinks is None else sinks, lambda sink: sink.write(record))

    def _note(self, text: str) -> None:
        self._tell(self._sinks, lambda sink: sink.note(text))

    def _tell(self, sinks: Sequence[Sink], action: Callable[[Sink], None]) -> None:
        """Each sink; one that takes nothing more, as where the disk is full, is no reason to stop training."""
        for sink in sinks:
            try:
                action(sink)
            except OSError as error:
                if sink not in self._failed:
                    self._failed.append(sink)
                    _LOG.warning("a record was not written, and the run goes on: %s", error)


@final
class _ToSinks(logging.Handler):
    """Shows the warnings of the library where the records are shown."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        super().__init__(logging.WARNING)
        self._all = sinks

    def emit(self, record: logging.LogRecord) -> None:
        for sink in self._all:
            with suppress(OSError):
                sink.note(f"{record.levelname.lower()}: {record.getMessage()}")


def _meter(window: int, run: Run) -> Meter:
    if not isinstance(run.model, Model):
        return Meter(window)
    peak = peak_flops(run.ranks.device, _dtype(run.config.precision, run.model))
    return Meter(window, TrainingCost.of(run.model), peak * run.ranks.world_size)


def _best(run: Run, evaluation: Evaluation) -> float | None:
    """The lowest loss on the valid set with this evaluation, of which the run does not know yet."""
    if evaluation.name != "valid":
        return run.best_loss
    return evaluation.loss if run.best_loss is None else min(run.best_loss, evaluation.loss)


def _opening(run: Run) -> Iterator[str]:
    parameters = list(run.model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    live = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    processes = f"{run.ranks.world_size} process{'es'[: 2 * (run.ranks.world_size != 1)]}"
    yield f"{run.folder}: {total:,} parameters, of which {live:,} train, on {processes} ({run.ranks.device.type})"
    if run.config.sequence_length is not None:
        yield f"samples: at most {run.config.sequence_length:,} tokens"
    yield from run.loaders.plan
    if run.step:
        yield f"resumed after step {run.step:,}"


def _closing(run: Run, error: BaseException | None, seconds: float) -> Iterator[str]:
    how = f"{run.step:,} of {run.train_iters:,} steps in {duration(seconds)}"
    if error is not None:
        text = str(error).splitlines()
        yield f"failed after {how}: {type(error).__name__}{f': {text[0]}' if text else ''}"
    elif run.stop_reason is not None:
        yield f"stopped after {how}: {run.stop_reason}"
    else:
        yield f"done: {how}"


def _drawn(config: DataConfig) -> list[str]:
    """The train data that has weight at some time, as the loader has it."""
    changed = [parse_weights(weights) for _, weights in parse_stages(config.train_data_weights_schedule)]
    stages = [parse_weights(config.train_data_weights or [1] * len(config.train_data)), *changed]
    return [path for path, weights in zip(config.train_data, zip(*stages, strict=True), strict=True) if any(weights)]


def _dtype(precision: str | None, model: nn.Module) -> torch.dtype:
    """What the products are computed in."""
    return _DTYPES[precision] if precision is not None else next(model.parameters()).dtype
