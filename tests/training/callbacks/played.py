"""A run that is played to callbacks without training: what the loop would tell them, step by step."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from swissarmy.backbone.model import Model
from swissarmy.data.build import build_loaders
from swissarmy.training.callbacks.base import Callback, Evaluation, RankTrouble, Run, Skip, StepReport
from swissarmy.training.ranks import Ranks
from tests.training.tiny_runs import config_for, model_of, open_rows


def make_run(folder: Path, *, model: Model | None = None, ranks: Ranks | None = None, **changes: Any) -> Run:
    """A run of 30 steps on two sources, of which one is drawn twice as often."""
    settings = {"train_iters": 30, "train_data": ("rows:40", "rows:30"), "train_data_weights": (2.0, 1.0)}
    settings |= {"train_data_weights_mean": "share", **changes}
    config = config_for(folder, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    model = model_of() if model is None else model
    loaders = build_loaders(
        config, global_batch_size=12, num_steps=config.train_iters, vocab_size=64, create_dataset=open_rows
    )
    unseen: Any = None  # no callback of these looks at them
    return Run(
        config=config,
        model=model,
        forward_step=unseen,
        optimizer=torch.optim.SGD(model.parameters()),
        scaler=unseen,
        ema=None,
        spikes=unseen,
        loaders=loaders,
        ranks=Ranks() if ranks is None else ranks,
        folder=folder,
        train_iters=config.train_iters or 0,
    )


def report_of(step: int, **changes: Any) -> StepReport:
    """A step of 12 samples of 10 tokens in half a second."""
    values = {
        "step": step,
        "loss": 4.0 * math.exp(-step / 10) + 0.2 * math.sin(step * step),
        "count": 108.0,
        "metrics": {"accuracy": step / 100},
        "lr": 1e-3 / step,
        "grad_norm": 1.0 + 1 / step,
        "tokens": 120,
        "samples": 12,
        "seconds": 0.5,
        "waited": 0.005,
    }
    return StepReport(**{**values, **changes})


def evaluation_of(step: int, name: str = "valid") -> Evaluation:
    loss = 4.0 * math.exp(-step / 10) + 0.4
    metrics = {"perplexity": math.exp(loss)}
    return Evaluation(step=step, name=name, loss=loss, count=90.0, metrics=metrics, seconds=0.25)


def skip_of(step: int, in_a_row: int = 1) -> Skip:
    """Of two ranks, of which the second saw a NaN."""
    fine = RankTrouble(rank=0, loss_sum=12.5, count=50.0, sample_ids=(72, 73), bad_gradients=())
    bad = RankTrouble(rank=1, loss_sum=math.nan, count=58.0, sample_ids=(78,), bad_gradients=("transformer.lm_head",))
    return Skip(step=step, reason="the loss is not finite", in_a_row=in_a_row, ranks=(fine, bad))


def play(
    run: Run, callbacks: Sequence[Callback], until: int, *, skips: Sequence[int] = (), eval_interval: int = 10
) -> None:
    """Steps from where the run stands, as the loop takes them; the run neither starts nor ends."""
    run.callbacks = callbacks
    for step in range(run.step + 1, until + 1):
        run.step = step
        if step in skips:
            run.skipped += 1
            for callback in callbacks:
                callback.on_skip(run, skip_of(step))
        run.last = report_of(step, loss=math.nan) if step in skips else report_of(step)
        for callback in callbacks:
            callback.on_step(run, run.last)
        if step % eval_interval == 0:
            run.was_evaluated(evaluation_of(step))


def start(run: Run, callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        callback.on_start(run)


def end(run: Run, callbacks: Sequence[Callback], error: BaseException | None = None) -> None:
    for callback in callbacks:
        callback.on_end(run, error)
