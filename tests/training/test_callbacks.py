"""Callbacks: when they are called, and what they may decide."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swissarmy.training.callbacks.base import Callback, Evaluation, Run, StepReport
from swissarmy.training.callbacks.early_stop import EarlyStop
from tests.training.tiny_runs import Diary, run, step, with_nan_in


class StopsWhenSaved(Callback):
    """Ends the run when all else of a step has been done."""

    def on_save(self, run: Run, folder: Path) -> None:
        run.stop("it is saved")


def test_a_run_that_is_stopped_last_of_all_ends_as_any_other(tmp_path: Path) -> None:
    diary = Diary()
    result = run(
        tmp_path / "run",
        callbacks=[diary, StopsWhenSaved()],
        train_iters=9,
        save_interval=3,
        log_interval=5,
        valid_data=("rows:5",),
        test_data=("rows:3",),
    )
    assert diary.entries == "start/step 1/step 2/step 3/save 3/valid 3/test 3/end".split("/")
    assert [each.step for each in result.evaluations.values()] == [3, 3]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in records if each["kind"] == "step"] == [1, 3]


def test_the_order_of_a_run(tmp_path: Path) -> None:
    diary = Diary()
    run(
        tmp_path / "run",
        forward_step=with_nan_in({2}),
        callbacks=[diary],
        valid_data=("rows:2",),
        eval_interval=2,
        save_interval=2,
        train_iters=3,
    )
    assert diary.entries == ("start/step 1/skip 2/step 2/valid 2/save 2/step 3/valid 3/save 3/end".split("/"))


def test_callbacks_are_called_in_their_order_before_the_stock_ones(tmp_path: Path) -> None:
    calls: list[str] = []

    class Named(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_step(self, run: Run, report: StepReport) -> None:
            calls.append(f"{self.name} {report.step}")

        def on_evaluate(self, run: Run, evaluation: Evaluation) -> None:
            calls.append(f"{self.name} hears")

    run(tmp_path / "run", callbacks=[Named("a"), Named("b")], valid_data=("rows:2",), eval_interval=1, train_iters=1)
    assert calls == ["a 1", "b 1", "a hears", "b hears"]


def test_a_callback_ends_the_run(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_step(self, run: Run, report: StepReport) -> None:
            if report.step == 2:
                run.stop("it is enough")

    diary = Diary()
    result = run(tmp_path / "run", callbacks=[Enough(), diary], train_iters=9, valid_data=("rows:2",))
    assert (result.step, result.stop_reason, result.signal) == (2, "it is enough", None)
    assert diary.entries[-2:] == ["valid 2", "end"]
    assert (tmp_path / "run" / "final").is_dir()


def test_all_callbacks_hear_of_a_failure(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_step(self, run: Run, report: StepReport) -> None:
            raise RuntimeError("no")

    before, after = Diary(), Diary()
    with pytest.raises(RuntimeError, match="no"):
        run(tmp_path / "run", callbacks=[before, Failing(), after])
    assert before.entries == ["start", "step 1", "end with RuntimeError"]
    assert after.entries == ["start", "end with RuntimeError"]


def test_a_callback_that_fails_at_the_end_hides_neither_the_error_nor_the_end(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_step(self, run: Run, report: StepReport) -> None:
            raise RuntimeError("first")

        def on_end(self, run: Run, error: BaseException | None) -> None:
            raise ValueError("second")

    after = Diary()
    with pytest.raises(RuntimeError, match="first"):
        run(tmp_path / "run", callbacks=[Failing(), after])
    assert after.entries == ["start", "end with RuntimeError"]


def test_a_run_that_no_longer_gets_better_ends(tmp_path: Path) -> None:
    diary = Diary()
    result = run(
        tmp_path / "run",
        callbacks=[diary],
        lr=10.0,
        clip_grad_norm=None,
        train_iters=50,
        valid_data=("rows:5",),
        eval_interval=1,
        early_stopping=3,
    )
    losses = [evaluation.loss for evaluation in diary.evaluations if evaluation.name == "valid"]
    assert len(losses) == result.step < 50
    assert min(losses) == losses[-4]
    assert result.stop_reason == f"3 evaluations without a loss below {min(losses):.6g}"


def test_losses_that_are_no_numbers_are_not_lower(tmp_path: Path) -> None:
    def broken(batch: Any, model: Any) -> Any:
        loss, *rest = step(batch, model)
        return (loss if model.training else loss * torch.nan, *rest)

    settings: dict[str, Any] = {"valid_data": ("rows:5",), "eval_interval": 1, "early_stopping": 2}
    result = run(tmp_path / "run", forward_step=broken, train_iters=9, **settings)
    assert (result.step, result.stop_reason) == (2, "2 evaluations without a loss that is a number")


def test_callbacks_of_one_class_keep_their_own_states(tmp_path: Path) -> None:
    class Named(Callback):
        def __init__(self, name: str) -> None:
            self.name = self.loaded = name

        def state_dict(self) -> dict[str, Any]:
            return {"name": self.name}

        def load_state_dict(self, state: Any) -> None:
            self.loaded = state["name"]

    run(tmp_path / "run", callbacks=[Named("a"), Named("b")], save_interval=1, train_iters=1)
    resumed = [Named("c"), Named("d")]
    run(tmp_path / "run", callbacks=resumed, save_interval=1, train_iters=2, resume="must")
    assert [each.loaded for each in resumed] == ["a", "b"]


def test_early_stopping_goes_on_counting_after_a_checkpoint() -> None:
    first, second = EarlyStop(3), EarlyStop(3)
    first.without_improvement = 2
    second.load_state_dict(first.state_dict())
    assert second.without_improvement == 2


def test_the_state_of_a_run_travels(tmp_path: Path) -> None:
    class Counting(Callback):
        def __init__(self) -> None:
            self.seen = 0
            self.saved: dict[str, Any] = {}

        def on_step(self, run: Run, report: StepReport) -> None:
            self.seen += 1

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: Any) -> None:
            self.seen = state["seen"]

        def on_end(self, run: Run, error: BaseException | None) -> None:
            self.saved = run.state_dict()
            other = Counting()
            run.callbacks = (other,)
            run.skipped = run.skipped_in_a_row = 0
            run.load_state_dict(self.saved)
            assert (other.seen, run.skipped) == (4, 1)

    counting = Counting()
    run(tmp_path / "run", callbacks=[counting], train_iters=4, forward_step=with_nan_in({2}))
    assert counting.saved["skipped"] == 1
    assert counting.saved["callbacks"]["Counting"] == {"seen": 4}
