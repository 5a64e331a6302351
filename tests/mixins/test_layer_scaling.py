"""Soft layer scaling: a factor for each sublayer."""

from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.core.errors import ConfigError, HookConflictError, HookDefinitionError
from swissarmy.testing import TINY_CONFIGS, tiny_model
from tests.mixins.method_cases import check_merging, check_saving, close, logits, with_method


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_a_new_mixin_changes_nothing_bit_for_bit(family: str) -> None:
    new = with_method(family, sat.LayerScalingMixin, trained=False)
    assert torch.equal(logits(new), logits(tiny_model(family).double()))


def test_a_factor_of_zero_takes_a_layer_out() -> None:
    model = with_method("gpt2", sat.LayerScalingMixin, trained=False, layers=(1,))
    with torch.no_grad():
        for parameter in model.get_mixin("method").parameters():
            parameter.zero_()
    shorter: Any = tiny_model("gpt2", n_layer=1)
    whole = tiny_model("gpt2").double()
    shorter.double().load_state_dict({name: whole.state_dict()[name] for name in shorter.state_dict()})
    close(logits(model), logits(shorter))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "bert", "t5", "vit"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_merging_changes_nothing_and_unmerging_brings_the_weights_back(family: str, per_channel: bool) -> None:
    check_merging(family, sat.LayerScalingMixin, per_channel=per_channel)


def test_the_factor_of_experts_is_merged_into_each() -> None:
    model: Any = tiny_model("gpt2").double()
    model.add_mixin("experts", sat.MixtureOfExpertsMixin.for_model(model, num_experts=3))
    model.add_mixin("scaling", sat.LayerScalingMixin.for_model(model))
    for parameter in model.get_mixin("scaling").parameters():
        torch.nn.init.normal_(parameter)
    expected = logits(model)
    sat.merge_mixin(model, "scaling")
    close(logits(model), expected)


def test_merging_beside_what_wraps_the_same_sublayers_or_projections_is_refused() -> None:
    for name, kind in {"adapter": sat.AdapterMixin, "lora": sat.LoRAMixin}.items():
        model = with_method("gpt2", sat.LayerScalingMixin)
        model.add_mixin(name, kind.for_model(model))
        with pytest.raises(HookConflictError, match=f"'method' cannot be merged beside '{name}'"):
            sat.merge_mixin(model, "method")


def test_what_was_multiplied_by_zero_is_lost() -> None:
    model = with_method("gpt2", sat.LayerScalingMixin)
    with torch.no_grad():
        model.get_mixin("method").layers[0].mlp.zero_()
    removed = sat.merge_mixin(model, "method")
    with pytest.raises(HookDefinitionError, match="what was multiplied by zero is lost"):
        sat.unmerge_mixin(model, "method", removed)


def test_it_is_loaded_again(tmp_path: Path) -> None:
    check_saving(tmp_path / "model", "t5", sat.LayerScalingMixin, layers=(1,), per_channel=True)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="there is no layer 5"):
        sat.LayerScalingMixin.for_model(tiny_model("gpt2"), layers=(5,))
