"""LoRA and its relatives: what they compute, what they train, what they take out of the weights and put into them."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.backbone.projections import projections_of
from swissarmy.core.errors import ConfigError
from swissarmy.mixins.reduced_weights import reduce_weights
from swissarmy.testing import TINY_CONFIGS, tiny_inputs, tiny_model
from tests.helpers import tiny_family_model, tiny_ids
from tests.helpers import tiny_model as tiny_backbone

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "dora from pissa": {"dora": True, "init": "pissa"},
}


def with_lora(family: str = "gpt2", *, trained: bool = True, **options: Any) -> Any:
    """A tiny model in float64 with LoRA, whose parameters are random if it is `trained`."""
    model = tiny_model(family).double()
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, **{"r": 3, **options}))
    return train(model) if trained else model


def train(model: Any, name: str = "lora", *, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for full_name, parameter in model.named_parameters():
        if f"mixins.{name}." in full_name:
            nn.init.normal_(parameter, std=0.4, generator=generator)
    return model


def logits(model: Any, **kw_args: Any) -> Tensor:
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in tiny_inputs(model).items()}
    result: Tensor = model(**inputs, **kw_args)[0]
    return result


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item()))


def change_of(model: Any, address: str) -> Any:
    (projection,) = (each for each in projections_of(model) if each.address == address)
    return model.get_mixin("lora").change_at(projection)


# What is computed


@pytest.mark.parametrize("family", TINY_CONFIGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_changes_nothing(family: str, variant: str) -> None:
    plain = logits(tiny_model(family).double())
    adapted = logits(with_lora(family, trained=False, targets="*", **VARIANTS[variant]))
    if variant in ("lora", "rslora"):
        assert torch.equal(adapted, plain)
    close(adapted, plain, 1e-9 if family == "gemma3_text" else 1e-10)


def test_lora_adds_a_scaled_product_to_the_weight() -> None:
    model = with_lora(targets="layers.1.mlp.up", alpha=5.0)
    change = change_of(model, "layers.1.mlp.up")
    expected = tiny_model("gpt2").double()
    with torch.no_grad():
        expected.get_parameter("transformer.layers.1.mlp.up.weight").add_(5 / 3 * change.lora_B @ change.lora_A)
    close(logits(model), logits(expected))
    assert not torch.equal(logits(model), logits(tiny_model("gpt2").double()))


def test_dora_turns_the_rows_of_the_weight_and_gives_them_lengths() -> None:
    model = with_lora(targets="layers.0.attention.value", dora=True)
    change = change_of(model, "layers.0.attention.value")
    expected = tiny_model("gpt2").double()
    weight = expected.get_parameter("transformer.layers.0.attention.value.weight")
    with torch.no_grad():
        turned = weight + 16 / 3 * change.lora_B @ change.lora_A
        weight.copy_(change.magnitude[:, None] * turned / turned.norm(dim=1, keepdim=True))
    close(logits(model), logits(expected))


def test_dora_takes_no_gradient_through_the_length_that_it_divides_by() -> None:
    model = with_lora(targets="layers.0.attention.value", dora=True)
    change = change_of(model, "layers.0.attention.value")
    linear = model.transformer.layers[0].attention.value
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    a, b, magnitude = (
        each.detach().clone().requires_grad_() for each in (change.lora_A, change.lora_B, change.magnitude)
    )
    turned = linear.weight.detach() + 16 / 3 * b @ a
    by_hand = F.linear(x, turned) * (magnitude / turned.detach().norm(dim=1)) + linear.bias
    by_hand.square().sum().backward()
    change(linear(x), x, linear).square().sum().backward()
    for own, expected in zip((change.lora_A, change.lora_B, change.magnitude), (a, b, magnitude), strict=True):
        close(own.grad, expected.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_with_a_row_of_zeros_stays_finite(bias: bool) -> None:
    model = tiny_backbone(query_key_value_bias=bias)
    with torch.no_grad():
        model.transformer.layers[0].attention.query.weight[0] = 0
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, dora=True))
    assert torch.isfinite(model(tiny_ids())[0]).all()
    model(tiny_ids())[0].sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in model.get_mixin("lora").parameters())


def test_pissa_trains_the_largest_singular_vectors_and_leaves_the_rest_of_the_weight() -> None:
    model = with_lora(trained=False, targets="layers.0.mlp.down", init="pissa")
    weight = model.transformer.layers[0].mlp.down.weight.detach()
    change = change_of(model, "layers.0.mlp.down")
    u, values, v = torch.linalg.svd(weight)
    best = u[:, :3] * values[:3] @ v[:3]
    close(change.scale * change.lora_B @ change.lora_A, best, 1e-10)
    train(model)
    x = torch.randn(4, 128, dtype=torch.float64)
    expected = F.linear(x, weight - best + change.scale * change.lora_B @ change.lora_A)
    linear = nn.Linear(128, 32, bias=False, dtype=torch.float64)
    linear.weight.data = weight
    close(change(linear(x), x, linear), expected, 1e-10)


def test_olora_starts_from_orthonormal_columns() -> None:
    change = change_of(with_lora(trained=False, targets="mlp.up", init="olora"), "layers.1.mlp.up")
    close(change.lora_B.T @ change.lora_B, torch.eye(3, dtype=torch.float64))


def test_dropout_is_on_what_a_is_given_in_training_only() -> None:
    model = with_lora(targets="layers.0.mlp.down", dropout=0.5)
    still = logits(model)
    assert torch.equal(logits(model), still)
    model.train()
    change, linear = change_of(model, "layers.0.mlp.down"), model.transformer.layers[0].mlp.down
    x = torch.ones(20_000, 128, dtype=torch.float64)
    added = change(linear(x), x, linear) - linear(x)
    assert added.std(dim=0).min() > 0
    expected = change.scale * F.linear(F.linear(x[:1], change.lora_A), change.lora_B)
    assert (added.mean(dim=0) - expected[0]).abs().max() < 0.1 * added.std(dim=0).max()


def test_scales_and_ranks_follow_the_patterns() -> None:
    model = with_lora(
        targets=("attention.*", "mlp.up"),
        r=4,
        alpha=8.0,
        rank_pattern={"layers.1.attention.query": 2, "attention.*": 6},
        alpha_pattern={"mlp.*": 3.0},
    )
    found = {
        each.address: (change.r, change.scale)
        for each in projections_of(model)
        if (change := model.get_mixin("lora").change_at(each)) is not None
    }
    assert len(found) == 10
    assert found["layers.0.attention.query"] == (6, 8 / 6)
    assert found["layers.1.attention.query"] == (2, 8 / 2)
    assert found["layers.1.mlp.up"] == (4, 3 / 4)
    assert change_of(with_lora(r=4, alpha=8.0, rslora=True), "layers.0.attention.query").scale == 8 / math.sqrt(4)
    braces = with_lora(targets="*", r=4, rank_pattern={"{mlp.up,key}": 2, "layers.{0..1}.key": 3, "mlp.up": 5})
    ranks = [change_of(braces, f"layers.1.{name}").r for name in ("attention.key", "mlp.up", "mlp.down")]
    assert ranks == [2, 2, 4]  # the first match counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {f"layers.{i}.attention.{p}" for i in (0, 1) for p in ("query", "value")}),
        (
            {"targets": "attention.*", "layers": range(1, 2)},
            {f"layers.1.attention.{p}" for p in ("query", "key", "value", "output")},
        ),
        (
            {"targets": ["layers.0.mlp.*", "key"], "layers": [0]},
            {"layers.0.mlp.up", "layers.0.mlp.down", "layers.0.attention.key"},
        ),
        (
            {"targets": ["layers.{0..1}.query", "mlp.{up,down}"], "layers": [1]},
            {"layers.1.attention.query", "layers.1.mlp.up", "layers.1.mlp.down"},
        ),
    ],
)
def test_targets_and_layers_choose_projections(options: dict[str, Any], expected: set[str]) -> None:
    model = with_lora(**options)
    mixin = model.get_mixin("lora")
    assert {each.address for each in projections_of(model) if mixin.change_at(each) is not None} == expected


def test_a_configuration_gives_the_same_shapes_as_a_model() -> None:
    model = tiny_model("llama")
    of_model = sat.LoRAMixin.for_model(model, targets="*")
    of_config = sat.LoRAMixin.for_config(model.config, targets="*")  # type: ignore[attr-defined]
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (of_model, of_config)]
    assert shapes[0] == shapes[1]
    assert not any(parameter.is_meta for parameter in of_config.parameters())


# Models of parts, experts


def test_each_part_gets_the_targets_that_it_has() -> None:
    model = with_lora("t5", targets=("cross_attention.query", "mlp.*"))
    encoder, decoder = (model.get_mixin("lora", part) for part in ("encoder", "decoder"))
    assert encoder.config.targets == ("mlp.*",)
    assert "cross_attention_query" in decoder.layers[0]
    only = with_lora("t5", targets="cross_attention.*")
    assert list(only.mixins["lora"]) == ["decoder"]
    assert not torch.equal(logits(only), logits(tiny_model("t5").double()))


def test_patterns_of_one_part_stay_there_and_every_part_is_loaded_again(tmp_path: Path) -> None:
    model = tiny_family_model("t5", num_layers=2, num_decoder_layers=4)
    options = {"targets": ("{attention,cross_attention}.query", "mlp.up"), "layers": (1, 3)}
    patterns = {"rank_pattern": {"cross_attention.*": 2, "{mlp,attention}.*": 3}, "alpha_pattern": {"layers.3.*": 5.0}}
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, **options, **patterns))
    encoder, decoder = (model.get_mixin("lora", part).config for part in ("encoder", "decoder"))
    assert (encoder.targets, encoder.layers) == (("attention.query", "mlp.up"), (1,))
    assert (encoder.rank_pattern, encoder.alpha_pattern) == ({"mlp.*": 3, "attention.*": 3}, {})
    assert decoder.rank_pattern == {"cross_attention.*": 2, "mlp.*": 3, "attention.*": 3}
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(sat.load(tmp_path / "model")(**tiny_inputs(model))[0], model(**tiny_inputs(model))[0])


def test_a_pattern_is_dropped_in_a_part_where_targets_do_not_choose_what_it_matches() -> None:
    model = tiny_model("t5")
    mixins = sat.LoRAMixin.for_model(model, targets=("cross_attention.*", "mlp.up"), rank_pattern={"key": 2})
    assert {part: mixin.config.rank_pattern for part, mixin in mixins.items()} == {"encoder": {}, "decoder": {"key": 2}}


def test_experts_are_adapted_one_by_one() -> None:
    model = tiny_model("llama").double()
    model.add_mixin("experts", sat.MixtureOfExpertsMixin.for_model(model, num_experts=3))
    plain = logits(model)
    train(model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets="experts.1.*")))
    adapted = logits(model)
    assert not torch.equal(adapted, plain)
    names = {name.split(".")[4] for name, _ in model.named_parameters() if ".lora." in name}
    assert names == {"experts_1_up", "experts_1_gate", "experts_1_down"}
    removed = sat.merge_mixin(model, "lora")
    close(logits(model), adapted)
    sat.unmerge_mixin(model, "lora", removed)
    model.del_mixin("lora")
    close(logits(model), plain)


# Reduced weights (QLoRA)


def test_lora_trains_on_reduced_weights_and_does_not_merge_into_them() -> None:
    model = tiny_model("gpt2")
    reduce_weights(model, "int8")
    inputs = tiny_inputs(model)
    plain = model(**inputs)[0]
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets="*")).freeze_except("mixins.lora")
    assert torch.equal(model(**inputs)[0], plain)
    train(model)
    adapted = model(**inputs)[0]
    adapted.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.get_mixin("lora").parameters())
    with pytest.raises(sat.HookDefinitionError, match=r"the weights were reduced.*Load the model whole.*load_adapter"):
        sat.merge_mixin(model, "lora")
    assert {"lora", "reduced-weights"} <= set(model.mixins)
    sat.bundle_adapters(model, "lora")
    torch.testing.assert_close(model(**inputs, adapter="lora")[0], adapted, rtol=1e-4, atol=1e-4)


def test_dora_needs_weights_that_are_not_reduced() -> None:
    model = tiny_model("gpt2")
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, dora=True))
    reduce_weights(model, "int8")
    with pytest.raises(sat.HookCallError, match="DoRA reads the weights that it changes"):
        model(**tiny_inputs(model))
    model.del_mixin("lora")
    with pytest.raises(ConfigError, match="dora starts from a model's weights"):
        sat.LoRAMixin.for_model(model, dora=True)


# Training


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "vit"])
def test_the_loss_falls_and_only_lora_changes(family: str, variant: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(family, scale=2.0)
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets="*", **VARIANTS[variant]))
    model.freeze_except("mixins.lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    inputs = tiny_inputs(model)
    losses = []
    for _ in range(12):
        output = model(**inputs)[0].flatten(0, -2)
        loss = F.cross_entropy(output, torch.arange(len(output)) % output.shape[-1])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == trained
    assert all("mixins.lora" in name for name in trained)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


def test_a_frozen_projection_keeps_its_input_once_and_what_a_gives_for_the_backward_pass() -> None:
    model = with_lora(targets="value").freeze_except("mixins.lora")
    linear, change = model.transformer.layers[0].attention.value, change_of(model, "layers.0.attention.value")
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        projected = change(linear(x), x, linear)
    for weight in (linear.weight, change.lora_A, change.lora_B):
        kept.pop(weight.untyped_storage().data_ptr(), None)
    assert sorted(kept.values()) == [2 * 3 * 3 * 8, 2 * 3 * 32 * 8]
    projected.sum().backward()
    assert linear.weight.grad is None


@pytest.mark.parametrize("copied", [False, True])
def test_b_is_marked_for_a_faster_rate(copied: bool) -> None:
    model = with_lora(lr_ratio=16.0)
    model = copy.deepcopy(model) if copied else model
    marks = {name: getattr(each, "lr_scale", 1.0) for name, each in model.named_parameters()}
    assert {name for name, mark in marks.items() if mark == 16.0} == {name for name in marks if name.endswith("lora_B")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_precision_gives_its_precision_and_reaches_every_parameter(variant: str) -> None:
    model = with_lora(**VARIANTS[variant]).float()
    expected = model(**tiny_inputs(model))[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**tiny_inputs(model))[0]
    assert mixed.dtype == torch.bfloat16
    assert (mixed - expected).abs().max() < 0.05 * expected.abs().max()
    mixed.float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.get_mixin("lora").parameters())


# Merging


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama", "vit"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_changes_nothing_and_unmerging_brings_the_weights_back(
    family: str, variant: str, dtype: torch.dtype
) -> None:
    model = with_lora(family, targets="*", **VARIANTS[variant]).to(dtype)
    plain = {name: p.clone() for name, p in model.named_parameters() if ".lora." not in name}
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_inputs(model).items()}
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    adapted = model(**inputs)[0]
    removed = sat.merge_mixin(model, "lora")
    assert not any("lora" in name for name in model.state_dict())
    close(model(**inputs)[0], adapted, tolerance)
    sat.unmerge_mixin(model, "lora", removed)
    close(model(**inputs)[0], adapted, tolerance)
    for name, parameter in plain.items():
        close(model.get_parameter(name), parameter, 1e-12 if dtype == torch.float64 else 1e-5)


def test_a_merge_in_float32_is_exact_to_rounding() -> None:
    model = with_lora().float()
    (first, *_) = projections_of(model)
    change = change_of(model, first.address)
    exact = first.linear.weight.double() + change.scale * change.lora_B.double() @ change.lora_A.double()
    sat.merge_mixin(model, "lora")
    assert (first.linear.weight.double() - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_a_low_precision_weight_is_merged_in_float32_and_rounded_once() -> None:
    model = with_lora().bfloat16()
    (first, *_) = projections_of(model)
    change = change_of(model, first.address)
    exact = first.linear.weight.float() + change.scale * change.lora_B.float() @ change.lora_A.float()
    sat.merge_mixin(model, "lora")
    assert torch.equal(first.linear.weight, exact.bfloat16())


def test_merging_what_changes_nothing_is_refused() -> None:
    with pytest.raises(sat.HookDefinitionError, match="merging 'lora' would change no weight: it is untrained"):
        sat.merge_mixin(with_lora(trained=False), "lora")
    tiny = with_lora().bfloat16()
    with torch.no_grad():
        for name, parameter in tiny.named_parameters():
            if name.endswith("lora_B"):
                parameter.mul_(1e-9)
    with pytest.raises(sat.HookDefinitionError, match=r"too small for torch.bfloat16"):
        sat.merge_mixin(tiny, "lora")
    assert "lora" in tiny.mixins


def test_merging_a_mixin_that_no_weights_can_express_is_refused() -> None:
    model = tiny_model("gpt2")
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model))
    with pytest.raises(sat.HookDefinitionError, match=r"'prefix' \(PrefixTuningMixin\) cannot be merged"):
        sat.merge_mixin(model, "prefix")
    with pytest.raises(sat.HookDefinitionError, match=r"no mixin 'prefx'. Did you mean 'prefix'\?"):
        sat.merge_mixin(model, "prefx")


def test_sums_are_merged_side_by_side_and_dora_beside_another_is_refused() -> None:
    model = with_lora()
    train(model.add_mixin("second", sat.LoRAMixin.for_model(model, r=2, targets="*")), "second", seed=6)
    both = logits(model)
    first = sat.merge_mixin(model, "lora")
    close(logits(model), both)
    sat.merge_mixin(model, "second")
    close(logits(model), both)
    train(model.add_mixin("turned", sat.LoRAMixin.for_model(model, r=2, dora=True)), "turned")
    with pytest.raises(sat.HookConflictError, match="'lora' cannot be merged beside 'turned'"):
        sat.unmerge_mixin(model, "lora", first)
    model.add_mixin("lora", sat.LoRAMixin.for_model(model))
    train(model)
    for name, other in (("turned", "lora"), ("lora", "turned")):
        with pytest.raises(sat.HookConflictError, match=rf"del_mixin\('{other}'\) first"):
            sat.merge_mixin(model, name)


def refuse_unmerging(model: Any, name: Any, mixin: Any, error: type[Exception], message: str) -> None:
    """Check that an unmerge is refused, and changes nothing."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        sat.unmerge_mixin(model, name, mixin)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_unmerging_what_was_not_merged_is_refused_and_changes_nothing(variant: str) -> None:
    model = with_lora(**VARIANTS[variant])
    attached = model.get_mixin("lora")
    refuse_unmerging(model, "other", attached, sat.HookDefinitionError, "'other' was not merged, or was unmerged")
    mixin = model.del_mixin("lora")
    refuse_unmerging(model, "lora", mixin, sat.HookDefinitionError, "give what merge_mixin returned, once")
    refuse_unmerging(model, "lora", {"decoder": mixin}, sat.HookDefinitionError, "was not merged into this model")
    refuse_unmerging(model, "lora", None, sat.HookDefinitionError, r"'lora' \(NoneType\) cannot be merged")
    refuse_unmerging(tiny_model("t5"), "lora", {}, sat.HookDefinitionError, "was not merged into this model")


def test_what_was_merged_is_unmerged_once_and_copies_know_that_they_were_merged() -> None:
    model = with_lora()
    adapted, removed = logits(model), sat.merge_mixin(model, "lora")
    assert isinstance(removed, sat.LoRAMixin)
    again = pickle.loads(pickle.dumps(copy.deepcopy(removed)))
    sat.unmerge_mixin(model, "lora", again)
    close(logits(model), adapted)
    model.del_mixin("lora")
    refuse_unmerging(model, "lora", again, sat.HookDefinitionError, "was unmerged already")


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_an_unmerge_that_cannot_add_the_mixin_changes_no_weight(family: str) -> None:
    model = with_lora(family)
    removed = sat.merge_mixin(model, "lora")
    model.add_mixin("taken", sat.BitFitMixin.for_model(model))
    refuse_unmerging(model, "taken", removed, sat.HookConflictError, "there is a mixin 'taken' already")
    refuse_unmerging(model, "other name", removed, sat.HookDefinitionError, "use letters, digits, '_' and '-' only")
    refuse_unmerging(model, "keys", removed, sat.HookDefinitionError, "has a meaning of its own")
    model.add_mixin("back", removed)
    refuse_unmerging(model, "lora", removed, sat.HookConflictError, "is the very mixin that is here as 'back'")


def test_a_row_that_dora_made_zero_is_lost() -> None:
    model = with_lora(dora=True)
    with torch.no_grad():
        change_of(model, "layers.0.attention.query").magnitude[3] = 0
    removed = sat.merge_mixin(model, "lora")
    refuse_unmerging(model, "lora", removed, sat.HookDefinitionError, "DoRA cannot be unmerged")


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "attention.quary"}, r"targets: 'attention.quary' matches no projection. Did you mean"),
        ({"rank_pattern": {"gate": 2}}, r"rank_pattern: 'gate' matches no projection"),
        ({"layers": [0, 7]}, r"there is no layer 7"),
        ({"layers": [1], "targets": "layers.0.*"}, r"in none of the layers"),
        ({"rank": 4}, r"unknown field 'rank'"),
        ({"r": 0, "dropout": 1.0, "lr_ratio": -1.0}, r"(?s)3 problems.*r: 0 is no rank.*dropout=1.0.*lr_ratio"),
        ({"rank_pattern": {"query": 1.5}}, r"query: 1.5 is no rank"),
        ({"alpha": 0}, r"alpha: 0 is no scale: it must be positive and finite"),
        ({"alpha": -1.0, "init": "pissa"}, r"alpha: -1.0 is no scale"),
        ({"alpha": math.inf}, r"alpha: inf is no scale"),
        ({"alpha": math.nan}, r"alpha: nan is no scale"),
        ({"alpha_pattern": {"query": -2.0}}, r"query: -2.0 is no scale"),
        ({"rank_pattern": {"mlp.up": 4}}, r"rank_pattern: 'mlp.up' matches no projection that `targets` and `layers`"),
        ({"alpha_pattern": {"layers.0.query": 2.0}, "layers": [1]}, r"alpha_pattern: 'layers.0.query' matches no pro"),
        ({"rank_pattern": {"{query,key}": 4}}, r"rank_pattern: 'key', of '\{query,key\}', matches no projection that"),
        ({"targets": "mlp.{up,dwn}"}, r"'mlp.dwn', of 'mlp.\{up,dwn\}', matches no projection. Did you mean 'mlp.d"),
        ({"targets": "layers.{1..0}.query"}, r"'layers.\{1..0\}.query' is a range of nothing"),
        ({"targets": ()}, r"targets is empty"),
        ({"alpha": "16"}, r"alpha='16' is not float"),
        ({"init": "random-ish"}, r"init='random-ish' is not one of 'random', 'pissa', 'olora'"),
        ({"init": "pissa", "r": 33, "targets": "mlp.up"}, r"init='pissa': a weight \[128, 32\] has no rank 33"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sat.LoRAMixin.for_model(tiny_model("gpt2"), **options)


def test_what_starts_from_weights_needs_them() -> None:
    config = tiny_model("gpt2").config  # type: ignore[attr-defined]
    for options in ({"dora": True}, {"init": "pissa"}, {"init": "olora"}):
        with pytest.raises(ConfigError, match=r"starts from a model's weights: use LoRAMixin.for_model"):
            sat.LoRAMixin.for_config(config, **options)
