"""What takes the records of a run: a file, a terminal, a tracker."""

from collections.abc import Mapping
from typing import Any, Protocol

Record = Mapping[str, Any]
"""What happened at one step: its `kind` (`step`, `evaluation`, `skip`), its `step`, and plain values."""


class Sink(Protocol):
    """Where records go, on the first rank."""

    every_step: bool
    """Whether it gets the record of each step, and not only of those that are due."""

    def write(self, record: Record) -> None:
        """Take a record.

        Raises:
            OSError: It is lost; the run goes on.
        """

    def note(self, text: str) -> None:
        """Take a line for people; what is for programs lets it pass."""

    def close(self) -> None:
        """Nothing more comes."""
