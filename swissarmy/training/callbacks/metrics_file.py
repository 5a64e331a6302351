"""`metrics.jsonl`: one JSON object a line, for programs and for `sat plot`.

Each line is written at once and held back nowhere, so that a run that is killed loses none. At the worst the last one
is cut off, where the kill came while the system was copying it: readers here pass over it. A run that is resumed takes
it away, with all lines after its checkpoint, and writes them anew.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, final

from swissarmy.core.errors import SwissArmyError
from swissarmy.core.files import replace_file
from swissarmy.training.callbacks.sinks import Record

METRICS: Final = "metrics.jsonl"
"""What the file is called in the folder of a run."""


class MetricsError(SwissArmyError):
    """A metrics file is not there, or is none."""


@final
class MetricsFile:
    """The file while a run writes it; takes records.

    Args:
        path: Where it is.
        step: The step that the run begins after; what the file has of later ones is taken away.
        evaluated: The sets that were evaluated after that step; of others, the run does it anew.

    Raises:
        OSError: It cannot be written.
    """

    every_step = False

    def __init__(self, path: Path, *, step: int, evaluated: Collection[str] = ()) -> None:
        if path.exists():
            _cut(path, step, evaluated)
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, record: Record) -> None:
        """Add a line, whole or not at all; numbers that are not finite become `null`, which JSON has.

        Raises:
            OSError: It cannot be written, with the file's name.
        """
        line = memoryview(json.dumps(finite(record), ensure_ascii=False).encode() + b"\n")
        end = os.fstat(self._descriptor).st_size
        try:
            while line:  # more than once only where a signal or a full disk came between
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def note(self, text: str) -> None:
        """Let it pass."""

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, without a last one that is not whole.

    Raises:
        MetricsError: There is no such file, or a line before the last is not as this library writes them.
    """
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise MetricsError(f"{path}:{number}: this line is no JSON: {error}") from error
        if not isinstance(record, dict) or not {"kind", "step"} <= set(record):
            raise MetricsError(f"{path}:{number}: a line of a run's metrics is an object with a `kind` and a `step`.")
        yield record


def _whole_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except FileNotFoundError as error:
        raise MetricsError(f"{path} does not exist; a run writes it into its folder from its first step on.") from error


def _cut(path: Path, step: int, evaluated: Collection[str]) -> None:
    """Keep what the run will not write anew: the lines up to a step, but for evaluations after it."""
    with replace_file(path) as kept:
        for line in _whole_lines(path):
            if step and not _is_due_again(line, step, evaluated):
                kept.write(line)


def _is_due_again(line: bytes, step: int, evaluated: Collection[str]) -> bool:
    try:
        record = json.loads(line)
        is_evaluation = record["kind"] == "evaluation" and record["name"] not in evaluated
        return bool(record["step"] > step or (is_evaluation and record["step"] == step))
    except (ValueError, KeyError, TypeError):  # damaged by something else: kept, so that its reader can say where
        return False


def finite(value: Any, *, otherwise: Callable[[float], Any] = lambda number: None) -> Any:
    """A plain value with what JSON has no word for, numbers that are not finite, replaced."""
    if isinstance(value, Mapping):
        return {str(key): finite(each, otherwise=otherwise) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each, otherwise=otherwise) for each in value]
    return otherwise(value) if isinstance(value, float) and not math.isfinite(value) else value
