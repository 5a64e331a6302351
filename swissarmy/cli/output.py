"""What commands print: text that any terminal can take, JSON, and consoles for what people look at."""

import io
import json
import os
import sys
from typing import IO, Any

from rich.console import Console


def tolerate_any_encoding() -> None:
    """Print `?` for what the terminal's encoding lacks, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def console(*, stderr: bool = False) -> Console:
    """For tables: what is printed is taken as it is, without markup."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def is_unicode(stream: IO[str] | None) -> bool:
    """Whether a stream can take any character."""
    encoding = getattr(stream, "encoding", None) or ""  # closed at the start, or an object without one
    return str(encoding).lower().startswith("utf")


def print_json(value: Any, *, indent: int | None = None) -> None:
    """JSON on standard output; other characters are escaped where the terminal's encoding may lack them."""
    print(json.dumps(value, indent=indent, ensure_ascii=not is_unicode(sys.stdout)), flush=True)


def print_error(text: str) -> None:
    """A message on standard error, if that is open."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def flush() -> None:
    """Write out what is still held back, so that a failure shows here and not at the interpreter's exit."""
    if sys.stdout is not None:
        sys.stdout.flush()


def discard() -> None:
    """Send what would still be written to standard output nowhere: its reader is gone."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, io.UnsupportedOperation):  # closed at the start, or replaced by an object of Python's
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
