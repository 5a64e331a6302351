"""Bottleneck adapters: what they add, where, and that new ones add nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swissarmy as sat
from swissarmy.testing import TINY_CONFIGS, tiny_inputs, tiny_model
from tests.helpers import tiny_ids
from tests.helpers import tiny_model as tiny_backbone
from tests.mixins.helpers import outputs, randomise, reloaded, watched


def adapter_of(model: Any, **options: Any) -> Any:
    return randomise(sat.AdapterMixin.for_model(model, bottleneck_size=3, **options))


def by_hand(adapter: Any, x: Tensor, scale: float) -> Tensor:
    return (
        F.linear(F.relu(F.linear(x, adapter.down.weight, adapter.down.bias)), adapter.up.weight, adapter.up.bias)
        * scale
    )


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel"])
def test_a_new_adapter_changes_nothing(family: str, kind: str) -> None:
    model = tiny_model(family)
    before = outputs(model)
    model.add_mixin("adapter", sat.AdapterMixin.for_model(model, kind=kind))
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "both"])
@pytest.mark.parametrize(("kind", "scale"), [("houlsby", 1.0), ("pfeiffer", 1.0), ("parallel", 4.0)])
def test_it_adds_to_what_the_sublayers_give_under_every_placement_of_norms(
    kind: str, scale: float, placement: str
) -> None:
    model = tiny_backbone(norm_placement=placement)
    mixin = adapter_of(model, kind=kind)
    inner, outer = watched(model, mixin, input_ids=tiny_ids())
    for (sublayer, layer_id), (given, result) in inner.seen.items():
        layer, expected = mixin.layers[layer_id], result
        assert (sublayer in layer) == (kind == "houlsby" or sublayer == "mlp")
        if sublayer in layer:
            expected = result + by_hand(layer[sublayer], given if kind == "parallel" else result, scale)
        torch.testing.assert_close(outer.seen[sublayer, layer_id][1], expected)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "both"])
def test_what_it_adds_comes_before_the_norm_that_follows_the_sublayer(placement: str) -> None:
    model = tiny_backbone(norm_placement=placement, final_norm=False, num_layers=1)
    mixin = adapter_of(model, kind="pfeiffer")
    layer = model.transformer.layers[0]
    torch.nn.init.zeros_(layer.attention.output.weight)  # so that the MLP's stream is known: embeddings, once normed
    embedded = model.transformer.word_embeddings(tiny_ids())
    stream = layer.attention_residual.add(embedded, torch.zeros_like(embedded))
    _, outer = watched(model, mixin, input_ids=tiny_ids())
    changed = layer.mlp_residual.add(stream, outer.seen["mlp", 0][1])
    model.add_mixin("head", sat.NoHeadMixin())
    torch.testing.assert_close(model(tiny_ids())[0], changed)


def test_the_activation_and_the_scale_are_options() -> None:
    model = tiny_backbone()
    mixin = adapter_of(model, kind="pfeiffer", activation="tanh", scale=0.5)
    inner, outer = watched(model, mixin, input_ids=tiny_ids())
    adapter, (_, result) = mixin.layers[0]["mlp"], inner.seen["mlp", 0]
    expected = result + 0.5 * adapter.up(torch.tanh(adapter.down(result)))
    torch.testing.assert_close(outer.seen["mlp", 0][1], expected)


def test_dropout_inside_an_adapter_is_for_training_only() -> None:
    model = tiny_backbone()
    model.add_mixin("adapter", adapter_of(model, dropout=0.5))
    assert torch.equal(model(tiny_ids())[0], model(tiny_ids())[0])
    model.train()
    assert not torch.equal(model(tiny_ids())[0], model(tiny_ids())[0])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {f"{i}.{part}" for i in (0, 1) for part in ("attention", "mlp")}),
        ({"layers": range(1, 2)}, {"1.attention", "1.mlp"}),
        ({"layers": (0,), "sublayers": ("attention",)}, {"0.attention"}),
        ({"kind": "parallel", "sublayers": ("attention", "mlp"), "layers": [1]}, {"1.attention", "1.mlp"}),
    ],
)
def test_layers_and_sublayers_can_be_chosen(options: dict[str, Any], names: set[str]) -> None:
    mixin = adapter_of(tiny_backbone(), **options)
    assert {".".join(name.split(".")[1:3]) for name, _ in mixin.named_parameters()} == names


def test_an_encoder_decoder_gets_adapters_after_cross_attention_in_its_decoder_only() -> None:
    mixins = adapter_of(tiny_model("t5"))
    assert {part: set(mixin.layers[0]) for part, mixin in mixins.items()} == {
        "encoder": {"attention", "mlp"},
        "decoder": {"attention", "cross_attention", "mlp"},
    }


def test_its_size_is_that_of_the_paper() -> None:
    model = tiny_backbone()
    count = sum(parameter.numel() for parameter in adapter_of(model).parameters())
    assert count == 2 * 2 * (2 * 16 * 3 + 16 + 3)  # layers, sublayers, two matrices, two biases
    default = sat.AdapterMixin.for_model(tiny_backbone(hidden_size=64), kind="pfeiffer")
    assert default.layers[0]["mlp"].down.weight.shape == (4, 64)


def test_only_its_own_parameters_get_gradients() -> None:
    model = tiny_backbone()
    model.add_mixin("adapter", adapter_of(model)).freeze_except("mixins.adapter")
    model(tiny_ids())[0].square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"mixins.adapter.{name}" for name, _ in model.get_mixin("adapter").named_parameters()}


def test_experts_count_as_the_mlp() -> None:
    model = tiny_backbone({"experts": sat.MixtureOfExpertsMixin.for_config(tiny_backbone().config, num_experts=2)})
    inner, outer = watched(model, adapter_of(model, kind="parallel"), input_ids=tiny_ids())
    assert not torch.equal(inner.seen["mlp", 1][1], outer.seen["mlp", 1][1])


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_it_is_saved_and_made_again(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.add_mixin("adapter", adapter_of(model, kind="parallel", layers=(1,), activation="silu"))
    again = reloaded(model, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    again.del_mixin("adapter")
    assert torch.equal(outputs(again), outputs(tiny_model(family)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (2,)}, "there is no layer 2; they are 0 to 1"),
        ({"layers": ()}, "layers is empty"),
        ({"sublayers": ("cross_attention",)}, r"the model's layers have \('attention', 'mlp'\) only"),
        ({"sublayers": ()}, "sublayers is empty"),
        ({"bottleneck_size": 0}, "bottleneck_size=0 must be at least 1"),
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"kind": "houlsbi"}, "kind='houlsbi' is not one of 'houlsby', 'pfeiffer', 'parallel'"),
        ({"bottleneck": 8}, "unknown field 'bottleneck'. Did you mean 'bottleneck_size'"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.AdapterMixin.for_model(tiny_backbone(), **options)


def test_a_cached_generation_gives_the_same_text() -> None:
    model = tiny_model("llama")
    model.add_mixin("adapter", adapter_of(model))
    prompt = tiny_inputs(model, batch=1, length=4)["input_ids"]
    tokens, _ = sat.fill_sequence(model, torch.cat((prompt[0], torch.full((4,), -1))))
    ids = prompt
    for _ in range(4):
        ids = torch.cat((ids, model(ids)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, ids)
