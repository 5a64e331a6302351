"""When a text is over before its tokens are: stop strings and a time limit.

Shapes: b rows, n tokens so far.
"""

import time
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from swissarmy.core.errors import HookCallError
from swissarmy.generation.strategies import Strategy
from swissarmy.generation.wrapping import WrappingStrategy
from swissarmy.nn.kv_cache import KVCache


@final
class StopStrings:
    """Lets a growing text through until one of some strings is complete, and nothing of that string."""

    def __init__(self, stop: str | Sequence[str]) -> None:
        """Set the strings.

        Raises:
            HookCallError: One is empty.
        """
        self.strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.strings:
            raise HookCallError("a stop string is empty: every text would be over before it begins.")
        self.found = False
        self._held = ""

    def cut(self, text: str) -> str | None:
        """What is before the string that is complete first; `None` where there is none."""
        places = [(place + len(string), place) for string in self.strings if (place := text.find(string)) >= 0]
        return text[: min(places)[1]] if places else None

    def put(self, piece: str) -> str:
        """Add a piece; the text that is now certain not to begin a stop string."""
        text = self._held + piece
        before = self.cut(text)
        if before is not None:
            self.found, self._held = True, ""
            return before
        held = max((_overlap(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, when nothing more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of a text may begin the string."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)


@final
class Clock:
    """A time limit that runs from when it is made."""

    def __init__(self, seconds: float | None) -> None:
        """Set the limit; none when `None`.

        Raises:
            HookCallError: It is not above 0.
        """
        if seconds is not None and not seconds > 0:
            raise HookCallError(f"max_time={seconds} must be above 0 seconds; leave it out for no limit.")
        self.deadline = None if seconds is None else time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@final
class StoppingStrategy(WrappingStrategy):
    """Another strategy, done as well when the time is up or every row's text is over."""

    def __init__(self, strategy: Strategy, clock: Clock, is_over: Callable[[Sequence[int]], bool], start: int) -> None:
        """Watch a strategy.

        Args:
            strategy: Chooses the tokens.
            clock: The time limit.
            is_over: Given the new tokens of a row, whether its text is over.
            start: The column of the first new token.
        """
        super().__init__(strategy)
        self.clock, self.is_over, self.start = clock, is_over, start
        self._all_over = False

    def reset(self, batch_size: int, device: torch.device, gaps: Tensor | None = None) -> None:
        """Begin a new batch."""
        super().reset(batch_size, device, gaps)
        self._all_over = False

    @property
    def is_done(self) -> bool:
        """Whether nothing more is wanted."""
        return self._all_over or super().is_done or self.clock.is_over

    def forward(self, logits: Tensor, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """Let the strategy choose, and look at the texts."""
        grown, mems = super().forward(logits, tokens, mems)
        self._all_over = all(self.is_over(row) for row in grown[:, self.start :].tolist())
        return grown, mems
