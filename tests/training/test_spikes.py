"""Which steps are not taken."""

import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from swissarmy.core.errors import ConfigError
from swissarmy.training.spikes import SkipOptions, Spikes
from tests.training.tiny_runs import Diary, run, step


def spikes_after(losses: list[float], **options: Any) -> Spikes:
    """With gradient norms of one."""
    spikes = Spikes(SkipOptions(**{"skip_outliers": True, "outlier_window": 8, **options}))
    for loss in losses:
        spikes.remember(loss, 1.0)
    return spikes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_taken(value: float) -> None:
    spikes = Spikes(SkipOptions())
    assert spikes.problem(value, 1.0) == f"the loss is {value}"
    assert spikes.problem(1.0, value) == f"the gradient norm is {value}"
    assert spikes.problem(1e30, 1e30) is None


def test_outliers_are_those_many_deviations_above_the_mean() -> None:
    spikes = spikes_after([2.0, 4.0] * 4)  # mean 3, deviation 1
    assert spikes.problem(8.99, 1.0) is None
    assert spikes.problem(9.01, 1.0) == ("the loss 9.01 is 6.0 standard deviations above the mean 3 of the last steps")
    assert spikes.problem(-100.0, 1.0) is None
    assert "gradient norm" in (spikes.problem(3.0, 1.01) or "")


def test_nothing_is_judged_before_half_a_window() -> None:
    assert spikes_after([2.0, 4.0, 2.0]).problem(1e9, 1.0) is None
    assert spikes_after([2.0, 4.0, 2.0, 4.0]).problem(1e9, 1.0) is not None


def test_the_window_rolls() -> None:
    spikes = spikes_after([1000.0] * 8 + [2.0, 4.0] * 4)
    assert spikes.problem(10.0, 1.0) is not None


def test_outliers_are_taken_unless_asked_for() -> None:
    spikes = spikes_after([2.0, 4.0] * 4, skip_outliers=False)
    assert spikes.problem(1e9, 1e9) is None


def test_what_was_remembered_travels_with_a_checkpoint() -> None:
    spikes, other = spikes_after([2.0, 4.0] * 4), spikes_after([])
    other.load_state_dict(spikes.state_dict())
    assert other.problem(9.01, 1.0) == spikes.problem(9.01, 1.0)


def test_options_out_of_range_are_in_one_report() -> None:
    with pytest.raises(ConfigError, match=r"3 problems(.|\n)*max_skipped=0(.|\n)*outlier_sigma(.|\n)*outlier_window"):
        SkipOptions(max_skipped=0, outlier_sigma=0.0, outlier_window=1)


def test_a_run_skips_an_outlier_and_goes_on(tmp_path: Path) -> None:
    diary, calls = Diary(), []

    def spiky(batch: dict[str, Tensor], model: Any) -> Any:
        calls.append(1)
        loss, *rest = step(batch, model)
        return (loss * 1e3 if len(calls) == 9 else loss, *rest)

    result = run(
        tmp_path / "run",
        forward_step=spiky,
        callbacks=[diary],
        train_iters=10,
        lr=1e-5,
        skip_outliers=True,
        outlier_window=8,
    )
    assert (result.step, result.skipped) == (10, 1)
    assert [skip.step for skip in diary.skips] == [9]
    assert "standard deviations above the mean" in diary.skips[0].reason
