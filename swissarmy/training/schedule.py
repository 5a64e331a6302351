"""The learning rate of every step, as a pure function of its number."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from swissarmy.core.config import Config

DecayStyle = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


@dataclass(frozen=True, kw_only=True)
class LearningRateOptions(Config):
    """What optimizer and schedule share."""

    lr: float = 3e-4
    """The learning rate at its peak; a parameter's attribute `lr_scale` multiplies it."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(LearningRateOptions):
    """How the learning rate rises and falls."""

    lr_decay_style: DecayStyle = "cosine"
    """`cosine` and `linear` fall to the floor at the last step; `wsd` (warmup, stable, decay) falls only in its last
    part; `inverse_sqrt` falls with the root of the step's number; `constant` stays."""
    warmup: float = 0.0
    """For how long the rate rises in a straight line: in steps from 1 on, below 1 as a share of the run."""
    lr_floor: float = 0.1
    """Where the rate ends, as a share of the peak."""
    decay: float = 0.2
    """How long the last part of `wsd` is: in steps from 1 on, below 1 as a share of the run."""

    def problems(self) -> Iterator[str]:
        """Numbers out of range."""
        for name in ("warmup", "decay"):
            length = getattr(self, name)
            if not 0 <= length < math.inf or (length > 1 and length != int(length)):
                yield f"{name}={length} must be a whole number of steps, or a share of the run below 1."
        if not 0 <= self.lr_floor <= 1:
            yield f"lr_floor={self.lr_floor} must be a share from 0 to 1."


def learning_rate(options: ScheduleOptions, step: int, train_iters: int) -> float:
    """The learning rate of a step.

    Args:
        options: With the peak, `lr`.
        step: How many steps were done before, from 0 on; beyond the run the rate stays where it ended.
        train_iters: How many steps the run has.
    """
    return options.lr * _share_of_peak(options, min(step, train_iters - 1), train_iters)


def _share_of_peak(options: ScheduleOptions, step: int, train_iters: int) -> float:
    """From 0 to 1: the last step of the warmup is at the peak, and the last step of the run at the floor."""
    warmup = _steps(options.warmup, train_iters)
    if step + 1 < warmup:
        return (step + 1) / warmup
    peak = max(warmup - 1, 0)
    if options.lr_decay_style == "inverse_sqrt":
        return max(math.sqrt((peak + 1) / (step + 1)), options.lr_floor)
    start = peak
    if options.lr_decay_style == "wsd":
        start = max(peak, train_iters - 1 - _steps(options.decay, train_iters))
    progress = max(step - start, 0) / max(train_iters - 1 - start, 1)
    return options.lr_floor + (1 - options.lr_floor) * _FALLS[options.lr_decay_style](progress)


def _steps(length: float, train_iters: int) -> int:
    """A length in steps, or from a share of the run."""
    return int(length) if length >= 1 else round(length * train_iters)


_FALLS: Mapping[DecayStyle, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "wsd": lambda progress: 1.0 - math.sqrt(progress),
}
"""From 1 to 0 while the progress goes from 0 to 1; a root serves `wsd` best (Hägele et al. 2024)."""
