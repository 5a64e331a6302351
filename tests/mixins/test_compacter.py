"""Compacter: its matrices are sums of Kronecker products, with one rule for all."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import swissarmy as sat
from swissarmy.testing import TINY_CONFIGS, tiny_model
from tests.helpers import tiny_ids
from tests.helpers import tiny_model as tiny_backbone
from tests.mixins.helpers import outputs, randomise, reloaded, watched


def compacter_of(model: Any, **options: Any) -> Any:
    return randomise(sat.CompacterMixin.for_model(model, **options))


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_a_new_compacter_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    before = outputs(model)
    model.add_mixin("compacter", sat.CompacterMixin.for_model(model))
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize(("num_terms", "rank"), [(4, 1), (2, 3), (1, 2)])
def test_it_is_an_adapter_whose_matrices_are_sums_of_kronecker_products(num_terms: int, rank: int) -> None:
    model = tiny_backbone()
    mixin = compacter_of(model, num_terms=num_terms, rank=rank, bottleneck_size=4)
    inner, outer = watched(model, mixin, input_ids=tiny_ids())

    def matrix(part: Any) -> torch.Tensor:
        return sum(torch.kron(a, s @ t) for a, s, t in zip(mixin.rule, part.left, part.right, strict=True))

    for (sublayer, layer_id), (_, result) in inner.seen.items():
        down, up = mixin.layers[layer_id][sublayer].down, mixin.layers[layer_id][sublayer].up
        inside = F.gelu(F.linear(result, matrix(down), down.bias), approximate="tanh")
        expected = result + F.linear(inside, matrix(up), up.bias)
        torch.testing.assert_close(outer.seen[sublayer, layer_id][1], expected)


def test_its_parameters_are_few_and_the_rule_is_there_once() -> None:
    mixin = sat.CompacterMixin.for_model(tiny_backbone(), bottleneck_size=8)
    down = up = 4 * (16 // 4 + 8 // 4)  # n small matrices of rank 1
    assert sum(parameter.numel() for parameter in mixin.parameters()) == 4**3 + 2 * 2 * (down + 8 + up + 16)
    assert [name for name, _ in mixin.named_parameters() if "rule" in name] == ["rule"]


def test_new_matrices_have_entries_like_a_usual_projection() -> None:
    torch.manual_seed(0)
    mixin = sat.CompacterMixin.for_model(tiny_backbone(hidden_size=64, num_layers=40), bottleneck_size=32)
    weights = torch.stack([layer["mlp"].down.weight(mixin.rule) for layer in mixin.layers])
    assert 0.4 < weights.std() * 64**0.5 < 2.5


def test_the_default_size_is_rounded_up_to_a_multiple() -> None:
    mixin = sat.CompacterMixin.for_model(tiny_backbone(hidden_size=96), num_terms=4)
    assert mixin.layers[0]["mlp"].down.bias.shape == (8,)  # 96 / 16 = 6


def test_every_parameter_learns_from_the_second_step_on() -> None:
    model = tiny_backbone()
    model.add_mixin("compacter", sat.CompacterMixin.for_model(model)).freeze_except("mixins.compacter")
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tiny_ids())[0].square().mean().backward()
        optimizer.step()
    mixin = model.get_mixin("compacter")
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in mixin.parameters())
    assert all(each.grad is None for each in model.transformer.parameters())


def test_it_is_saved_and_made_again(tmp_path: Path) -> None:
    model = tiny_model("t5")
    model.add_mixin("compacter", compacter_of(model, sublayers=("mlp",), rank=2))
    assert torch.equal(outputs(reloaded(model, tmp_path)), outputs(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_terms": 3}, "hidden_size=16 is not divisible by num_terms=3"),
        ({"bottleneck_size": 6}, "bottleneck_size=6 is not divisible by num_terms=4"),
        ({"num_terms": 0, "rank": 0}, "2 problems"),
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"layers": (7,)}, "there is no layer 7"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.CompacterMixin.for_model(tiny_backbone(), **options)
