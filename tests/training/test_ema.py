"""Averaged weights."""

import pytest
import torch
from torch import nn

from swissarmy.core.errors import CheckpointError
from swissarmy.training.ema import WeightAverage


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    made[1].weight.requires_grad_(False)
    return made


def shift(module, by):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def test_the_average_is_the_sum_that_the_formula_says():
    net = model()
    average = WeightAverage(net, 0.3)
    expected = net[0].weight.detach().clone()
    for update in range(5):
        shift(net, 0.1 * (update + 1))
        average.update()
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    torch.testing.assert_close(average.averages["0.weight"], expected, rtol=1e-14, atol=0)


def test_only_what_trains_is_averaged():
    assert WeightAverage(model(), 0.9).averages.keys() == {"0.weight", "0.bias", "1.bias"}


def test_applied_swaps_in_place_and_back_to_the_bit_even_after_an_error():
    net = model()
    average = WeightAverage(net, 0.9)
    shift(net, 0.1)
    average.update()
    before = {name: (each.data_ptr(), each.detach().clone()) for name, each in net.named_parameters()}
    with average.applied():
        for name, each in net.named_parameters():
            assert torch.equal(each, average.averages.get(name, before[name][1]))
    with pytest.raises(KeyError), average.applied():
        net.get_parameter({}["an error"])
    for name, each in net.named_parameters():
        assert each.data_ptr() == before[name][0]
        assert torch.equal(each, before[name][1])


def test_bfloat16_weights_are_averaged_in_float32():
    net = nn.Linear(2, 2, bias=False).bfloat16()
    nn.init.zeros_(net.weight)
    average = WeightAverage(net, 0.9999)
    average.updates = 10**6
    nn.init.ones_(net.weight)
    for _ in range(10):
        average.update()
    assert average.averages["weight"].dtype == torch.float32
    torch.testing.assert_close(average.averages["weight"], torch.full((2, 2), 1 - 0.9999**10), rtol=1e-4, atol=0)


def test_loading_continues_to_the_bit():
    net = model()
    whole, first = WeightAverage(net, 0.9), WeightAverage(net, 0.9)
    for _ in range(2):
        shift(net, 0.3)
        whole.update()
        first.update()
    second = WeightAverage(net, 0.9)
    second.load(first.averages, first.updates)
    shift(net, 0.7)
    whole.update()
    second.update()
    assert all(torch.equal(each, second.averages[name]) for name, each in whole.averages.items())


def test_loading_other_names_is_refused():
    average = WeightAverage(model(), 0.9)
    with pytest.raises(CheckpointError, match=r"0\.bias, x"):
        average.load({"0.weight": torch.zeros(4, 3), "1.bias": torch.zeros(2), "x": torch.zeros(2)}, 1)
