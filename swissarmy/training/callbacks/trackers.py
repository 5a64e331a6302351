"""TensorBoard, Weights & Biases and trackio as takers of records. Each is imported only when it is asked for."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from swissarmy.core.errors import require_extra
from swissarmy.training.callbacks.base import Run
from swissarmy.training.callbacks.sinks import Record, Sink

if TYPE_CHECKING:
    from swissarmy.training.callbacks.log import LogOptions

_OF_STEPS = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "memory", "waited", "skipped")


def trackers(run: Run, options: "LogOptions") -> list[Sink]:
    """Those that the options ask for.

    Raises:
        MissingExtraError: One is not installed.
    """
    project, name = options.project or "swissarmy", options.run_name or run.folder.resolve().name
    made: list[Sink] = []
    if options.tensorboard:
        made.append(TensorBoard(run.folder / "tensorboard", first_step=run.step + 1))
    if options.wandb:
        made.append(WeightsAndBiases(run, project, name))
    if options.trackio:
        made.append(Trackio(run, project, name))
    return made


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record, named as they are grouped in a tracker: `train/loss`, `valid/perplexity`."""
    if record["kind"] == "step":
        yield from ((f"train/{name}", record[name]) for name in _OF_STEPS if record[name] is not None)
        yield from ((f"train/{name}", value) for name, value in record["metrics"].items())
        yield from ((f"blend/{name}", value) for name, value in record["blend"].items())
    elif record["kind"] == "evaluation":
        yield f"{record['name']}/loss", record["loss"]
        yield from ((f"{record['name']}/{name}", value) for name, value in record["metrics"].items())


class _Tracker(ABC):
    """What all have in common: they take the numbers of the records that are due, and no text."""

    every_step = False

    def write(self, record: Record) -> None:
        """Log the numbers of a record, if it has some."""
        if values := dict(scalars(record)):
            self.log(values, record["step"])

    @abstractmethod
    def log(self, values: dict[str, float], step: int) -> None:
        """Hand numbers to the tracker."""

    def note(self, text: str) -> None:  # noqa: B027 - none of them takes text
        """Let it pass."""


@final
class TensorBoard(_Tracker):
    """Event files in a folder; what they have of later steps is marked as void when a run is resumed."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        require_extra("tensorboard", extra="logging", purpose="tensorboard=True")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, values: dict[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out and close."""
        self._writer.close()


@final
class WeightsAndBiases(_Tracker):
    """A run at Weights & Biases; its id is kept in the folder, so that a resumed run goes on there."""

    def __init__(self, run: Run, project: str, name: str) -> None:
        wandb = require_extra("wandb", extra="logging", purpose="wandb=True")
        self._run = wandb.init(
            project=project, name=name, id=_id(run.folder), resume="allow", dir=run.folder, config=run.config.to_dict()
        )

    def log(self, values: dict[str, float], step: int) -> None:
        """All in one."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


@final
class Trackio(_Tracker):
    """A run at trackio, by its name; a resumed run goes on there."""

    def __init__(self, run: Run, project: str, name: str) -> None:
        trackio = require_extra("trackio", extra="logging", purpose="trackio=True")
        resume = "allow" if run.step else "never"  # another run of this name stays what it is
        self._run = trackio.init(project=project, name=name, resume=resume, config=run.config.to_dict())

    def log(self, values: dict[str, float], step: int) -> None:
        """All in one."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


def _id(folder: Path) -> str:
    """The id that a run has in all its lives."""
    path = folder / "wandb-id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="ascii")
    return path.read_text(encoding="ascii").strip()
