"""Everything that decides how a run goes on: tensors by name, and plain values."""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import Tensor, nn
from torch.optim import Optimizer

from swissarmy.data.loading.loader import Loader
from swissarmy.training.checkpoint.optimizer_state import (
    begin_state,
    load_optimizer_values,
    optimizer_tensors,
    optimizer_values,
)
from swissarmy.training.ema import WeightAverage
from swissarmy.training.precision import LossScaler

MODEL: Final = "model."
EMA: Final = "ema."
_LOG = logging.getLogger(__name__)


@final
@dataclass(kw_only=True)
class TrainState:
    """A run at the end of a step; `Checkpoints` saves it, and brings another one to where it was.

    Tensors are those of the run itself, not copies: what is read goes into them.
    """

    model: nn.Module
    """Of its parameters, those that train are kept."""
    optimizer: Optimizer
    ema: WeightAverage | None = None
    scaler: LossScaler | None = None
    loader: Loader | None = None
    """Of the train data."""
    step: int = 0
    """How many steps are done."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the run has to remember: plain values. Of `config` in it, what is another on resuming is logged."""

    def tensors(self) -> dict[str, Tensor]:
        """Parameters that train, buffers, the optimizer's state and the averaged weights, sharded as they are."""
        kept = self.model.state_dict().keys()
        tensors: dict[str, Tensor] = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        tensors |= {name: each for name, each in self.model.named_buffers() if name in kept}
        averages = {} if self.ema is None else self.ema.averages
        return {
            **{f"{MODEL}{name}": tensor.detach() for name, tensor in tensors.items()},
            **optimizer_tensors(self.model, self.optimizer),
            **{f"{EMA}{name}": tensor for name, tensor in averages.items()},
        }

    def values(self) -> dict[str, Any]:
        """All else, as plain values."""
        return {
            "step": self.step,
            "optimizer": optimizer_values(self.model, self.optimizer),
            "ema_updates": None if self.ema is None else self.ema.updates,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "loader": None if self.loader is None else self.loader.state_dict(),
            "extra": {**self.extra, "config": _settings(self.extra)},
        }

    def make_room(self, stored: Collection[str]) -> None:
        """Make the optimizer's state, of which the tensors of those names will be filled."""
        begin_state(self.model, self.optimizer, stored)

    def load_data(self, values: Mapping[str, Any], *, allow_data_change: bool) -> None:
        """Bring the data to where it was.

        Raises:
            FingerprintError: The data changed.
        """
        if self.loader is not None and values["loader"] is not None:
            self.loader.load_state_dict(values["loader"], allow_data_change=allow_data_change)

    def changes(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The settings that are others than `values` say; where a run is, and whether to resume it, is none of it."""
        old, new = values["extra"].get("config", {}), _settings(self.extra)
        names = sorted(old.keys() & new.keys() - {"resume", "output"})
        return tuple(f"{name} was {old[name]!r} and is {new[name]!r}" for name in names if old[name] != new[name])

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take over what `values` gave, but for the data."""
        for change in self.changes(values):
            _LOG.warning("resuming at step %d with another setting: %s", values["step"], change)
        self.step, self.extra = values["step"], values["extra"]
        load_optimizer_values(self.model, self.optimizer, values["optimizer"])
        if self.ema is not None:
            self.ema.updates = values["ema_updates"]
        if self.scaler is not None and values["scaler"] is not None:
            self.scaler.load_state_dict(values["scaler"])


def _settings(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The run's config as it comes back from a file: tuples are lists, and paths are text."""
    settings: dict[str, Any] = json.loads(json.dumps(extra.get("config", {}), default=str))
    return settings
