"""What every callback knows: the run, and the moments at which it is called.

The order of a run: `on_start`; for each step `on_step`, or `on_skip` and then `on_step` where the window was discarded;
after a step, where it is due, `on_evaluate` and `on_save`; `on_finish` when no step follows; at last `on_end`, also
when the run failed. Callbacks are called on every rank, in the order of the list, at the same step: what they decide
must not differ between ranks.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from swissarmy.training.checkpoint.signals import STOPPING

if TYPE_CHECKING:
    import torch

    from swissarmy.backbone.model import Model
    from swissarmy.data.build import Loaders
    from swissarmy.data.tokenizer import Tokenizer
    from swissarmy.training.config import TrainConfig
    from swissarmy.training.ema import WeightAverage
    from swissarmy.training.precision import LossScaler
    from swissarmy.training.ranks import Ranks
    from swissarmy.training.spikes import Spikes
    from swissarmy.training.window import ForwardStep


@final
@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step was; the same on every rank."""

    step: int
    """Its number, from 1 on: how many steps are done with it."""
    loss: float
    """The mean over all that was counted, on all ranks and in all micro-batches."""
    count: float
    """How many tokens or samples the loss is the mean of."""
    metrics: Mapping[str, float]
    """The means that the forward step gave beside the loss, by name."""
    lr: float
    grad_norm: float
    """The length of the gradient of the mean loss, before clipping."""
    tokens: int
    """How many tokens the model read, padding left out; images count as one."""
    samples: int
    seconds: float
    """On this rank; what callbacks did after the step before is not in it."""
    waited: float
    """How many of them this rank waited for the loader."""
    skipped: str | None = None
    """Why the window was discarded, if it was; the weights are then those from before."""


@final
@dataclass(frozen=True, kw_only=True)
class RankTrouble:
    """What one rank saw in a window that was discarded."""

    rank: int
    loss_sum: float
    count: float
    sample_ids: tuple[int, ...]
    """The global numbers of its samples; empty where batches carry none."""
    bad_gradients: tuple[str, ...]
    """The first parameters whose gradient on this rank is not finite."""


@final
@dataclass(frozen=True, kw_only=True)
class Skip:
    """A window that was discarded; the same on every rank."""

    step: int
    reason: str
    in_a_row: int
    """How many steps were skipped one after the other, with this one."""
    ranks: tuple[RankTrouble, ...]
    """What each rank saw, by rank."""


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Exact means over a whole set, or its first batches; the same on every rank."""

    step: int
    name: str
    """`valid` or `test`."""
    loss: float
    count: float
    metrics: Mapping[str, float]
    """Means by name; with `perplexity` where the forward step says that its loss is in nats per token."""
    seconds: float


@final
@dataclass(kw_only=True)
class Run:
    """A run as callbacks see it. They read it; to end the run they call `stop`."""

    config: "TrainConfig"
    model: "Model"
    """As it is trained: sharded, with compiled layers."""
    forward_step: "ForwardStep"
    optimizer: "torch.optim.Optimizer"
    scaler: "LossScaler"
    ema: "WeightAverage | None"
    """The average of the weights, where one is kept."""
    spikes: "Spikes"
    loaders: "Loaders"
    ranks: "Ranks"
    folder: Path
    """Where the run's files are; it exists."""
    train_iters: int
    """At which step the run ends."""
    tokenizer: "Tokenizer | None" = None
    callbacks: "Sequence[Callback]" = ()
    step: int = 0
    """How many steps are done, skipped ones included."""
    skipped: int = 0
    """How many steps were skipped."""
    skipped_in_a_row: int = 0
    last: StepReport | None = None
    """The last step's report."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """The last evaluation of each set."""
    best_loss: float | None = None
    """The lowest loss on the valid set so far."""
    stop_reason: str | None = None
    """Why the run ends after this step; `None`: it goes on."""
    signal: int | None = None
    """The signal that ends it, if one does: time is short then."""

    @property
    def is_last_step(self) -> bool:
        """Whether no step follows."""
        return self.step >= self.train_iters or self.stop_reason is not None

    def stop(self, reason: str) -> None:
        """End the run after this step; to be called on every rank at the same step."""
        self.stop_reason = self.stop_reason or reason

    def heed_signals(self, raised: Sequence[float]) -> None:
        """End the run if a signal came: of each of `STOPPING`, on how many ranks."""
        for number, ranks in zip(STOPPING, raised, strict=True):
            if ranks and self.signal is None:
                self.signal = number
                self.stop(f"{number.name} was received")

    def was_evaluated(self, evaluation: Evaluation) -> None:
        """Keep an evaluation, and tell the callbacks."""
        self.evaluations[evaluation.name] = evaluation
        for callback in self.callbacks:
            callback.on_evaluate(self, evaluation)
        if evaluation.name == "valid" and evaluation.loss < (math.inf if self.best_loss is None else self.best_loss):
            self.best_loss = evaluation.loss

    def was_saved(self, folder: Path) -> None:
        """Tell the callbacks of a checkpoint."""
        for callback in self.callbacks:
            callback.on_save(self, folder)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep beside step, tensors and data: plain values."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best_loss": self.best_loss,
            "last": None if self.last is None else asdict(self.last),
            "evaluations": {name: asdict(each) for name, each in self.evaluations.items()},
            "spikes": self.spikes.state_dict(),
            "callbacks": {name: state for name, each in self._named_callbacks() if (state := each.state_dict())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state_dict`; a callback that it does not know starts anew."""
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.best_loss = state["best_loss"]
        self.last = None if state["last"] is None else StepReport(**state["last"])
        self.evaluations = {name: Evaluation(**each) for name, each in state["evaluations"].items()}
        self.spikes.load_state_dict(state["spikes"])
        for name, callback in self._named_callbacks():
            if (own := state["callbacks"].get(name)) is not None:
                callback.load_state_dict(own)

    def _named_callbacks(self) -> Iterator[tuple[str, "Callback"]]:
        """Each callback by its class; the second of a class has its number too."""
        seen = Counter[str]()
        for callback in self.callbacks:
            name = type(callback).__name__
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name} {seen[name]}"), callback


class Callback:
    """What happens beside the steps. Override the moments that matter; each does nothing as it is."""

    def on_start(self, run: Run) -> None:
        """Before the first step; everything is built, and resumed. What can fail should fail here."""

    def on_step(self, run: Run, report: StepReport) -> None:
        """After each step; `run.step` is its number. Called for skipped steps too."""

    def on_skip(self, run: Run, skip: Skip) -> None:
        """A window is about to be discarded; the gradients are still there. `on_step` follows."""

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> None:
        """After each evaluation."""

    def on_save(self, run: Run, folder: Path) -> None:
        """After a checkpoint was handed to be written to `folder`; with asynchronous saving it may not be there yet."""

    def on_finish(self, run: Run) -> None:
        """No step follows, be it the last or the one that something stopped the run after: what is due at the end."""

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """After the last step, or when the run failed with `error`: the place to close files.

        After a failure other ranks may be gone: nothing collective then.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep: plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state_dict`."""
