"""Timing that can be trusted on a shared machine: alternating runs in one process, medians, pairwise ratios."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from swissarmy.nn.linear import linear


@dataclass(frozen=True)
class Timing:
    """The wall-clock seconds of one candidate, one value for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def max(self) -> float:
        return max(self.seconds)


@dataclass(frozen=True)
class Roofline:
    """What this machine can do at most, measured, in float32."""

    gflops: float
    """10^9 operations a second of a product [512, 768] x [768, 3072], a multiply-add being two; the best path."""

    gigabytes_per_second: float
    """10^9 bytes a second read from memory, by summing more than fits in a cache."""

    linear_gigabytes_per_second: float
    """The same in one-row products by `torch.nn.functional.linear`."""


def alternate(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3
) -> dict[str, Timing]:
    """Run every candidate once a round, forwards in even rounds and backwards in odd ones (ABBA).

    What drifts (clock, temperature, neighbours) then falls on all alike. A candidate that works
    asynchronously has to synchronise before it returns.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds measure nothing")
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds):
        names = list(candidates)
        for name in names if index % 2 == 0 else reversed(names):
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(a: Timing, b: Timing) -> float:
    """How many times as long as `b` took `a`: the median of the ratios within each round."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def describe_machine() -> str:
    """One line: processor, threads, versions; and the accelerator, if there is one."""
    parts = [
        _processor(),
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@torch.inference_mode()
def roofline(*, matrices: int = 48, rounds: int = 9) -> Roofline:
    """Measure the limits on the CPU, with the shapes of GPT-2's MLP.

    Args:
        matrices: how many weights of [3072, 768], 9.4 MB each, are read.
        rounds: of which the fastest counts: a limit is what the machine can do when left alone.
    """
    weights = [torch.randn(3072, 768) for _ in range(matrices)]
    rows, row = torch.randn(512, 768), torch.randn(1, 768)

    def multiply() -> None:
        linear(rows, weights[0])

    def read() -> None:
        for weight in weights:
            weight.sum()

    def sweep() -> None:
        for weight in weights:
            torch.nn.functional.linear(row, weight)

    runs = {"multiply": multiply, "read": read, "sweep": sweep}
    fastest = {name: timing.min for name, timing in alternate(runs, rounds=rounds, warmup=2).items()}
    gigabytes = matrices * 3072 * 768 * 4 / 1e9
    return Roofline(
        gflops=2 * 512 * 768 * 3072 / fastest["multiply"] / 1e9,
        gigabytes_per_second=gigabytes / fastest["read"],
        linear_gigabytes_per_second=gigabytes / fastest["sweep"],
    )


def print_table(title: str, timings: Mapping[str, Timing], *, baseline: str) -> None:
    """Print milliseconds (median, min, max) and the ratio to `baseline`, a row for each candidate."""
    table = Table(title=title, title_justify="left")
    table.add_column("candidate")
    for heading in ("median ms", "min ms", "max ms", f"ratio to {baseline}"):
        table.add_column(heading, justify="right")
    for name, timing in timings.items():
        milliseconds = (f"{1000 * value:.2f}" for value in (timing.median, timing.min, timing.max))
        table.add_row(name, *milliseconds, f"{ratio(timing, timings[baseline]):.3f}")
    Console().print(table)
