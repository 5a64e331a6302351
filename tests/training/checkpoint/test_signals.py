"""The first signal is remembered; the second ends the process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from swissarmy.training.checkpoint.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received is number
    assert signal.getsignal(number) is before


def test_in_another_thread_nothing_is_received() -> None:
    seen: list[signal.Signals | None] = []

    def enter() -> None:
        with StopSignals() as signals:
            seen.append(signals.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]


TWICE = """
import os, signal, sys
from swissarmy.training.checkpoint.signals import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), int(sys.argv[1]))
    print(signals.received.name, flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))
    print("goes on", flush=True)
"""


def twice(first: int, second: int, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", TWICE, str(int(first)), str(int(second))]
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def test_the_second_signal_ends_the_process_at_once() -> None:
    result = twice(signal.SIGTERM, signal.SIGINT)
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "SIGTERM\n")


def test_a_signal_that_torchrun_passes_on_as_well_is_one() -> None:
    result = twice(signal.SIGINT, signal.SIGTERM, TORCHELASTIC_RUN_ID="7")
    assert (result.returncode, result.stdout) == (0, "SIGINT\ngoes on\n")
