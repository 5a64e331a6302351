"""Blends hit their counts, for any weights and any number of samples, and find every sample directly."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.data.order.blend import MAX_BLOCK, MIN_BLOCK, Blend, BlendSchedule

GOLDEN = [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
"""Made by this code; a change of it changes the order of every run that is resumed."""

ordinary = st.lists(st.sampled_from([1, 2, 3, 0.5, 0.99, 1.01, 7.3, 0.1, 41, 0]), min_size=2, max_size=12).filter(any)
wild = st.lists(st.sampled_from([1e12, 1, 2, 4, 1e-3, 2e-3, 1e-6, 1e-12, 0]), min_size=2, max_size=12).filter(any)
starts = st.sampled_from([0, 1, 999, 10**6 + 3, 10**12 + 7])


def deviation(blend: Blend, start: int, number: int) -> float:
    """The most by which the count of any part is off after `start` to `start + number` samples."""
    parts, _ = blend.locate(np.arange(start, start + number))
    before = blend.counts(start)
    worst = Fraction(0)
    for part, share in enumerate(blend.shares):
        counts = (before[part] + np.cumsum(parts == part)).tolist()
        # off by count - share * n, in units of 1 / denominator
        p, q = share.numerator, share.denominator
        off = max(abs(count * q - p * (start + done)) for done, count in enumerate(counts, 1))
        worst = max(worst, Fraction(off, q))
    return float(worst)


@settings(max_examples=40)
@given(ordinary, starts)
def test_counts_are_never_a_whole_sample_from_the_ideal(weights: list[float], start: int) -> None:
    assert deviation(Blend(weights), start, 2 * MIN_BLOCK) < 1


@pytest.mark.parametrize("number", [13, 60, 300])
def test_nor_with_many_parts(number: int) -> None:
    weights = np.random.default_rng(number).random(number) + 0.05
    assert deviation(Blend(weights.tolist()), 123_456, 2000) < 1


@settings(max_examples=20)
@given(wild, starts)
def test_weights_far_apart_are_kept_to_within_two_samples(weights: list[float], start: int) -> None:
    blend = Blend(weights)
    drawn = [share for share in blend.shares if share]
    assert deviation(blend, start, 1500) < (1 if min(drawn) * MAX_BLOCK >= 1 else 2)


def test_a_rare_part_gets_its_due_in_the_long_run() -> None:
    counts = Blend([10**7, 3, 2]).counts(10**9)
    assert counts == pytest.approx([10**9 * w / 10_000_005 for w in (10**7, 3, 2)], abs=2)
    assert sum(counts) == 10**9


@settings(max_examples=30)
@given(ordinary, starts)
def test_any_sample_is_found_directly(weights: list[float], start: int) -> None:
    samples = np.arange(start, start + 1500)
    parts, draws = Blend(weights).locate(samples)
    some = np.random.default_rng(start % 1000).permutation(1500)[:200]
    found_parts, found_draws = Blend(weights).locate(samples[some])
    assert found_parts.tolist() == parts[some].tolist()
    assert found_draws.tolist() == draws[some].tolist()


@settings(max_examples=20)
@given(st.one_of(ordinary, wild), starts)
def test_draws_of_a_part_are_consecutive(weights: list[float], start: int) -> None:
    blend = Blend(weights)
    parts, draws = blend.locate(np.arange(start, start + 1200))
    before, after = blend.counts(start), blend.counts(start + 1200)
    for part in range(len(blend)):
        assert draws[parts == part].tolist() == list(range(before[part], after[part]))


def test_a_part_of_weight_zero_is_left_out() -> None:
    parts, _ = Blend([1, 0, 2]).locate(np.arange(5000))
    assert set(parts.tolist()) == {0, 2}


def test_whole_ratios_are_met_exactly_each_time_round() -> None:
    blend = Blend([2, 1])
    assert [blend.counts(3 * rounds) for rounds in (1, 50, 10**15)] == [[2, 1], [100, 50], [2 * 10**15, 10**15]]


def test_sequences_are_the_same_in_every_version() -> None:
    parts, _ = Blend([5, 3, 2]).locate(np.arange(10, 30))
    assert parts.tolist() == GOLDEN


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    peaks = []
    for start in (0, 10**4, 10**15):
        tracemalloc.start()
        Blend([0.7, 0.2, 0.1]).locate(np.arange(start, start + 100))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1_000_000


# Schedules


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 2000), ordinary), min_size=1, max_size=4))
def test_in_a_schedule_parts_go_on_where_they_were(stages: list[tuple[int, list[float]]]) -> None:
    begins = np.cumsum([0, *(size for size, _ in stages)]).tolist()
    blends = [Blend([*weights[:2], 1]) for _, weights in stages]
    schedule = BlendSchedule(list(zip(begins, blends, strict=False)))
    parts, draws = schedule.locate(np.arange(begins[-1] + 500))
    for part in range(3):
        assert draws[parts == part].tolist() == list(range((parts == part).sum()))
    assert schedule.counts(begins[-1]) == np.bincount(parts[: begins[-1]], minlength=3).tolist()
    for begin, end, blend in zip(begins[:-1], begins[1:], blends, strict=True):
        assert parts[begin:end].tolist() == blend.locate(np.arange(end - begin))[0].tolist()


@pytest.mark.parametrize("begins", [[], [1], [0, 0], [0, 5, 4]])
def test_stages_that_do_not_rise_from_0_are_refused(begins: list[int]) -> None:
    with pytest.raises(ConfigError, match="must rise from 0"):
        BlendSchedule([(begin, Blend([1, 1])) for begin in begins])


def test_stages_of_different_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="all must blend the same"):
        BlendSchedule([(0, Blend([1, 1])), (5, Blend([1]))])
