"""The display that is redrawn in place on a terminal."""

import io
import math
from pathlib import Path

import pytest

from swissarmy.training.callbacks.display import LiveDisplay, console, display, sparkline
from swissarmy.training.callbacks.lines import Lines, speed_texts
from swissarmy.training.callbacks.log import LogCallback, LogOptions
from tests.training.callbacks.played import end, make_run, play, start


class Terminal(io.StringIO):
    """What takes escape codes."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(folder: Path, terminal: io.StringIO) -> str:
    """What stands on a terminal at the end of a run."""
    run = make_run(folder)
    log = LogCallback(LogOptions(live=False), [LiveDisplay(run, console(terminal, width=110))])
    start(run, [log])
    play(run, [log], 27, skips=(7,))
    terminal.seek(0)
    terminal.truncate()
    end(run, [log])
    return terminal.getvalue()


def test_the_frame_shows_the_run(tmp_path: Path) -> None:
    frame = shown(tmp_path, Terminal())
    for text in (
        "27 of 30",
        "1.5 s left",
        "0.2700",  # accuracy
        "perplexity 2.5634",
        "(step 20, best 0.9413)",
        "lr 3.70e-05",
        "240 tokens/s",
        "MFU ",
        "memory ",
        "3.2k tokens in 324 samples",
        "rows:40 66.67%",
        "rows:30 33.33%",
        "1 of the steps",
    ):
        assert text in frame, text
    assert "█" in frame


def test_the_speed_of_pictures_is_told_in_samples() -> None:
    record = {"tokens": 8, "samples": 8, "tokens_per_second": 24.0, "mfu": None, "memory": None, "waited": 0.1}
    assert list(speed_texts(record)) == ["24 samples/s", "waited 10.0%"]
    assert next(iter(speed_texts({**record, "tokens": 80}))) == "24 tokens/s"


def test_every_step_is_shown_and_a_skipped_one_leaves_a_line(tmp_path: Path) -> None:
    terminal = Terminal()
    run = make_run(tmp_path)
    live = LiveDisplay(run, console(terminal, width=110))
    log = LogCallback(LogOptions(live=False, log_interval=1000), [live])
    start(run, [log])
    play(run, [log], 3, skips=(2,))
    end(run, [log])
    assert "step 2: skipped (1 in a row): the loss is not finite" in terminal.getvalue()
    assert "3 of 30" in terminal.getvalue()


def test_a_terminal_without_unicode_gets_plain_characters(tmp_path: Path) -> None:
    class Old(Terminal):
        encoding = "ascii"

    assert shown(tmp_path, Old()).isascii()


def test_a_terminal_gets_the_display_and_a_pipe_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr("sys.stdout", Terminal())
    live = display(run, live=None)
    assert isinstance(live, LiveDisplay)
    live.close()
    assert isinstance(display(run, live=False), Lines)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(display(run, live=None), Lines)
    monkeypatch.setattr("sys.stdout", None)
    display(run, live=None).note("to nobody")


def test_a_sparkline_has_a_bar_for_each_value_or_for_the_mean_of_neighbours() -> None:
    assert sparkline([0, 1, 2, 7], 10) == "▁▂▃█"
    assert sparkline([0, 2, 6, 8], 2) == "▁█"
    assert sparkline([5, 5], 10) == "▁▁"
    assert sparkline([], 10) == ""
    assert len(sparkline([math.sin(x) for x in range(1000)], 37)) == 37
