"""Rotations: they keep lengths, and scores depend on distance only; each kind of stretching does what it says."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swissarmy.core.errors import ConfigError
from swissarmy.nn.rotary import RopeParameters, RotaryFrequencies, rotate

KINDS: list[dict[str, Any]] = [
    {},
    {"rope_theta": 100.0},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "longrope",
        "short_factor": (1.0, 1.5, 2.0, 2.5),
        "long_factor": (2.0, 3.0, 4.0, 5.0),
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
]
SEEDS = st.integers(0, 10**6)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x: Tensor, positions: Tensor, frequencies: RotaryFrequencies, interleaved: bool) -> Tensor:
    cos, sin = (table.double() for table in frequencies(positions, interleaved=interleaved))
    return rotate(x, cos, sin, interleaved=interleaved)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.booleans(), SEEDS)
def test_a_rotation_keeps_lengths_but_for_the_attention_factor(
    kind: dict[str, Any], interleaved: bool, seed: int
) -> None:
    frequencies = RotaryFrequencies(RopeParameters(**kind), 8, 32)
    x = normal(2, 3, 5, 8, seed=seed)
    positions = torch.randint(0, 500, (2, 5), generator=torch.Generator().manual_seed(seed))
    lengths = turned(x, positions, frequencies, interleaved).norm(dim=-1)
    torch.testing.assert_close(lengths, x.norm(dim=-1) * frequencies.attention_factor, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.booleans(), SEEDS, st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_scores_depend_on_the_distance_only(
    kind: dict[str, Any], interleaved: bool, seed: int, m: int, n: int, shift: int
) -> None:
    """Positions stay within one length: dynamic and longrope choose their frequencies by the longest position."""
    frequencies = RotaryFrequencies(RopeParameters(**kind), 8, 64)
    longest = 63
    q, k = normal(1, 1, 1, 8, seed=seed), normal(1, 1, 1, 8, seed=seed + 1)

    def score(query_position: int, key_position: int) -> Tensor:
        positions = torch.tensor([[query_position, key_position, longest]])
        both = turned(torch.cat((q, k, k), dim=2), positions, frequencies, interleaved)[0, 0]
        return both[0] @ both[1]

    torch.testing.assert_close(score(m, n), score(m + shift, n + shift), rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.booleans(), SEEDS)
def test_position_zero_turns_nothing(interleaved: bool, seed: int) -> None:
    x = normal(1, 2, 3, 8, seed=seed)
    result = turned(x, torch.zeros(1, 3, dtype=torch.long), RotaryFrequencies(RopeParameters(), 8, 32), interleaved)
    assert torch.equal(result, x)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(0, 100))
def test_each_pair_turns_by_its_own_angle(seed: int, position: int) -> None:
    x = normal(1, 1, 1, 6, seed=seed)
    frequencies = RotaryFrequencies(RopeParameters(), 6, 32)
    for interleaved in (False, True):
        result = turned(x, torch.tensor([[position]]), frequencies, interleaved)[0, 0, 0]
        for pair in range(3):
            first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
            angle = position * 10000.0 ** (-2 * pair / 6)
            before = torch.complex(x[..., first], x[..., second]).squeeze()
            after = torch.complex(result[first], result[second])
            turn = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(angle, dtype=torch.float64))
            torch.testing.assert_close(after, before * turn, rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_halves_and_neighbours_are_the_same_rotation_in_another_order(seed: int) -> None:
    frequencies, positions = RotaryFrequencies(RopeParameters(), 8, 32), torch.arange(5)[None]
    x = normal(2, 3, 5, 8, seed=seed)
    order = torch.arange(8).view(2, 4).t().flatten()
    halves = turned(x, positions, frequencies, False)[..., order]
    assert torch.equal(halves, turned(x[..., order], positions, frequencies, True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_partial_rotation_leaves_the_rest_of_the_head(interleaved: bool) -> None:
    frequencies, positions = RotaryFrequencies(RopeParameters(partial_rotary_factor=0.5), 8, 32), torch.arange(3)[None]
    x = normal(1, 2, 3, 8, seed=0)
    result = turned(x, positions, frequencies, interleaved)
    assert torch.equal(result[..., 4:], x[..., 4:])
    whole = turned(x[..., :4], positions, RotaryFrequencies(RopeParameters(), 4, 32), interleaved)
    assert torch.equal(result[..., :4], whole)


def test_linear_scaling_counts_positions_in_larger_steps() -> None:
    plain = RotaryFrequencies(RopeParameters(), 8, 32)
    stretched = RotaryFrequencies(RopeParameters(rope_type="linear", factor=4.0), 8, 32)
    for a, b in zip(plain(torch.tensor([[1, 2, 3]])), stretched(torch.tensor([[4, 8, 12]])), strict=True):
        torch.testing.assert_close(a, b)


def test_dynamic_scaling_starts_beyond_the_trained_length() -> None:
    plain = RotaryFrequencies(RopeParameters(), 8, 16)
    dynamic = RotaryFrequencies(RopeParameters(rope_type="dynamic", factor=2.0), 8, 16)
    within, beyond = torch.arange(16)[None], torch.arange(24)[None]
    torch.testing.assert_close(dynamic(within), plain(within))
    assert not torch.allclose(dynamic(beyond)[0], plain(beyond)[0])


def test_longrope_changes_its_divisors_beyond_the_trained_length() -> None:
    factors = {"short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4}
    parameters = RopeParameters(rope_type="longrope", original_max_position_embeddings=16, **factors)
    frequencies, plain = RotaryFrequencies(parameters, 8, 32), RotaryFrequencies(RopeParameters(), 8, 32)
    factor = math.sqrt(1 + math.log(2) / math.log(16))
    assert frequencies.attention_factor == factor
    within, beyond = torch.arange(16)[None], torch.arange(17)[None]
    torch.testing.assert_close(frequencies(within)[0], plain(within)[0] * factor)
    torch.testing.assert_close(frequencies(beyond)[0][:, :, ::2], plain(torch.arange(9)[None])[0] * factor)


def test_yarn_leaves_fast_pairs_alone_and_interpolates_slow_ones() -> None:
    yarn = RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)
    ours, plain = (torch.tensor(RotaryFrequencies(p, 64, 8192).inverse) for p in (yarn, RopeParameters()))
    assert ours[0] == plain[0]
    torch.testing.assert_close(ours[-1], plain[-1] / 4)
    assert ((ours <= plain) & (ours >= plain / 4 * 0.9999)).all()


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_a_kind_that_lacks_its_fields_names_them(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"rope_type='{kind}' needs "):
        RopeParameters.from_dict({"rope_type": kind})


def test_angles_are_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        tables = RotaryFrequencies(RopeParameters(), 8, 32)(torch.arange(4)[None])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(table.dtype == torch.float32 for table in tables)
