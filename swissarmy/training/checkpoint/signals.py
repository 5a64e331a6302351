"""SIGTERM and SIGINT end a run after the step or the batch that is under way; a second one ends it at once."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Final, Self, final

STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
_SAME_SIGNAL_SECONDS: Final = 1.0


@final
class StopSignals:
    """While entered, the first signal is remembered instead of ending the process.

    Only the main thread may handle signals; entered in another one, nothing is ever received.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that came, if any did; its exit code is `128 + received`."""
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def raised(self) -> tuple[bool, ...]:
        """Of each of `STOPPING`, whether it is the one that came."""
        return tuple(self.received is each for each in STOPPING)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {each: signal.signal(each, self._receive) for each in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif not (_has_agent() and now - self._received_at < _SAME_SIGNAL_SECONDS):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _has_agent() -> bool:
    """Under `torchrun`, Ctrl-C comes twice: from the terminal, and passed on by the agent."""
    return "TORCHELASTIC_RUN_ID" in os.environ
