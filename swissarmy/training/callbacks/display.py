"""What people see of a run: a display that is redrawn in place on a terminal, and plain lines anywhere else."""

import random
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, final

from swissarmy.training.callbacks.base import Run
from swissarmy.training.callbacks.lines import Lines, duration, evaluation_text, has_tokens, line_of, short, speed_texts
from swissarmy.training.callbacks.sinks import Record, Sink

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_BARS: Final = "▁▂▃▄▅▆▇█"
_ASCII_BARS: Final = "_.-=+*#@"
_REMEMBERED: Final = 512
"""How many losses the display draws."""
_REDRAW: Final = 0.2
"""Seconds from one redrawing to the next."""


def display(run: Run, *, live: bool | None) -> Sink:
    """What shows a run on standard output: redrawn in place on a terminal or when asked for, lines otherwise."""
    if live or (live is None and sys.stdout is not None and sys.stdout.isatty()):
        return LiveDisplay(run, console(sys.stdout))
    return Lines(sys.stdout, run.train_iters)


def console(file: TextIO, *, width: int | None = None) -> "Console":
    """A terminal; importing it leaves Python's random numbers as they are, because training may draw from them."""
    state = random.getstate()
    try:
        from rich.console import Console
    finally:
        random.setstate(state)
    return Console(file=file, width=width, force_terminal=True, markup=False, highlight=False, emoji=False)


@final
class LiveDisplay:
    """Loss, speeds and all else of a run in one frame, redrawn by the steps themselves: no thread is started, which
    workers of the loader could inherit half-way through.

    Args:
        run: What it shows.
        console: Where.
    """

    every_step = True

    def __init__(self, run: Run, console: "Console") -> None:
        from rich.live import Live

        self._title, self._last = str(run.folder), run.train_iters
        self._start, self._drawn = time.monotonic(), 0.0
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)
        self._step: Record = {}
        self._evaluations: dict[str, Record] = {}
        self._console = console
        self._live = Live(self, console=console, auto_refresh=False)
        self._live.start()

    def write(self, record: Record) -> None:
        """Show a record; a step that was skipped leaves a line above the frame."""
        if record["kind"] == "step":
            self._step = record
            if record["loss"] - record["loss"] == 0:  # finite
                self._losses.append(record["loss"])
        elif record["kind"] == "evaluation":
            self._evaluations[record["name"]] = record
        else:
            self.note(line_of(record, self._last))
        self._redraw()

    def note(self, text: str) -> None:
        """Print a line above the frame."""
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Leave the last frame where it is."""
        self._live.refresh()
        self._live.stop()

    def __rich__(self) -> "RenderableType":
        """The frame."""
        from rich.panel import Panel

        return Panel(self._body(), title=self._title, title_align="left", border_style="dim", padding=(0, 1))

    def _redraw(self) -> None:
        now = time.monotonic()
        if now - self._drawn >= _REDRAW:
            self._live.refresh()
            self._drawn = now

    def _body(self) -> "RenderableType":
        from rich.table import Table

        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
        if self._step:
            self._add_rows(table)
        else:
            table.add_row("waiting", "for the first step")
        return table

    def _add_rows(self, table: "Table") -> None:
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        step, bars = self._step, _BARS if self._console.encoding.startswith("utf") else _ASCII_BARS
        gone, left = duration(time.monotonic() - self._start), duration(step["seconds_left"])
        table.add_row("step", f"{step['step']:,} of {self._last:,}   {gone} gone, {left} left")
        table.add_row("", ProgressBar(self._last, step["step"], complete_style="green", finished_style="green"))
        table.add_row("loss", Text(f"{step['loss']:.4f}", style="bold green"))
        table.add_row("", Text(sparkline(self._losses, max(self._console.width - 18, 8), bars), style="green"))
        for name, value in step["metrics"].items():
            table.add_row(name, f"{value:.4f}")
        for record in self._evaluations.values():
            table.add_row(record["name"], f"{evaluation_text(record)}   {_when(record)}")
        table.add_row("gradient", f"norm {step['grad_norm']:.3f}   lr {step['lr']:.2e}")
        table.add_row("speed", "   ".join(speed_texts(step)))
        tokens = f"{short(step['tokens'])} tokens in " if has_tokens(step) else ""
        table.add_row("seen", f"{tokens}{short(step['samples'])} samples")
        if step["blend"]:
            table.add_row("blend", _blend_text(step["blend"]))
        if step["skipped"]:
            table.add_row("skipped", Text(f"{step['skipped']:,} of the steps", style="red"))


def _when(record: Record) -> str:
    of_valid = record["name"] == "valid" and record["best_loss"] is not None
    best = f", best {record['best_loss']:.4f}" if of_valid else ""
    return f"(step {record['step']:,}{best})"


def _blend_text(blend: Mapping[str, Any]) -> str:
    return "   ".join(f"{Path(name).name} {share:.2%}" for name, share in blend.items())


def sparkline(values: Sequence[float], width: int, bars: str = _BARS) -> str:
    """Values as a row of bars, each the mean of as many neighbours as it takes to fit into the width."""
    values = list(values)
    columns = min(width, len(values))
    edges = [len(values) * column // columns for column in range(columns + 1)] if columns else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] for mean in means)
