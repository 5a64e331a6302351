"""An exponential moving average of the weights (Polyak & Juditsky 1992): steadier than any one step's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from swissarmy.core.errors import CheckpointError
from swissarmy.nn.precision import precise_type
from swissarmy.training.own_part import kept, own_part


@final
class WeightAverage:
    """The average of every parameter that trains, by name, at least in float32 and sharded like the parameter.

    After n updates it forgets by `min(decay, (1 + n) / (10 + n))` per update, so that the random weights of the start
    do not linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the model's weights; `decay` as 0.999."""
        self.decay, self.updates = decay, 0
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: each.detach().to(precise_type(each.dtype), copy=True) for name, each in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [own_part(each) for each in self.averages.values()]
        weights = [own_part(each).to(average.dtype) for each, average in zip(self._weights(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's weights are the average; afterwards they are what they were, to the bit."""
        with kept(self._weights()):
            self.apply()
            yield

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the average as its weights."""
        for weight, average in zip(self._weights(), self.averages.values(), strict=True):
            own_part(weight).copy_(own_part(average))

    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Continue from averages of the same names and shapes, sharded in the same way.

        Raises:
            CheckpointError: Names that differ.
        """
        if averages.keys() != self.averages.keys():
            names = ", ".join(sorted(averages.keys() ^ self.averages.keys()))
            raise CheckpointError(f"the averaged weights and the parameters that train differ in: {names}")
        for name, average in averages.items():
            self.averages[name].copy_(average)
        self.updates = updates

    def _weights(self) -> list[Tensor]:
        return [each.detach() for each in self._parameters.values()]
