"""A profile of some steps: where the time goes, and the memory.

Each rank writes into the folder `profile` of the run: `trace-rank-0.json.gz` (for https://ui.perfetto.dev or
chrome://tracing), `operators-rank-0.txt` (a table), `memory-rank-0.json` (the peak), and on a CUDA device
`memory-rank-0.pickle` (for https://pytorch.org/memory_viz).
"""

import json
import logging
from pathlib import Path
from typing import Final, final

import torch
from torch.profiler import ProfilerActivity, profile

from swissarmy.core.errors import ConfigError
from swissarmy.training.callbacks.base import Callback, Run, StepReport
from swissarmy.training.throughput import peak_memory

_LOG = logging.getLogger(__name__)
_EVENTS: Final = 200_000
"""How many of its allocations a CUDA device remembers."""


@final
class ProfileCallback(Callback):
    """Profiles the steps from `first` to `last`; a run that ends before has those that it did."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._profiler: profile | None = None

    def on_start(self, run: Run) -> None:
        """Begin, if the next step is the first one.

        Raises:
            ConfigError: The run ends before that.
        """
        if self.first > run.train_iters:
            raise ConfigError(f"profile={self.first} {self.last} is after the run's last step, {run.train_iters}.")
        if run.step >= self.last:
            _LOG.warning("steps %d to %d are done already: nothing is profiled", self.first, self.last)
        self._begin_before(run, run.step + 1)

    def on_step(self, run: Run, report: StepReport) -> None:
        """Write after the last step; begin before the first."""
        if report.step >= self.last:
            self._write(run)
        self._begin_before(run, report.step + 1)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Write what there is."""
        self._write(run)

    def _begin_before(self, run: Run, step: int) -> None:
        if self._profiler is None and self.first <= step <= self.last and step <= run.train_iters:
            device = run.ranks.device
            if device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            self._profiler = profile(activities=activities, profile_memory=True, record_shapes=True, with_flops=True)
            self._profiler.start()

    def _write(self, run: Run) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder, device = run.folder / "profile", run.ranks.device
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._path(folder, run, "trace", "json.gz")))
        table = profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=40)
        self._path(folder, run, "operators", "txt").write_text(table, encoding="utf-8")
        peak = {"device": str(device), "peak_bytes": peak_memory(device)}
        self._path(folder, run, "memory", "json").write_text(json.dumps(peak) + "\n", encoding="utf-8")
        if device.type == "cuda":
            snapshot = str(self._path(folder, run, "memory", "pickle"))
            torch.cuda.memory._dump_snapshot(snapshot)  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)

    def _path(self, folder: Path, run: Run, name: str, ending: str) -> Path:
        return folder / f"{name}-rank-{run.ranks.rank}.{ending}"
