"""The MLP head: what it computes, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.testing import tiny_model
from tests.helpers import tiny_ids
from tests.helpers import tiny_model as tiny_backbone
from tests.mixins.helpers import outputs, randomise, reloaded


def hidden_states(model: sat.BaseModel) -> torch.Tensor:
    result: torch.Tensor = model.with_mixin("no-head", sat.NoHeadMixin())(tiny_ids())[0]
    return result


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_an_mlp_over_each_token(bias: bool) -> None:
    model = tiny_backbone()
    last = hidden_states(model)
    mixin = randomise(sat.MLPHeadMixin.for_model(model, output_sizes=(7, 5, 3), activation="silu", bias=bias))
    model.add_mixin("head", mixin)
    first, second, third = mixin.projections
    assert all((projection.bias is not None) == bias for projection in mixin.projections)
    act = torch.nn.functional.silu
    torch.testing.assert_close(model(tiny_ids())[0], third(act(second(act(first(last))))))


@pytest.mark.parametrize("output_sizes", [[4], 4], ids=str)
def test_one_size_is_a_linear_head(output_sizes: Any) -> None:
    model = tiny_backbone()
    last = hidden_states(model)
    mixin = randomise(sat.MLPHeadMixin.for_model(model, output_sizes=output_sizes))
    assert mixin.saved_options["output_sizes"] == [4]
    model.add_mixin("head", mixin)
    torch.testing.assert_close(model(tiny_ids())[0], mixin.projections[0](last))


def test_a_head_that_is_there_has_to_go_first() -> None:
    model = tiny_model("bert")
    head = sat.MLPHeadMixin.for_model(model, output_sizes=(8, 2))
    with pytest.raises(sat.HookConflictError, match="both replace final_forward"):
        model.add_mixin("mlp-head", head)
    (old,) = (name for name in model.mixins if "head" in name)
    model.del_mixin(old)
    assert outputs(model.add_mixin("mlp-head", head)).shape == (2, 9, 2)


def test_it_is_saved_and_made_again(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.add_mixin("head", randomise(sat.MLPHeadMixin.for_model(model, output_sizes=(6, 3), activation="relu")))
    assert torch.equal(outputs(reloaded(model, tmp_path)), outputs(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_sizes": ()}, "output_sizes is empty"),
        ({"output_sizes": (3, 0)}, r"output_sizes\[1\]=0 must be a whole number, at least 1"),
        ({"output_sizes": (2.5,)}, r"output_sizes\[0\]=2.5 must be a whole number"),
        ({"output_sizes": "3"}, r"output_sizes\[0\]='3' must be a whole number"),
        ({"output_sizes": None}, r"output_sizes\[0\]=None must be a whole number"),
        ({"output_sizes": (3,), "activation": "tnah"}, "Did you mean 'tanh'"),
    ],
)
def test_sizes_and_activations_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.MLPHeadMixin.for_model(tiny_backbone(), **options)
