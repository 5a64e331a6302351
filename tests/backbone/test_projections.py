"""Projections by address, and the patterns that choose among them."""

import pytest
import torch

import swissarmy as sat
from swissarmy.backbone.projections import (
    check_patterns,
    first_match,
    matches,
    matching,
    projections_for,
    projections_of,
)
from swissarmy.core.errors import ConfigError
from swissarmy.testing import TINY_CONFIGS, tiny_inputs, tiny_model
from tests.helpers import hook_mixin


@pytest.mark.parametrize(
    ("pattern", "address", "matched"),
    [
        ("query", "layers.0.attention.query", True),
        ("query", "layers.11.cross_attention.query", True),
        ("attention.*", "layers.0.attention.output", True),
        ("attention.*", "layers.0.cross_attention.output", False),
        ("*attention.*", "layers.0.cross_attention.output", True),
        ("mlp.*", "layers.3.mlp.up", True),
        ("up", "layers.3.experts.7.up", True),
        ("experts.*.up", "layers.3.experts.7.up", True),
        ("experts.7.*", "layers.3.experts.17.up", False),
        ("layers.[0-3].mlp.*", "layers.3.mlp.up", True),
        ("layers.[0-3].mlp.*", "layers.4.mlp.up", False),
        ("layers.1.*", "layers.11.mlp.up", False),
        ("quer", "layers.0.attention.query", False),
        ("*", "layers.0.mlp.down", True),
        ("mlp.{up,down}", "layers.0.mlp.down", True),
        ("{attention,mlp}.*", "layers.0.cross_attention.query", False),
        ("layers.{8..11}.mlp.*", "layers.10.mlp.up", True),
        ("layers.{0..1}.query", "layers.1.attention.query", True),
        ("layers.{0..1}.query", "layers.11.attention.query", False),
        ("layers.0.attention.*", "layers.0.cross_attention.query", False),
        ("layers.0.up", "layers.0.experts.3.up", True),
        ("layers.*", "layers.3.mlp.up", True),
    ],
)
def test_a_pattern_matches_the_end_of_a_name_in_its_layers(pattern: str, address: str, matched: bool) -> None:
    assert matches(address, pattern) is matched


def test_the_first_pattern_that_matches_decides() -> None:
    assert first_match("layers.0.mlp.up", {"mlp.*": 1, "up": 2}, 3) == 1
    assert first_match("layers.0.mlp.up", {"attention.*": 1}, 3) == 3


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_the_projections_of_a_model_are_those_that_go_through_the_hook(family: str) -> None:
    model = tiny_model(family)
    seen: set[tuple[str, torch.nn.Module]] = set()

    def linear_forward(self: sat.BaseMixin, x: torch.Tensor, linear: torch.nn.Module, name: str, **kw_args: object):  # type: ignore[no-untyped-def]
        seen.add((f"layers.{kw_args['layer_id']}.{name}", linear))
        return linear(x)

    parts = list(model.parts.values()) or [model]
    for part in parts:
        part.add_mixin("record", hook_mixin("linear_forward", linear_forward))
    model(**tiny_inputs(model))
    found = [each for part in parts for each in projections_of(part)]  # type: ignore[arg-type]
    assert {(each.address, each.linear) for each in found} == seen
    modules = {name: module for part in parts for name, module in part.named_modules()}
    assert all(each.module in modules for each in found)


def test_experts_stand_in_for_the_mlp() -> None:
    model = tiny_model("llama")
    model.add_mixin("experts", sat.MixtureOfExpertsMixin.for_model(model, num_experts=2))
    names = [each.name for each in projections_of(model) if each.layer_id == 1]  # type: ignore[arg-type]
    assert names[:4] == ["attention.query", "attention.key", "attention.value", "attention.output"]
    assert sorted(names[4:]) == sorted(f"experts.{e}.{p}" for e in (0, 1) for p in ("gate", "up", "down"))


def test_a_configuration_gives_the_same_projections_without_weights() -> None:
    model = tiny_model("gpt2")
    expected = [(each.address, each.linear.weight.shape) for each in projections_of(model)]  # type: ignore[arg-type]
    found = projections_for(model.config)  # type: ignore[attr-defined]
    assert [(each.address, each.linear.weight.shape) for each in found] == expected
    assert all(each.linear.weight.is_meta for each in found)


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    addresses = ["layers.0.attention.query", "layers.0.mlp.up"]
    check_patterns(["query", "layers.0.*"], addresses, field="targets")
    with pytest.raises(
        ConfigError, match=r"targets: 'attention.quary' matches no projection. Did you mean 'attention.query'\?"
    ):
        check_patterns(["attention.quary"], addresses, field="targets")
    with pytest.raises(ConfigError, match=r"There are: attention\.query, mlp\.up"):
        check_patterns(["layers.7.*"], addresses, field="targets")
    with pytest.raises(ConfigError, match=r"'dwn', of '\{up,dwn\}', matches no .* here. Did you mean 'down'\?"):
        check_patterns(["{up,dwn}"], [*addresses, "layers.0.mlp.down"], field="targets", among=" here")
    with pytest.raises(ConfigError, match=r"Did you mean 'layers.0.query'\?"):
        check_patterns(["layers.0.qury"], addresses, field="targets")


def test_braces_that_match_keep_the_pattern_that_they_come_from() -> None:
    addresses = ["layers.0.attention.query", "layers.0.mlp.up"]
    found = matching(["mlp.{up,gate}", "{mlp,attention}.*", "mlp.up"], addresses)
    assert found == {"mlp.up": "mlp.{up,gate}", "mlp.*": "{mlp,attention}.*", "attention.*": "{mlp,attention}.*"}
