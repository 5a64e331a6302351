"""A run in a few lines: a tiny model, its optimizer, steps along a made-up loss, and the state to save."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swissarmy.training.checkpoint.checkpoints import Checkpoints
from swissarmy.training.checkpoint.options import CheckpointOptions
from swissarmy.training.checkpoint.state import TrainState
from swissarmy.training.ema import WeightAverage
from swissarmy.training.optimizer import OptimizerOptions, make_optimizer
from swissarmy.training.precision import LossScaler, PrecisionOptions
from swissarmy.training.ranks import Ranks
from tests.training.tiny_runs import model_of


class SmallRun:
    """Steps, each of which also draws random numbers."""

    def __init__(self, model: Any = None, *, optimizer: str = "adamw", ema: bool = True, seed: int = 0) -> None:
        self.model = model_of(seed=seed) if model is None else model
        self.optimizer = make_optimizer(self.model, OptimizerOptions(optimizer=optimizer))  # type: ignore[arg-type]
        average = WeightAverage(self.model, 0.9) if ema else None
        scaler = LossScaler(PrecisionOptions(precision="fp16"))
        self.state = TrainState(model=self.model, optimizer=self.optimizer, ema=average, scaler=scaler)

    def take_steps(self, number: int) -> "SmallRun":
        for _ in range(number):
            ids = torch.randint(61, (2, 5))
            self.model(ids)[0].float().logsumexp(-1).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.state.ema is not None:
                self.state.ema.update()
            self.state.step += 1
        return self

    def copies(self) -> dict[str, Tensor]:
        """Every tensor of the state as it is now."""
        return {name: tensor.clone() for name, tensor in self.state.tensors().items()}


def checkpoints_in(folder: Path, ranks: Ranks | None = None, **options: Any) -> Checkpoints:
    return Checkpoints(folder, CheckpointOptions(**options), ranks or Ranks(), timeout=60)


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """To the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
