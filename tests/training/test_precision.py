"""Autocast, master weights and the scale of float16 losses."""

import math

import pytest
import torch
from torch import nn

from swissarmy.testing import tiny_inputs, tiny_model
from swissarmy.training.precision import (
    LossScaler,
    PrecisionOptions,
    autocast,
    mixed_precision_policy,
    prepare_weights,
)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_products_run_in_the_precision_asked_for_and_gradients_arrive_in_float32(precision, dtype):
    linear, options = nn.Linear(4, 4), PrecisionOptions(precision=precision)
    with autocast(options, "cpu"):
        product = linear(torch.randn(2, 4))
    product.float().sum().backward()
    assert product.dtype == dtype
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_without_a_reduced_precision_there_is_no_autocast(precision):
    with autocast(PrecisionOptions(precision=precision), "cpu"):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5", "vit"])
def test_a_family_computes_nearly_the_same_in_bf16(family):
    model = tiny_model(family, scale=1.0)
    inputs = tiny_inputs(model)
    exact = model(**inputs)[0]
    with autocast(PrecisionOptions(precision="bf16"), "cpu"):
        rough = model(**inputs)[0]
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()


def mixed_model():
    """Frozen and trained weights, all in bfloat16, and two buffers."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    model[0].requires_grad_(False)
    model.register_buffer("table", torch.ones(2, dtype=torch.bfloat16))
    model.register_buffer("ids", torch.ones(2, dtype=torch.int64))
    return model


def dtypes(precision):
    model = mixed_model()
    prepare_weights(model, PrecisionOptions(precision=precision))
    return model[0].weight.dtype, model[1].weight.dtype, model.table.dtype, model.ids.dtype


def test_master_weights_are_float32_and_frozen_ones_stay_unless_everything_is_to_be():
    half, single = torch.bfloat16, torch.float32
    assert dtypes(None) == (half, half, half, torch.int64)
    assert dtypes("bf16") == dtypes("fp16") == (half, single, half, torch.int64)
    assert dtypes("fp32") == (single, single, single, torch.int64)


def test_preparing_keeps_parameters_themselves_their_ties_and_their_marks():
    model = mixed_model()
    weight = model[1].weight
    model[0].weight, weight.lr_scale = weight, 3.0
    prepare_weights(model, PrecisionOptions(precision="fp32"))
    assert model[0].weight is model[1].weight is weight
    assert weight.lr_scale == 3.0


def test_sharded_weights_travel_reduced_and_gradients_are_summed_in_float32():
    policy = mixed_precision_policy(PrecisionOptions(precision="bf16"))
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    policy = mixed_precision_policy(PrecisionOptions())
    assert (policy.param_dtype, policy.reduce_dtype) == (None, None)


def test_the_scale_keeps_small_float16_gradients():
    scaler = LossScaler(PrecisionOptions(precision="fp16"))
    weight, small = torch.ones(1, requires_grad=True), 2e-8
    scaler.scaled(weight.half().float() * small).sum().backward()
    assert weight.grad.item() / scaler.scale == pytest.approx(small, rel=1e-2)
    weight.grad = None
    (weight.half().float() * small).sum().backward()
    assert weight.grad.item() == 0


def test_the_scale_halves_at_an_overflow_and_doubles_after_an_interval_without():
    scaler = LossScaler(PrecisionOptions(precision="fp16"), initial=8.0, growth_interval=3)
    scales = []
    for overflowed in [False, False, True, False, False, False, False, True, True, True, True, True]:
        scaler.update(overflowed=overflowed)
        scales.append(scaler.scale)
    assert scales == [8, 8, 4, 4, 4, 8, 8, 4, 2, 1, 0.5, 0.25]


def test_the_scale_continues_from_its_state():
    options = PrecisionOptions(precision="fp16")
    first, second = (LossScaler(options, initial=8.0, growth_interval=3) for _ in range(2))
    first.update(overflowed=True)
    first.update(overflowed=False)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.update(overflowed=False)
    assert second.scale == 8


@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_other_precisions_have_no_scale(precision):
    scaler = LossScaler(PrecisionOptions(precision=precision))
    loss = torch.tensor(math.pi)
    assert scaler.scaled(loss) is loss
    scaler.update(overflowed=True)
    scaler.load_state_dict({"scale": 4.0, "steps_since_change": 1})
    assert scaler.scale == 1.0


def test_a_scale_of_one_is_a_scale_like_any_other() -> None:
    first = LossScaler(PrecisionOptions(precision="fp16"), initial=2.0)
    first.update(overflowed=True)
    assert first.scale == 1.0
    second = LossScaler(PrecisionOptions(precision="fp16"))
    second.load_state_dict(first.state_dict())
    assert second.scale == 1.0
    assert LossScaler(PrecisionOptions(precision="bf16")).state_dict() == {}


def test_it_searches_until_it_cannot_fall() -> None:
    scaler = LossScaler(PrecisionOptions(precision="fp16"), initial=2.0**-15)
    assert scaler.is_searching
    scaler.update(overflowed=True)
    assert not scaler.is_searching
    assert not LossScaler(PrecisionOptions()).is_searching
