"""Learning rates against closed formulas, and what holds for all of them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.training.schedule import ScheduleOptions, learning_rate

STYLES = ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


def rates(train_iters, **options):
    return [learning_rate(ScheduleOptions(**options), step, train_iters) for step in range(train_iters)]


def test_cosine_falls_by_half_a_wave_from_the_end_of_the_warmup_to_the_last_step():
    got = rates(10, lr=2.0, warmup=3, lr_floor=0.1)
    fall = [0.2 + 1.8 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(8)]
    assert got == pytest.approx([2 / 3, 4 / 3, *fall])


def test_linear_without_warmup_starts_at_the_peak_and_ends_at_the_floor():
    assert rates(5, lr=1.0, lr_decay_style="linear", lr_floor=0.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_wsd_stays_at_the_peak_until_its_last_part():
    got = rates(10, lr=1.0, lr_decay_style="wsd", warmup=2, decay=4, lr_floor=0.0)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0])


def test_inverse_sqrt_starts_to_fall_where_the_warmup_ends_and_never_below_the_floor():
    got = rates(400, lr=1.0, lr_decay_style="inverse_sqrt", warmup=4, lr_floor=0.125)
    assert got[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert got[15] == pytest.approx(0.5)
    assert got[99] == pytest.approx(0.2)
    assert got[399] == 0.125


def test_constant_only_warms_up():
    assert rates(4, lr=3.0, lr_decay_style="constant", warmup=0.5) == pytest.approx([1.5, 3, 3, 3])


def test_a_share_of_the_run_is_as_many_steps():
    for style in STYLES:
        shares = rates(40, lr_decay_style=style, warmup=0.25, decay=0.5)
        assert shares == rates(40, lr_decay_style=style, warmup=10, decay=20)


@settings(deadline=None, max_examples=60)
@given(
    style=st.sampled_from(STYLES),
    train_iters=st.integers(1, 300),
    warmup=st.one_of(st.integers(0, 400), st.floats(0, 1, exclude_max=True)),
    decay=st.one_of(st.integers(0, 400), st.floats(0, 1, exclude_max=True)),
    floor=st.floats(0, 1),
)
def test_every_schedule_rises_to_the_peak_then_never_rises_and_stays_within_its_bounds(
    style, train_iters, warmup, decay, floor
):
    options = ScheduleOptions(lr=1.0, lr_decay_style=style, warmup=float(warmup), decay=float(decay), lr_floor=floor)
    warm = int(warmup) if warmup >= 1 else round(warmup * train_iters)
    peak = min(max(warm, 1), train_iters) - 1
    *got, beyond = [learning_rate(options, step, train_iters) for step in [*range(train_iters), train_iters + 9]]
    assert got[peak] == (1 if warm <= train_iters else train_iters / warm)
    assert all(0 < earlier <= later for earlier, later in pairwise(got[: peak + 1]))
    assert all(earlier >= later for earlier, later in pairwise(got[peak:]))
    assert beyond == got[-1]
    if warm <= train_iters:
        assert got[-1] >= floor
    falls = style in ("linear", "cosine") or (style == "wsd" and round(decay * train_iters) > 0)
    if falls and peak < train_iters - 1:
        assert got[-1] == floor


@pytest.mark.parametrize("style", ["linear", "cosine", "inverse_sqrt"])
def test_no_step_jumps(style):
    got = rates(2000, lr=1.0, lr_decay_style=style, warmup=200, lr_floor=0.0)
    assert max(abs(a - b) for a, b in pairwise(got)) <= 1 / 200 + 1e-12


def test_numbers_that_make_no_schedule_are_reported_together():
    with pytest.raises(ConfigError, match=r"3 problems(.|\n)*warmup=2.5(.|\n)*decay=-1.0(.|\n)*lr_floor=1.5"):
        ScheduleOptions(warmup=2.5, decay=-1.0, lr_floor=1.5)
