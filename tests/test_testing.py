"""`run_distributed`: results, failures, hangs and deaths of ranks, and nothing left behind."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swissarmy as sat
from swissarmy.testing import run_distributed


class UnsendableError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def summed(rank: int, world_size: int, scale: float) -> tuple[int, Tensor]:
    total = torch.tensor([float(rank)]) * scale
    dist.all_reduce(total)
    assert dist.get_world_size() == world_size
    return os.getpid(), total


def fails(rank: int, world_size: int, kind: str, folder: str) -> Any:
    """Rank 1 fails as it is told; the others wait for it in a collective."""
    (Path(folder) / str(os.getpid())).touch()
    if rank != 1:
        dist.barrier()
        return None
    match kind:
        case "error":
            raise KeyError("the cause")
        case "unsendable error":
            raise UnsendableError("the ", "cause")
        case "unsendable result":
            return lambda: None
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(3)
        case "hang":
            time.sleep(1000)
    return None


def nobody_is_left(started: list[str]) -> bool:
    """No rank that started still exists, not even as a zombie."""
    return not any(Path("/proc", pid).exists() for pid in started) and not multiprocessing.active_children()


def test_every_rank_works_in_its_own_process_and_results_come_by_rank() -> None:
    results = run_distributed(summed, 3, 2.0)
    assert [float(total) for _, total in results] == [6.0] * 3
    assert len({os.getpid(), *(pid for pid, _ in results)}) == 4
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("error", KeyError, "the cause"),
        ("unsendable error", RuntimeError, "UnsendableError: the cause"),
        ("unsendable result", Exception, "lambda"),
        ("kill", ChildProcessError, "rank 1 of 2 died without a word: killed by SIGKILL"),
        ("exit", ChildProcessError, "rank 1 of 2 died without a word: exit code 3"),
    ],
)
def test_the_first_failure_is_raised_and_nobody_is_left(
    kind: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        run_distributed(fails, 2, kind, str(tmp_path))
    if "error" in kind:
        note = "\n".join(caught.value.__notes__)
        assert "raised in rank 1 of 2" in note
        assert f"in {fails.__name__}" in note
    started = os.listdir(tmp_path)
    assert started
    assert nobody_is_left(started)


def test_a_hang_ends_with_the_time_and_names_who_hangs(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"6 seconds are over, and of 2 ranks these still ran: 0, 1\."):
        run_distributed(fails, 2, "hang", str(tmp_path), timeout=6.0)
    assert nobody_is_left(os.listdir(tmp_path))


@pytest.mark.parametrize(
    ("fn", "world_size", "args", "message"),
    [
        (summed, 0, (1.0,), "world_size=0"),
        (lambda rank, world_size: None, 1, (), "top of a module"),
        (summed, 1, (lambda: None,), "top of a module"),
    ],
)
def test_what_cannot_be_sent_is_an_error_before_anything_starts(
    fn: Any, world_size: int, args: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(sat.SwissArmyError, match=message):
        run_distributed(fn, world_size, *args)
