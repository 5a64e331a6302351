"""Side neurons: the MLP becomes a wider one, and only what is new trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import swissarmy as sat
from swissarmy.testing import TINY_CONFIGS, tiny_model
from tests.helpers import tiny_ids
from tests.helpers import tiny_model as tiny_backbone
from tests.mixins.helpers import outputs, randomise, reloaded


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_new_neurons_change_nothing(family: str) -> None:
    model = tiny_model(family)
    before = outputs(model)
    model.add_mixin("ffadd", sat.FFADDMixin.for_model(model))
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("changes", [{}, {"gated_mlp": True, "activation": "silu"}, {"mlp_bias": False}])
def test_the_model_computes_what_one_with_wider_mlps_does(changes: dict[str, Any]) -> None:
    model, wide = tiny_backbone(**changes), tiny_backbone(intermediate_size=64 + 5, **changes)
    mixin = randomise(sat.FFADDMixin.for_model(model, num_neurons=5))
    model.add_mixin("ffadd", mixin)
    state = dict(wide.state_dict())
    for name, value in model.transformer.state_dict().items():
        layer_id, _, part = name.removeprefix("layers.").partition(".mlp.")
        side = mixin.layers[int(layer_id)].state_dict().get(part) if part else None
        dim = 1 if part == "down.weight" else 0
        state[f"transformer.{name}"] = value if side is None else torch.cat((value, side), dim=dim)
    wide.load_state_dict(state)
    torch.testing.assert_close(model(tiny_ids())[0], wide(tiny_ids())[0])


def test_layers_can_be_chosen_and_only_new_neurons_train() -> None:
    model = tiny_backbone()
    model.add_mixin("ffadd", randomise(sat.FFADDMixin.for_model(model, num_neurons=3, layers=(1,))))
    model.freeze_except("mixins.ffadd")
    model(tiny_ids())[0].square().sum().backward()
    live = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert live == {f"mixins.ffadd.layers.1.{name}" for name in ("up.weight", "up.bias", "down.weight")}
    assert isinstance(model.get_mixin("ffadd").layers[0], nn.Identity)


def test_it_is_saved_and_made_again(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.add_mixin("ffadd", randomise(sat.FFADDMixin.for_model(model, num_neurons=3, layers=(1,))))
    assert torch.equal(outputs(reloaded(model, tmp_path)), outputs(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_neurons": 0}, "num_neurons=0 must be at least 1"), ({"layers": (-1,)}, "there is no layer -1")],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.FFADDMixin.for_model(tiny_backbone(), **options)
