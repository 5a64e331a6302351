"""A profile of some steps, as files that the usual viewers read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swissarmy.core.errors import ConfigError
from swissarmy.training.callbacks.base import Callback, Run, StepReport
from swissarmy.training.callbacks.profile import ProfileCallback
from swissarmy.training.ranks import Ranks
from tests.training.callbacks.played import end, make_run, play, start


class Works(Callback):
    """Does what can be told apart in each step: `step` products of matrices before the profiler hears of the step."""

    def on_step(self, run: Run, report: StepReport) -> None:
        for _ in range(report.step):
            torch.mm(torch.ones(4, 4), torch.ones(4, 4))


def products(path: Path) -> int:
    trace: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return sum(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def profiled(folder: Path, first: int, last: int, *, since: int = 0, until: int = 6, rank: int = 0) -> Run:
    run = make_run(folder, ranks=Ranks(rank=rank))
    run.step = since
    callbacks = [Works(), ProfileCallback(first, last)]
    start(run, callbacks)
    play(run, callbacks, until)
    end(run, callbacks)
    return run


def test_the_trace_holds_the_steps_asked_for_and_no_other(tmp_path: Path) -> None:
    profiled(tmp_path, 3, 4)
    folder = tmp_path / "profile"
    assert products(folder / "trace-rank-0.json.gz") == 3 + 4
    assert "aten::mm" in (folder / "operators-rank-0.txt").read_text()
    memory = json.loads((folder / "memory-rank-0.json").read_text())
    assert memory["device"] == "cpu"
    assert memory["peak_bytes"] > 1 << 20


def test_the_first_step_can_be_profiled_and_each_rank_has_files_of_its_own(tmp_path: Path) -> None:
    profiled(tmp_path, 1, 1, rank=3)
    assert products(tmp_path / "profile" / "trace-rank-3.json.gz") == 1


def test_steps_after_the_end_are_refused_and_those_that_are_done_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match=f"profile=101 110 is after the run's last step, {run.train_iters}"):
        profiled(tmp_path, 101, 110)
    profiled(tmp_path, 2, 3, since=4)
    assert "steps 2 to 3 are done already" in caplog.text


def test_a_run_that_ends_or_is_resumed_within_has_the_steps_that_it_did(tmp_path: Path) -> None:
    profiled(tmp_path / "short", 5, 9)
    assert products(tmp_path / "short" / "profile" / "trace-rank-0.json.gz") == 5 + 6
    profiled(tmp_path / "resumed", 2, 4, since=3)
    assert products(tmp_path / "resumed" / "profile" / "trace-rank-0.json.gz") == 4


def test_steps_that_are_past_are_not_profiled(tmp_path: Path) -> None:
    profiled(tmp_path, 1, 2, since=4)
    assert not (tmp_path / "profile").exists()
