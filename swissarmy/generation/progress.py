"""A bar that shows how far a long generation has come."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

from torch import Tensor

from swissarmy.generation.strategies import Strategy
from swissarmy.generation.wrapping import WrappingStrategy
from swissarmy.nn.kv_cache import KVCache


@final
class ReportingStrategy(WrappingStrategy):
    """Another strategy, which tells how many columns it has filled."""

    def __init__(self, strategy: Strategy, report: Callable[[int], None], start: int) -> None:
        """Set whom to tell, and the column of the first new token."""
        super().__init__(strategy)
        self.report, self.start = report, start

    def forward(self, logits: Tensor, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """Let the strategy choose, and tell."""
        grown, mems = super().forward(logits, tokens, mems)
        self.report(grown.shape[1] - self.start)
        return grown, mems


@contextmanager
def bar(total: int, *, shown: bool, label: str = "generating") -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal or notebook; call what it gives with how many are done."""
    if not shown:
        yield lambda done: None
        return
    from rich.console import Console  # not sooner, because it draws from Python's random numbers when it is imported
    from rich.progress import Progress

    console = Console(stderr=True)
    visible = console.is_terminal or console.is_jupyter
    # what is printed meanwhile stands above the bar on a terminal, and must go where it belongs if that is a file
    redirect = sys.stdout is not None and sys.stdout.isatty()
    with Progress(console=console, transient=True, disable=not visible, redirect_stdout=redirect) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
