"""A run as plain lines: for pipes, for `log.txt`, and for what stands above the display."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TextIO, final

from swissarmy.training.callbacks.sinks import Record


@final
class Lines:
    """A line for each record.

    Args:
        file: Where they go; once it is closed by whoever read it, they go nowhere.
        train_iters: The last step.
    """

    every_step = False

    def __init__(self, file: TextIO | None, train_iters: int) -> None:
        self._file, self._last = file, train_iters
        self._owns = False

    @classmethod
    def into(cls, path: Path, train_iters: int) -> Self:
        """Lines at the end of a file."""
        lines = cls(path.open("a", encoding="utf-8"), train_iters)
        lines._owns = True
        return lines

    def write(self, record: Record) -> None:
        """Print its line."""
        self.note(line_of(record, self._last))

    def note(self, text: str) -> None:
        """Print a line."""
        try:
            print(text, file=self._file or io.StringIO(), flush=True)
        except BrokenPipeError:  # `| head` has what it wanted: no reason to stop training
            self._file = None

    def close(self) -> None:
        """Close the file, if it was opened here."""
        if self._owns and self._file is not None:
            self._file.close()


def line_of(record: Record, train_iters: int) -> str:
    """A record for people, in one line."""
    match record["kind"]:
        case "step":
            where = f"step {record['step']:>{len(f'{train_iters:,}')},}/{train_iters:,}"
            return "  ".join([where, *_step_texts(record), f"left {duration(record['seconds_left'])}"])
        case "evaluation":
            text = f"{record['name']} {evaluation_text(record)}  in {duration(record['seconds'])}"
            return f"step {record['step']:,}: {text}"
        case "skip":
            return f"step {record['step']:,}: {_skip_text(record)}"
    raise AssertionError(record["kind"])


def _step_texts(record: Record) -> Iterator[str]:
    yield f"loss {record['loss']:.4f}"
    yield from (f"{name} {value:.4f}" for name, value in record["metrics"].items())
    yield f"lr {record['lr']:.2e}"
    yield f"grad norm {record['grad_norm']:.3f}"
    yield from speed_texts(record)
    if record["skipped"]:
        yield f"skipped {record['skipped']:,}"


def speed_texts(record: Record) -> Iterator[str]:
    """The speeds of a step, and its memory."""
    unit = "tokens" if has_tokens(record) else "samples"
    yield f"{short(record['tokens_per_second'])} {unit}/s"
    if record["mfu"] is not None:
        yield f"MFU {record['mfu']:.1%}"
    if record["memory"] is not None:
        yield f"memory {size(record['memory'])}"
    yield f"waited {record['waited']:.1%}"


def has_tokens(record: Record) -> bool:
    """Whether samples are of tokens; pictures count as one."""
    return bool(record["tokens"] != record["samples"])


def evaluation_text(record: Record) -> str:
    """The means of an evaluation."""
    return "  ".join(
        [f"loss {record['loss']:.4f}", *(f"{name} {value:.4f}" for name, value in record["metrics"].items())]
    )


def _skip_text(record: Record) -> str:
    return f"skipped ({record['in_a_row']} in a row): {record['reason']}; see {record['report']}"


def duration(seconds: float) -> str:
    """`12.3 s`, `4:05`, `1:02:33`, `3 d 04:05`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes as `812 MiB` or `1.4 GiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def short(number: float) -> str:
    """`950`, `12.3k`, `1.2M`."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return f"{number:.0f}"
