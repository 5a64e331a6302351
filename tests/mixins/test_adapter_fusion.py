"""AdapterFusion: attention over adapters that stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import swissarmy as sat
from swissarmy.testing import tiny_model
from tests.helpers import tiny_ids
from tests.helpers import tiny_model as tiny_backbone
from tests.mixins.helpers import outputs, randomise, reloaded, watched


def adapter_of(model: Any, *, seed: int = 5, **options: Any) -> Any:
    return randomise(sat.AdapterMixin.for_model(model, bottleneck_size=3, **options), seed=seed)


def compacter_of(model: Any) -> Any:
    return randomise(sat.CompacterMixin.for_model(model), seed=8)


def with_adapters(family: str = "gpt2", **adapters: Any) -> Any:
    model = tiny_model(family)
    for name, adapter in (adapters or {"a": adapter_of(model), "b": adapter_of(model, seed=6)}).items():
        model.add_mixin(name, adapter)
    return model


# What is computed


def test_it_is_attention_of_the_sublayers_result_over_what_the_adapters_add() -> None:
    model = tiny_backbone()
    adapters = {"a": adapter_of(model).double(), "b": compacter_of(model).double(), "c": adapter_of(model).double()}
    mixin = randomise(sat.AdapterFusionMixin.for_model(model, adapters=adapters))
    inner, outer = watched(model, mixin, input_ids=tiny_ids())
    for (sublayer, layer_id), (given, result) in inner.seen.items():
        site = mixin.layers[layer_id][sublayer]
        changes = torch.stack([each.change(sublayer, given, result, layer_id) for each in adapters.values()], dim=2)
        scores = torch.einsum("bsh,bsnh->bsn", site.query(result), site.key(changes))
        expected = result + torch.einsum("bsn,bsnh->bsh", scores.softmax(-1), site.value(changes))
        torch.testing.assert_close(outer.seen[sublayer, layer_id][1], expected)


def test_equal_adapters_act_as_one_of_them() -> None:
    model, fused = tiny_model("gpt2"), tiny_model("gpt2")
    fused.add_mixin("a", adapter_of(fused)).add_mixin("b", adapter_of(fused))
    sat.fuse_adapters(fused, ["a", "b"])
    torch.testing.assert_close(outputs(fused), outputs(model.add_mixin("a", adapter_of(model))), rtol=1e-4, atol=1e-4)


def test_adapters_at_different_sublayers_are_fused_where_they_are() -> None:
    model = tiny_backbone()
    adapters = {"a": adapter_of(model, kind="pfeiffer"), "b": adapter_of(model, layers=(1,))}
    mixin = sat.AdapterFusionMixin.for_model(model, adapters=adapters)
    assert [set(layer) for layer in mixin.layers] == [{"mlp"}, {"attention", "mlp"}]
    model.add_mixin("fusion", mixin)
    assert torch.isfinite(model(tiny_ids())[0]).all()


def test_new_adapters_add_nothing_whatever_the_fusion_is() -> None:
    model = tiny_model("gpt2")
    before = outputs(model)
    adapters = {name: sat.AdapterMixin.for_model(model) for name in "ab"}
    model.add_mixin("fusion", randomise(sat.AdapterFusionMixin.for_model(model, adapters=adapters)))
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_generation_with_a_cache_gives_the_same_text(family: str) -> None:
    model = with_adapters(family).double()
    sat.fuse_adapters(model, ["a", "b"])
    source = {"input_ids": torch.tensor([[5, 6, 7]])} if model.parts else {}
    prompt = torch.tensor([9, 4])
    tokens, _ = sat.fill_sequence(model, torch.cat((prompt, torch.full((4,), -1))), **source)
    ids = prompt[None]
    for _ in range(4):
        told = {**source, "decoder_input_ids": ids} if model.parts else {"input_ids": ids}
        ids = torch.cat((ids, model(**told)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, ids)


# The adapters stay as they are


def test_no_pattern_and_no_optimizer_reaches_the_adapters() -> None:
    model = with_adapters()
    sat.fuse_adapters(model, ["a", "b"], "fusion")
    fusion = model.get_mixin("fusion")
    before = {name: tensor.clone() for name, tensor in fusion.adapters.state_dict().items()}
    model.freeze_except("mixins.fusion")
    live = [each for each in model.parameters() if each.requires_grad]
    assert len(live) == 2 * 2 * 4  # layers, sublayers; query with its bias, key, value
    optimizer = torch.optim.AdamW(live, lr=0.1)
    outputs(model).square().mean().backward()
    optimizer.step()
    assert all(each.grad is not None and each.grad.any() for each in live)
    assert len(before) == 2 * 2 * 2 * 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in fusion.adapters.state_dict().items())


def test_they_run_without_dropout_and_the_callers_own_stay_trainable() -> None:
    model = tiny_model("gpt2")
    adapter = adapter_of(model, dropout=0.5)
    model.add_mixin("fusion", sat.AdapterFusionMixin.for_model(model, adapters={"a": adapter}))
    model.train()
    assert torch.equal(outputs(model), outputs(model))
    assert adapter.layers[0]["mlp"].dropout.p == 0.5
    assert all(isinstance(each, nn.Parameter) for each in adapter.layers[0]["mlp"].up.parameters())


def test_the_penalty_is_the_distance_of_the_values_from_the_identity() -> None:
    model = tiny_backbone()
    mixin = sat.AdapterFusionMixin.for_model(model, adapters={"a": adapter_of(model, kind="pfeiffer")})
    assert mixin.identity_penalty() == 0
    with torch.no_grad():
        mixin.layers[1]["mlp"].value.weight[3, 4] = 2.0
    mixin.identity_penalty().backward()
    assert mixin.identity_penalty() == 4
    assert mixin.layers[1]["mlp"].value.weight.grad[3, 4] == 4


# In place of a model's adapters


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_it_takes_the_place_of_adapters_which_can_be_put_back(family: str) -> None:
    model = with_adapters(family)
    before = outputs(model)
    removed = sat.fuse_adapters(model, ["a", "b"], "fusion")
    assert "a" not in (set(model.part("decoder").mixins) if model.parts else set(model.mixins))
    assert not torch.allclose(outputs(model), before)
    model.del_mixin("fusion")
    for name, adapter in removed.items():
        model.add_mixin(name, adapter)
    assert torch.equal(outputs(model), before)


def test_an_adapter_that_only_one_part_has_is_fused_there() -> None:
    model = tiny_model("t5")
    model.add_mixin("a", adapter_of(model), part="encoder").add_mixin("b", adapter_of(model))
    sat.fuse_adapters(model, ["a", "b"], "fusion")
    names = {part: set(model.get_mixin("fusion", part=part).adapters) for part in model.parts}
    assert names == {"encoder": {"a", "b"}, "decoder": {"b"}}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_it_is_saved_and_made_again(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model = with_adapters(family, a=adapter_of(model, kind="parallel"), b=compacter_of(model))
    sat.fuse_adapters(model, ["a", "b"])
    for part in model.parts.values() if model.parts else [model]:
        randomise(part.get_mixin("adapter-fusion"))
    assert torch.equal(outputs(reloaded(model, tmp_path)), outputs(model))


# What is refused


def test_names_that_are_no_adapters_are_refused_and_nothing_changes() -> None:
    model = with_adapters(adapter_one=adapter_of(tiny_model("gpt2")))
    model.add_mixin("lora", sat.LoRAMixin.for_model(model))
    for name, message in (("adapter_on", "Did you mean 'adapter_one'"), ("lora", "Its adapters are: adapter_one")):
        with pytest.raises(sat.HookDefinitionError, match=message):
            sat.fuse_adapters(model, ["adapter_one", name])
    with pytest.raises(sat.HookDefinitionError, match="No name"):
        sat.fuse_adapters(model, [])
    with pytest.raises(sat.HookDefinitionError, match="'adapter_one' is named twice"):
        sat.fuse_adapters(model, ["adapter_one", "adapter_one"])
    with pytest.raises(sat.HookConflictError, match="there is a mixin 'lora' already"):
        sat.fuse_adapters(model, ["adapter_one"], "lora")
    with pytest.raises(sat.HookDefinitionError, match="use letters"):
        sat.fuse_adapters(model, ["adapter_one"], "no name")
    assert set(model.mixins) == {"positions", "adapter_one", "lora"}


def test_a_fusion_that_one_part_refuses_takes_no_adapter_away() -> None:
    model = with_adapters("t5")
    model.add_mixin("taken", sat.LoRAMixin.for_model(model)["decoder"], part="decoder")
    names = {part: set(each.mixins) for part, each in model.parts.items()}
    with pytest.raises(sat.HookConflictError, match="there is a mixin 'taken' already"):
        sat.fuse_adapters(model, ["a", "b"], "taken")
    assert {part: set(each.mixins) for part, each in model.parts.items()} == names


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({}, "adapters is empty"),
        (["a"], "give the adapters by name"),
        ({"a": "b"}, "'a' is neither an adapter nor the class and the options of one"),
        ({"a": {"class": "LoRAMixin", "options": {}}}, "'a' is neither an adapter"),
        ({"a": sat.AdapterMixin.for_model(tiny_backbone(num_layers=3))}, "adapter 'a' has 3 layers and the model 2"),
    ],
)
def test_adapters_that_are_none_are_refused(adapters: Any, message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.AdapterFusionMixin.for_model(tiny_backbone(), adapters=adapters)
