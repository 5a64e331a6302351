"""TensorBoard for real; Weights & Biases and trackio as stand-ins that write down what they are told."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from swissarmy.core.errors import MissingExtraError
from swissarmy.training.callbacks.log import LogCallback, LogOptions
from tests.training.callbacks.played import end, make_run, play, start


class Told:
    """What a tracker was told."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.logged: dict[int, dict[str, float]] = {}
        self.finished = False

    def init(self, **options: Any) -> "Told":
        self.options = options
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged[step] = {**self.logged.get(step, {}), **values}

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Told]:
    module, told = ModuleType(request.param), Told()
    vars(module)["init"] = told.init
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, told


def track(folder: Path, until: int = 20, since: int = 0, **options: Any) -> None:
    run, log = make_run(folder), LogCallback(LogOptions(live=False, **options))
    run.step = since
    start(run, [log])
    play(run, [log], until, skips=(7,))
    end(run, [log])


def test_a_tracker_gets_steps_evaluations_and_the_config(tmp_path: Path, told: tuple[str, Told]) -> None:
    name, tracker = told
    track(tmp_path / "first-try", project="verses", **{name: True})
    assert (tracker.options["project"], tracker.options["name"]) == ("verses", "first-try")
    assert tracker.options["config"]["lr"] == 1e-3
    assert sorted(tracker.logged) == [1, 10, 20]
    assert tracker.logged[10]["train/lr"] == 1e-4
    assert tracker.logged[10]["train/accuracy"] == 0.1
    assert tracker.logged[10]["train/skipped"] == 1
    assert tracker.logged[10]["blend/rows:40"] == pytest.approx(2 / 3)
    assert tracker.logged[20]["valid/perplexity"] == pytest.approx(2.5634, abs=1e-4)
    assert tracker.finished


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path, told: tuple[str, Told]) -> None:
    name, tracker = told
    track(tmp_path, **{name: True}, run_name="one")
    before = tracker.options
    track(tmp_path, 30, since=20, **{name: True}, run_name="one")
    assert tracker.options["resume"] == "allow"
    assert tracker.options["name"] == before["name"] == "one"
    assert tracker.options.get("id") == before.get("id")
    assert sorted(tracker.logged) == [1, 10, 20, 30]


def test_another_run_of_the_same_name_is_another_run(tmp_path: Path, told: tuple[str, Told]) -> None:
    name, tracker = told
    track(tmp_path / "a" / "run", **{name: True})
    before = tracker.options
    track(tmp_path / "b" / "run", **{name: True})
    assert before["name"] == tracker.options["name"]
    assert name == "trackio" or before["id"] != tracker.options["id"]
    assert name == "wandb" or tracker.options["resume"] == "never"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_says_how_to_install_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r'pip install "swissarmy\[logging\]"'):
        track(tmp_path, **{name: True})
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own
def test_tensorboard_reads_what_was_written_and_a_resumed_run_replaces_its_steps(tmp_path: Path) -> None:
    track(tmp_path, 20, tensorboard=True)
    track(tmp_path, 30, since=10, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 10, 20, 30]
    assert losses[1].value == pytest.approx(1.3702, abs=1e-4)
    assert [event.step for event in events.Scalars("valid/perplexity")] == [10, 20, 30]
