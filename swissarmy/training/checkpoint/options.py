"""When a run is saved, what of it is kept, and whether it goes on from there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from swissarmy.core.config import Config


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Config):
    """How a run is kept, so that it can go on after it was stopped."""

    save_interval: int | None = None
    """Save after every so many steps; `None`: only when a signal ends the run."""
    keep_last: int | None = 2
    """How many of the newest steps to keep; `None` for all. The one that the run went on from stays too."""
    keep_every: int | None = None
    """Keep also every step whose number is a multiple of this."""
    save_async: bool = True
    """Whether steps go on while a checkpoint is written; it costs a copy of the state in the host's memory."""
    resume: Literal["auto", "never", "must"] = "never"
    """Go on from the newest step in the run's folder: `auto` if there is one, `must` or fail; `never`: refuse a folder
    that has one."""
    allow_data_change: bool = False
    """Go on although the data is not what it was."""

    def problems(self) -> Iterator[str]:
        """Numbers below one."""
        for name in ("save_interval", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}={value} must be at least 1, or null."
