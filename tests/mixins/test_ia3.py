"""IA3: what is stretched, and that stretched weights do the same."""

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
    assert torch.equal(logits(with_method(family, sat.IA3Mixin, trained=False)), logits(tiny_model(family).double()))


def test_keys_and_values_are_stretched_behind_their_projection_and_the_mlp_before_its_last() -> None:
    model = with_method("gpt2", sat.IA3Mixin)
    layer = model.get_mixin("method").layers[1]
    assert set(layer) == {"attention_key", "attention_value", "mlp_down"}
    assert layer["mlp_down"].scale.shape == (128,)
    x, linear = torch.randn(2, 3, 128, dtype=torch.float64), model.transformer.layers[1].mlp.down
    stretched = model.hooks.linear_forward(x, linear, "mlp.down", layer_id=1)
    close(stretched, linear(x * layer["mlp_down"].scale))
    x, linear = torch.randn(2, 3, 32, dtype=torch.float64), model.transformer.layers[1].attention.key
    stretched = model.hooks.linear_forward(x, linear, "attention.key", layer_id=1)
    close(stretched, linear(x) * layer["attention_key"].scale)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5", "vit"])
@pytest.mark.parametrize("options", [{}, {"targets": "*", "inputs": ("query", "mlp.*"), "layers": [1]}], ids=str)
def test_merging_changes_nothing_and_unmerging_brings_the_weights_back(family: str, options: dict[str, Any]) -> None:
    check_merging(family, sat.IA3Mixin, **options)


def test_merging_what_changes_nothing_is_refused() -> None:
    with pytest.raises(HookDefinitionError, match="merging 'method' would change no weight"):
        sat.merge_mixin(with_method("gpt2", sat.IA3Mixin, trained=False), "method")


def test_merging_beside_lora_is_refused_since_a_sum_would_be_stretched() -> None:
    model = with_method("gpt2", sat.IA3Mixin)
    model.add_mixin("lora", sat.LoRAMixin.for_model(model))
    for name in ("lora", "method"):
        with pytest.raises(HookConflictError, match="both change projections"):
            sat.merge_mixin(model, name)


def test_rows_that_were_multiplied_by_zero_are_lost_and_nothing_is_changed_in_the_attempt() -> None:
    model = with_method("gpt2", sat.IA3Mixin)
    with torch.no_grad():
        model.get_mixin("method").layers[1]["attention_key"].scale[3] = 0
    removed = sat.merge_mixin(model, "method")
    merged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(HookDefinitionError, match="multiplied by zero are lost"):
        sat.unmerge_mixin(model, "method", removed)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in model.state_dict().items())


def test_it_is_loaded_again(tmp_path: Path) -> None:
    check_saving(tmp_path / "model", "t5", sat.IA3Mixin, targets=("cross_attention.*", "mlp.down"), inputs="mlp.down")


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"inputs: 'mlp.dwn' matches no projection that .* Did you mean 'mlp.down'\?"):
        sat.IA3Mixin.for_model(tiny_model("gpt2"), inputs="mlp.dwn")


def test_inputs_are_some_of_the_targets_and_by_default_those_that_lead_out_of_the_mlp() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ConfigError, match=r"inputs: 'down' matches no projection that `targets` and `layers` choose"):
        sat.IA3Mixin.for_model(model, targets="key", inputs="down")
    assert not any(stretch.of_input for stretch in stretches(sat.IA3Mixin.for_model(model, targets="mlp.up")))
    assert all(stretch.of_input for stretch in stretches(sat.IA3Mixin.for_model(model, targets="mlp.{down,down}")))
    assert not any(stretch.of_input for stretch in stretches(sat.IA3Mixin.for_model(model, inputs=())))


def stretches(mixin: Any) -> list[Any]:
    return [stretch for layer in mixin.layers for stretch in layer.values()]
