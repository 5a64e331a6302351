"""Weights as people write them: exact, or refused with the reason."""

import contextlib
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.data.order.weights import drawn_in_proportion_to, parse_stages, parse_weights


@pytest.mark.parametrize(
    ("weight", "exact"),
    [(0.1, Fraction(1, 10)), ("1/3", Fraction(1, 3)), (1e-12, Fraction(1, 10**12)), (1e12, 10**12), (" 2 ", 2)],
)
def test_weights_are_exact(weight: float | str, exact: Fraction) -> None:
    assert parse_weights([weight]) == [exact]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -2], "weight 2 is negative: -2"),
        ([math.nan, 1], "weight 1 is 'nan'"),
        ([1, math.inf], "weight 2 is 'inf'"),
        ([0, 0.0], "all weights are 0"),
        (["1e999999999"], "weight 1 is '1e999999999'"),
        (["one"], "weight 1 is 'one'"),
        (["1/0"], "weight 1 is '1/0'"),
        ([True], "weight 1 is 'True'"),
    ],
)
def test_weights_that_are_none_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_weights(weights)


def test_every_bad_weight_is_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*weight 1.*weight 3.*weight 4"):
        parse_weights([math.nan, 1, math.inf, "x"])


@given(st.text(max_size=30))
@settings(max_examples=100)
def test_any_text_is_a_weight_or_an_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_weights([text])[0] > 0


def test_repeats_counts_lengths_and_share_does_not() -> None:
    assert drawn_in_proportion_to([2, 1], [10, 100], "repeats") == [20, 100]
    assert drawn_in_proportion_to([2, 1], [10, 100], "share") == [2, 1]
    assert drawn_in_proportion_to(None, [10, 100], "repeats") == [10, 100]


@pytest.mark.parametrize(
    ("weights", "lengths", "mean", "message"),
    [
        ([1], [5, 5], "share", "1 weights for 2 sources"),
        ([1, 1], [5, 0], "share", "source 2 is empty"),
        ([1, 1], [5, None], "repeats", "source 2 is a stream"),
    ],
)
def test_weights_that_do_not_fit_the_sources_are_refused(
    weights: list[float], lengths: list[int | None], mean: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        drawn_in_proportion_to(weights, lengths, mean)  # type: ignore[arg-type]


def test_an_empty_source_of_weight_zero_is_fine() -> None:
    assert drawn_in_proportion_to([1, 0], [5, 0], "share") == [1, 0]


def test_a_schedule_is_read_from_text() -> None:
    assert parse_stages(["1000: 2 1", "2000:0.5,1e-3"]) == [(1000, ["2", "1"]), (2000, ["0.5", "1e-3"])]


@pytest.mark.parametrize("text", ["1000", "x: 1", "-1: 1 2", "5:", "5: ", "1.5: 1"])
def test_a_stage_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="STEP: WEIGHT WEIGHT"):
        parse_stages([text])


@pytest.mark.parametrize("stages", [["0: 1 1"], ["5: 1", "5: 2"], ["9: 1", "5: 2"]])
def test_stages_must_rise(stages: list[str]) -> None:
    with pytest.raises(ConfigError, match="must rise"):
        parse_stages(stages)
