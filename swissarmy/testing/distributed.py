"""`run_distributed`: a function in several new processes that form a group on this machine's CPU."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

import torch
import torch.distributed as dist

from swissarmy.core.errors import SwissArmyError, sendable

T = TypeVar("T")


def run_distributed(fn: Callable[..., T], world_size: int, *args: Any, timeout: float = 120.0) -> list[T]:
    """Call `fn(rank, world_size, *args)` in so many new processes that form a `gloo` group on this machine's CPU.

    The group is torch's default one while `fn` runs: `torch.distributed` and `init_device_mesh("cpu", ...)` work as
    they do under `torchrun`. When this returns or raises, every process is gone. They are copies of one that has
    imported torch and this library, and has done nothing else: that one takes a few seconds at the first call, and
    stays until the calling process ends. Each has the environment of the call.

    Args:
        fn: A function at the top of a module, which the processes import.
        world_size: How many processes; they share the machine's cores.
        *args: For every rank; they travel by pickling.
        timeout: Seconds for everything, the start of the processes included.

    Returns:
        What each rank returned, by rank; it travels by pickling, tensors by copy.

    Raises:
        SwissArmyError: `fn` or an argument cannot be sent, or `world_size` is below 1.
        Exception: What the first rank to fail raised, with a note of the rank and its traceback.
        ChildProcessError: A process died without a word; the message names the rank and the signal or exit code.
        TimeoutError: The time was up; the message names the ranks that had not finished.
    """
    if world_size < 1:
        raise SwissArmyError(f"world_size={world_size} must be at least 1.")
    task = _pickled_task(fn, args)
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="swissarmy-ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                ranks.append(_Rank.start(task, rank, world_size, Path(folder) / "store", timeout))
            return _results(ranks, deadline, timeout)
        finally:
            for each in ranks:
                each.end()


class _Report(NamedTuple):
    """What a rank says when it is done."""

    result: Any
    error: Exception | None
    when: float
    """On the clock that all processes of a machine share: what failed because of another failure comes later."""


@final
class _Rank:
    """A process, and the pipe that its report comes through."""

    def __init__(self, process: ForkServerProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe

    @classmethod
    def start(cls, task: bytes, rank: int, world_size: int, store: Path, timeout: float) -> "_Rank":
        server = multiprocessing.get_context("forkserver")  # a fork of this process would copy locks of torch's threads
        server.set_forkserver_preload([__name__])
        receiving, sending = server.Pipe(duplex=False)
        arguments = (task, rank, world_size, str(store), timeout, sending, dict(os.environ))
        process = server.Process(target=_work, args=arguments, name=f"rank {rank}")
        process.start()
        sending.close()  # the process holds the only end now: when it dies, the pipe says so
        return cls(process, receiving)

    def report(self) -> _Report | None:
        """What the rank said, when it spoke or died; `None` if it died before it spoke."""
        try:
            report: _Report | None = pickle.loads(self.pipe.recv_bytes()) if self.pipe.poll() else None
        except EOFError:
            return None
        return report

    def cause_of_death(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def _pickled_task(fn: Callable[..., Any], args: Sequence[Any]) -> bytes:
    try:
        return pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SwissArmyError(
            f"other processes cannot be given {fn!r} or its arguments ({error}): use a function at the top of a "
            "module, and arguments that pickle takes."
        ) from error


def _results(ranks: Sequence[_Rank], deadline: float, timeout: float) -> list[Any]:
    """Wait for all ranks or the first failure."""
    reports: dict[int, _Report] = {}
    while len(reports) < len(ranks):
        running = {rank: each for rank, each in enumerate(ranks) if rank not in reports}
        ready = _wait(running, deadline)
        if not ready:
            names = ", ".join(map(str, running))
            raise TimeoutError(f"{timeout:g} seconds are over, and of {len(ranks)} ranks these still ran: {names}.")
        for rank in ready:
            report = ranks[rank].report()
            if report is None:  # what others say of a lost connection comes later and matters less
                raise _death(ranks, rank)
            reports[rank] = report
        failed = [report for report in reports.values() if report.error is not None]
        if failed:
            _look_for_the_dead(ranks, reports)
            error = min(failed, key=lambda report: report.when).error
            assert error is not None
            raise error
    return [reports[rank].result for rank in range(len(ranks))]


def _look_for_the_dead(ranks: Sequence[_Rank], reports: Mapping[int, _Report], patience: float = 3.0) -> None:
    """A rank that dies closes its connections first: others may speak of that before it is gone.

    Raises:
        ChildProcessError: A rank died without a word.
    """
    deadline = time.monotonic() + patience
    silent = {rank: each for rank, each in enumerate(ranks) if rank not in reports}
    while silent and (ready := _wait(silent, deadline)):
        for rank in ready:
            if silent.pop(rank).report() is None:
                raise _death(ranks, rank)


def _death(ranks: Sequence[_Rank], rank: int) -> ChildProcessError:
    return ChildProcessError(f"rank {rank} of {len(ranks)} died without a word: {ranks[rank].cause_of_death()}.")


def _wait(running: Mapping[int, _Rank], deadline: float) -> list[int]:
    """The ranks that spoke or died; none when the time is up."""
    signs: list[Any] = [sign for each in running.values() for sign in (each.pipe, each.process.sentinel)]
    ready = wait(signs, timeout=max(deadline - time.monotonic(), 0.0))
    return [rank for rank, each in running.items() if each.pipe in ready or each.process.sentinel in ready]


def _work(
    task: bytes,
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
    pipe: Connection,
    environment: Mapping[str, str],
) -> None:
    """What each process does: join the group, call the function, report."""
    os.environ.clear()  # it is that of the first call
    os.environ.update(environment)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    try:
        fn, args = pickle.loads(task)
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
        report = pickle.dumps(_Report(fn(rank, world_size, *args), None, time.monotonic()))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it again
        error.add_note(f"raised in rank {rank} of {world_size}:\n{traceback.format_exc()}")
        report = pickle.dumps(_Report(None, sendable(error), time.monotonic()))
    # plain pickling: what travels through multiprocessing's own keeps tensors in memory shared with a process that ends
    pipe.send_bytes(report)  # before the group is left, which lets the other ranks fail
    if dist.is_initialized():
        dist.destroy_process_group()
