"""What a run tells: records in `metrics.jsonl`, lines for people, warnings among them; whole after a kill, once after a
resume."""

import json
import logging
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from swissarmy.core.errors import ConfigError
from swissarmy.training.callbacks.lines import Lines, duration, size
from swissarmy.training.callbacks.log import LogCallback, LogOptions, log_callbacks
from swissarmy.training.callbacks.metrics_file import MetricsError, MetricsFile, read_metrics
from swissarmy.training.callbacks.report import ReportCallback
from swissarmy.training.ranks import Ranks
from tests.training.callbacks.played import end, make_run, play, start

QUIET = LogOptions(live=False, log_interval=10)


class Kept:
    """A sink that keeps what it gets."""

    every_step = False

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.notes: list[str] = []
        self.closed = False

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None:
        self.closed = True


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_metrics(folder / "metrics.jsonl"))


def places(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in records]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = {"time", "memory", "mfu", "seconds", "tokens_per_second", "samples_per_second", "waited", "seconds_left"}
    return [{name: value for name, value in record.items() if name not in times} for record in records]


# Records


def test_the_first_every_tenth_and_the_last_step_have_a_record(tmp_path: Path) -> None:
    run, log = make_run(tmp_path, train_iters=25), LogCallback(QUIET)
    start(run, [log])
    play(run, [log], 25, skips=(7,), eval_interval=20)
    end(run, [log])
    wanted = [("step", 1), ("skip", 7), ("step", 10), ("step", 20), ("evaluation", 20), ("step", 25)]
    assert places(metrics_of(tmp_path)) == wanted


def test_a_record_holds_what_the_step_was(tmp_path: Path) -> None:
    run, log = make_run(tmp_path), LogCallback(QUIET)
    start(run, [log])
    play(run, [log], 10, eval_interval=10)
    end(run, [log])
    step, evaluation = metrics_of(tmp_path)[-2:]
    assert step["lr"] == 1e-4
    assert step["metrics"] == {"accuracy": 0.1}
    assert (step["tokens"], step["samples"], step["skipped"]) == (1200, 120, 0)
    assert (step["tokens_per_second"], step["seconds_left"]) == (240, 10)
    assert 0 < step["mfu"] < 1
    assert step["memory"] > 1 << 20
    assert step["blend"] == {"rows:40": pytest.approx(2 / 3), "rows:30": pytest.approx(1 / 3)}
    assert evaluation["name"] == "valid"
    assert evaluation["best_loss"] == evaluation["loss"]


def test_the_blend_is_the_one_so_far_and_leaves_out_what_is_never_drawn(tmp_path: Path) -> None:
    changes: Any = {"train_data": ("rows:40", "rows:9", "rows:30"), "train_data_weights": (1.0, 0.0, 0.0)}
    run, log = make_run(tmp_path, **changes, train_data_weights_schedule=("10: 0 0 1",)), LogCallback(QUIET)
    start(run, [log])
    play(run, [log], 20)
    end(run, [log])
    blends = [record["blend"] for record in metrics_of(tmp_path) if record["kind"] == "step"]
    assert blends == [{"rows:40": 1, "rows:30": 0}, {"rows:40": 1, "rows:30": 0}, {"rows:40": 0.5, "rows:30": 0.5}]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    run, log = make_run(tmp_path), LogCallback(QUIET)
    start(run, [log])
    play(run, [log], 1, skips=(1,))
    end(run, [log])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert metrics_of(tmp_path)[1]["loss"] is None


def test_only_the_first_rank_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, ranks=Ranks(rank=1, world_size=1))
    callbacks = log_callbacks(QUIET)
    start(run, callbacks)
    play(run, callbacks, 10, skips=(3,))
    end(run, callbacks)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"log_interval": 0}, "log_interval=0"), ({"profile": (5, 3)}, "profile="), ({"profile": (0, 3)}, "profile=")],
)
def test_options_that_mean_nothing_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        LogOptions(**changes)


# Whole lines


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, first, second = make_run(tmp_path / "whole"), make_run(tmp_path / "cut"), make_run(tmp_path / "cut")
    log = LogCallback(QUIET)
    start(whole, [log])
    play(whole, [log], 30)
    end(whole, [log])

    log = LogCallback(QUIET)
    start(first, [log])
    play(first, [log], 14)
    saved = log.state_dict()
    play(first, [log], 20)  # what comes after the checkpoint is lost

    second.step, log = 14, LogCallback(QUIET)
    log.load_state_dict(json.loads(json.dumps(saved)))
    start(second, [log])
    play(second, [log], 30)
    end(second, [log])
    assert without_times(metrics_of(tmp_path / "cut")) == without_times(metrics_of(tmp_path / "whole"))


def test_a_process_that_is_killed_loses_no_line_and_a_resumed_one_goes_on_with_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = f"""
from pathlib import Path
from swissarmy.training.callbacks.metrics_file import MetricsFile
file, step = MetricsFile(Path({str(path)!r}), step=0), 0
while True:
    step += 1
    file.write({{"kind": "step", "step": step, "filling": "x" * (step % 5000)}})
    if step == 200:
        print("well on the way", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    steps = [record["step"] for record in read_metrics(path)]
    assert len(steps) >= 200
    assert steps == list(range(1, len(steps) + 1))
    file = MetricsFile(path, step=150)
    file.write({"kind": "step", "step": 151})
    file.close()
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == list(range(1, 152))


def test_half_a_line_is_taken_away_on_resuming_and_passed_over_in_reading(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "ste')
    assert places(list(read_metrics(path))) == [("step", 1)]
    file = MetricsFile(path, step=1)
    file.write({"kind": "step", "step": 2})
    file.close()
    assert places(list(read_metrics(path))) == [("step", 1), ("step", 2)]


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": 3}'])
def test_a_damaged_line_is_an_error_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind": "step", "step": 1}}\n{line}\n{{"kind": "step", "step": 4}}\n')
    with pytest.raises(MetricsError, match=r"metrics.jsonl:2: "):
        list(read_metrics(path))


def test_a_line_that_a_full_disk_cuts_off_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    file.write({"kind": "step", "step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"):
            file.write({"kind": "step", "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.write({"kind": "step", "step": 3})
    file.close()
    assert places(list(read_metrics(path))) == [("step", 1), ("step", 3)]


class FullSink:
    """Where nothing more goes."""

    every_step = False

    def write(self, record: Mapping[str, Any]) -> None:
        raise OSError(28, "No space left on device", "there.jsonl")

    def note(self, text: str) -> None:
        raise OSError(28, "No space left on device", "there.jsonl")

    def close(self) -> None:
        raise OSError(28, "No space left on device", "there.jsonl")


def test_a_sink_that_takes_nothing_more_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, log = make_run(tmp_path), LogCallback(QUIET, [FullSink()])
    start(run, [log])
    play(run, [log], 30)
    end(run, [log])
    assert len([record for record in metrics_of(tmp_path) if record["kind"] == "step"]) == 4
    assert [record.getMessage() for record in caplog.records if record.name.startswith("swissarmy")] == [
        "a record was not written, and the run goes on: [Errno 28] No space left on device: 'there.jsonl'"
    ]


# Lines


def test_lines_say_how_it_goes_without_escape_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, callbacks = make_run(tmp_path), log_callbacks(LogOptions(log_interval=10))  # standard output is no terminal
    start(run, callbacks)
    play(run, callbacks, 30, skips=(7,))
    end(run, callbacks)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert "train: rows:40: 240 samples (66.67 %), 6.00 epochs of 40" in lines
    assert any(line.startswith("step 10/30  loss 1.3702  accuracy 0.1000  lr 1.00e-04") for line in lines)
    assert "step 7: skipped (1 in a row): the loss is not finite; see reports/step-00000007.json" in lines
    assert "step 10: valid loss 1.8715  perplexity 6.4982  in 0.2 s" in lines
    assert lines[-1].startswith("done: 30 of 30 steps in ")
    assert (tmp_path / "log.txt").read_text() == out


@pytest.mark.parametrize(
    ("error", "reason", "wanted"),
    [(None, "SIGTERM was received", "stopped after 10 of 30"), (ValueError("no\nmore"), None, "ValueError: no")],
)
def test_the_end_is_said_with_its_reason(
    tmp_path: Path, error: Exception | None, reason: str | None, wanted: str
) -> None:
    kept = Kept()
    run, log = make_run(tmp_path), LogCallback(QUIET, [kept])
    start(run, [log])
    play(run, [log], 10)
    run.stop_reason = reason
    end(run, [log], error)
    assert wanted in kept.notes[-1]
    assert kept.closed


def test_warnings_of_the_library_stand_among_the_lines_while_the_run_lasts(tmp_path: Path) -> None:
    kept = Kept()
    run, log, logger = make_run(tmp_path), LogCallback(QUIET, [kept]), logging.getLogger("swissarmy.data.somewhere")
    before = list(logging.getLogger("swissarmy").handlers)
    start(run, [log])
    logger.warning("skipped: %s", "bad.jsonl:3")
    end(run, [log])
    assert "warning: skipped: bad.jsonl:3" in kept.notes
    assert logging.getLogger("swissarmy").handlers == before


def test_a_reader_that_leaves_does_not_end_the_run() -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

    gone: Any = Gone()
    lines = Lines(gone, 30)
    lines.note("one")
    lines.note("two")
    lines.close()


def test_showing_a_run_draws_no_random_number(tmp_path: Path) -> None:
    code = """
import io, random, sys
sys.stdout = io.StringIO()
random.seed(3)
before = random.getstate()
from pathlib import Path
from swissarmy.training.callbacks.display import console
assert "rich.console" not in sys.modules
console(sys.stdout)
assert "rich.console" in sys.modules
assert random.getstate() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    state = random.getstate()
    run, log = make_run(tmp_path), LogCallback(LogOptions(live=True))
    start(run, [log])
    end(run, [log])
    assert random.getstate() == state


def test_durations_and_sizes_are_readable() -> None:
    assert [duration(seconds) for seconds in (0, 59.94, 59.96, 125, 3723, 90000)] == [
        "0.0 s",
        "59.9 s",
        "1:00",
        "2:05",
        "1:02:03",
        "1 d 01:00",
    ]
    assert [size(count) for count in (812 << 20, 3 << 29)] == ["812 MiB", "1.5 GiB"]


# Reports


def test_a_skipped_step_leaves_a_report_that_names_ranks_samples_and_gradients(tmp_path: Path) -> None:
    run, callback = make_run(tmp_path), ReportCallback()
    start(run, [callback])
    play(run, [callback], 7, skips=(7,))
    report = json.loads((tmp_path / "reports" / "step-00000007.json").read_text())
    fine, bad = report["ranks"]
    assert (report["step"], report["reason"]) == (7, "the loss is not finite")
    assert (fine["loss_sum"], bad["loss_sum"]) == (12.5, "nan")
    assert bad["sample_ids"] == [78]
    assert bad["bad_gradients"] == ["transformer.lm_head"]
    assert report["step_before"]["step"] == 6
    loader = run.loaders.train
    assert loader is not None
    order = loader.batches.order
    places = order.places(loader.batches.samples_of(6)[[6]])  # sample 78 is the seventh of step 7
    source = loader.batches.parts[places.parts[0]]
    assert source is not None
    assert bad["records"] == [source.where(int(order.rows(places)[0]))]
