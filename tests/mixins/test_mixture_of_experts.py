"""A mixture of experts, and methods that change projections: in which order they go together."""

import pytest

import swissarmy as sat
from swissarmy.core.errors import HookConflictError
from swissarmy.testing import tiny_model


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_method_that_comes_after_experts_changes_theirs(family: str) -> None:
    model = tiny_model(family)
    model.add_mixin("experts", sat.MixtureOfExpertsMixin.for_model(model, num_experts=2))
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets="experts.*.up"))
    names = [name for name, _ in model.named_parameters() if "mixins.lora" in name]
    assert any("experts_1_up" in name for name in names)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_experts_are_refused_where_a_method_changes_the_mlp_that_they_replace(family: str) -> None:
    model = tiny_model(family)
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets=("query", "mlp.up")))
    with pytest.raises(HookConflictError, match="'lora' changes: add the experts first"):
        sat.MixtureOfExpertsMixin.for_model(model)


def test_a_method_that_leaves_the_mlp_alone_may_come_first() -> None:
    model = tiny_model("gpt2")
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets="query"))
    model.add_mixin("experts", sat.MixtureOfExpertsMixin.for_model(model, num_experts=2))
    assert len(model.mixins) == len(tiny_model("gpt2").mixins) + 2
