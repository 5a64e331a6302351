"""BitFit: biases beside the projections."""

from pathlib import Path

import pytest
import torch

import swissarmy as sat
from swissarmy.core.errors import HookDefinitionError
from swissarmy.testing import TINY_CONFIGS, tiny_model
from tests.mixins.method_cases import check_merging, check_saving, close, logits, with_method


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_a_new_mixin_changes_nothing_bit_for_bit(family: str) -> None:
    assert torch.equal(logits(with_method(family, sat.BitFitMixin, trained=False)), logits(tiny_model(family).double()))


def test_it_is_the_same_as_training_the_models_own_biases() -> None:
    model, plain = with_method("gpt2", sat.BitFitMixin, trained=False), tiny_model("gpt2").double()
    ids = torch.arange(10).view(2, 5)
    for each in (model, plain):
        each(ids)[0].square().mean().backward()
    for layer_id, layer in enumerate(plain.transformer.layers):
        added = model.get_mixin("method").layers[layer_id]
        close(added["attention_query"].bias.grad, layer.attention.query.bias.grad)
        close(added["mlp_down"].bias.grad, layer.mlp.down.bias.grad)


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit"])
def test_merging_changes_nothing_and_unmerging_brings_the_biases_back(family: str) -> None:
    check_merging(family, sat.BitFitMixin)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_projection_without_a_bias_cannot_take_one_and_nothing_is_changed_in_the_attempt(family: str) -> None:
    model = with_method(family, sat.BitFitMixin)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(HookDefinitionError, match=r"layers.0.attention.query' has no bias that could take the change"):
        sat.merge_mixin(model, "method")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sums_are_merged_beside_sums() -> None:
    model = with_method("gpt2", sat.BitFitMixin)
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets="*", r=2))
    for parameter in model.get_mixin("lora").parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = logits(model)
    sat.merge_mixin(model, "method")
    sat.merge_mixin(model, "lora")
    close(logits(model), expected)


def test_it_is_loaded_again(tmp_path: Path) -> None:
    check_saving(tmp_path / "model", "llama", sat.BitFitMixin, targets=("value", "mlp.*"), layers=(1,))
