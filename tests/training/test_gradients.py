"""The length of gradients and their scaling, on one rank; over several in test_optimizer_sharded.py."""

import math

import pytest
import torch
from torch import nn

from swissarmy.training.gradients import clip_factor, scale_gradients, squared_norm


def parameters(*gradients, dtype=torch.float64):
    made = [nn.Parameter(torch.zeros(len(each), dtype=dtype)) for each in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = torch.tensor(gradient, dtype=dtype)
    return made


def test_all_gradients_are_one_vector():
    assert squared_norm(parameters([3.0, 4.0], [12.0])).item() == 169


def test_a_tied_parameter_counts_once_and_one_without_a_gradient_not_at_all():
    first, second = parameters([3.0], [4.0])
    assert squared_norm([first, second, first, nn.Parameter(torch.zeros(2))]).item() == 25
    assert squared_norm([nn.Parameter(torch.zeros(2))]).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_shows(bad):
    assert not torch.isfinite(squared_norm(parameters([1.0, 2.0], [3.0, bad])))


def test_half_precision_is_added_up_in_float32():
    norm = squared_norm(parameters([300.0] * 400, dtype=torch.float16))
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(400 * 300.0**2)


def test_of_replicas_each_counts_in_part():
    assert squared_norm(parameters([3.0, 4.0]), world_size=4).item() == 25 / 4


def test_scaling_is_in_place_and_of_all():
    first, second = parameters([2.0], [4.0, 6.0])
    kept = second.grad
    scale_gradients([first, second, first], 0.5)
    assert first.grad.tolist() == [1.0]
    assert second.grad is kept
    assert kept.tolist() == [2.0, 3.0]


def test_clipping_shortens_and_never_lengthens():
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(0.0, 1.0) == 1.0
    assert clip_factor(1e9, None) == 1.0
