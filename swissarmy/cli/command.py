"""What a command of `sat` is. Nothing here imports torch: `sat --help` answers at once."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import tyro

from swissarmy.core.config import Config
from swissarmy.core.errors import SwissArmyError

CheckpointPath = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
"""A checkpoint as commands take it: a folder, a file, or a name on the hub."""

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""What the process exits with."""


class UsageError(SwissArmyError):
    """The command line or a config file asks for something that cannot be; exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """The flags that every command has; a command adds its own fields."""

    config: Path | None = None
    """A YAML file with values for the flags; a flag given here wins."""
    traceback: bool = False
    """On an error, show where in the code it arose (or set SAT_TRACEBACK=1)."""


OF_THE_COMMAND_LINE = ("config", "traceback")
"""Options that a config file cannot set."""


@final
@dataclass(frozen=True)
class LaterOptions:
    """Options whose class is imported when the command runs, because its file imports torch."""

    module: str
    name: str


@final
@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its file ends with `COMMAND = Command(...)`."""

    summary: str
    """One line for `sat --help`."""
    examples: tuple[str, ...]
    """Command lines that work."""
    options: type[Options] | LaterOptions
    repeatable: tuple[str, ...] = ()
    """Flags that may be given several times, or once with several values."""
    other_config: Callable[[Path], Mapping[str, Any] | None] | None = None
    """What a file given with `--config` sets where it is of another kind and holds no flags; `None` where it does."""
    run: Callable[[Any], int]
    """Given an instance of `options`, does the work and returns the exit code; imports torch, if at all, in here."""

    @property
    def options_class(self) -> type[Options]:
        """The class of `options`."""
        if not isinstance(self.options, LaterOptions):
            return self.options
        found: type[Options] = getattr(importlib.import_module(self.options.module), self.options.name)
        return found


@final
@dataclass(frozen=True, kw_only=True)
class CommandGroup:
    """Commands that share their first word, as in `sat data check`."""

    summary: str
    """One line for `sat --help`."""
    commands: Mapping[str, Command]
    """By their second word."""

    @property
    def examples(self) -> tuple[str, ...]:
        """One of each command."""
        return tuple(command.examples[0] for command in self.commands.values())
