"""Runs that take a moment: a tiny model in float64, rows of different lengths, a forward step written out by hand."""

import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.testing import tiny_model
from swissarmy.training.callbacks.base import Callback, Evaluation, Run, Skip, StepReport
from swissarmy.training.config import TrainConfig
from swissarmy.training.train import TrainResult, train
from swissarmy.training.window import nats_per_token


class Rows:
    """Rows of 3 to 9 tokens; the first token is the number of the row, so that samples can be told apart."""

    def __init__(self, length: int = 40) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [index, *((index * 7 + place * 5) % 61 for place in range(2 + index % 7))]}


def open_rows(path: str, config: object) -> Rows:
    """`rows:40` is 40 rows."""
    del config
    return Rows(int(path.partition(":")[2]))


@nats_per_token
def step(batch: dict[str, Tensor], model: Any) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The next token's loss, summed, and how often the best guess was right."""
    inputs = {name: batch[name] for name in ("input_ids", "padding_mask", "position_ids")}
    logits, *_ = model(**inputs)
    scored, targets = batch["loss_mask"][:, 1:], batch["input_ids"][:, 1:]
    log_probabilities = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    right = ((logits[:, :-1].argmax(-1) == targets) & scored).sum()
    return -(log_probabilities * scored).sum(), scored.sum(), {"accuracy": (right, scored.sum())}


def model_of(family: str = "gpt2", seed: int = 0, **changes: Any) -> Model:
    """A tiny model in float64."""
    return tiny_model(family, seed=seed, scale=2.0, **changes).double()


def config_for(folder: Path, **changes: Any) -> TrainConfig:
    """Three steps of eight samples without weight decay, told to nobody."""
    settings = {
        "output": str(folder),
        "train_data": ("rows:40",),
        "record_format": "tokens",
        "train_iters": None if "epochs" in changes else 3,
        "global_batch_size": None if "batch_size" in changes else 8,
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "live": False,
        "keep_memory": False,
    }
    return TrainConfig(**{**settings, **changes})


def run(
    folder: Path,
    *,
    model: Model | None = None,
    forward_step: Callable[..., Any] = step,
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> TrainResult:
    """Train a tiny model."""
    chosen = model_of() if model is None else model
    return train(chosen, forward_step, open_rows, config_for(folder, **changes), callbacks=callbacks)


def trained_weights(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Train, and give the weights."""
    model = options.pop("model", None) or model_of()
    run(folder, model=model, **options)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def signalled(number: int, *, call: int, evaluating: bool = False) -> Callable[[Any, Any], Any]:
    """A forward step during whose so manieth call, in training or in evaluations, this process gets a signal."""
    calls = 0

    def interrupted(batch: Any, model: Any) -> Any:
        nonlocal calls
        calls += model.training is not evaluating
        if model.training is not evaluating and calls == call:
            os.kill(os.getpid(), number)
        return step(batch, model)

    return nats_per_token(interrupted)


class Diary(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.reports: list[StepReport] = []
        self.skips: list[Skip] = []
        self.evaluations: list[Evaluation] = []

    def on_start(self, run: Run) -> None:
        self.entries.append("start")

    def on_step(self, run: Run, report: StepReport) -> None:
        self.entries.append(f"step {report.step}")
        self.reports.append(report)

    def on_skip(self, run: Run, skip: Skip) -> None:
        self.entries.append(f"skip {skip.step}")
        self.skips.append(skip)

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> None:
        self.entries.append(f"{evaluation.name} {evaluation.step}")
        self.evaluations.append(evaluation)

    def on_save(self, run: Run, folder: Path) -> None:
        self.entries.append(f"save {run.step}")

    def on_end(self, run: Run, error: BaseException | None) -> None:
        self.entries.append("end" if error is None else f"end with {type(error).__name__}")


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Between tensors of the same names."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def with_nan_in(calls: set[int], step: Callable[..., Any] = step) -> Callable[..., Any]:
    """A step whose loss is NaN in some of its calls, counted from 1."""
    made = 0

    @wraps(step)
    def broken(batch: dict[str, Tensor], model: Any) -> Any:
        nonlocal made
        made += 1
        loss, *rest = step(batch, model)
        return (loss * torch.nan if made in calls else loss, *rest)

    return broken
