"""Weight maps: every family's is invertible bit for bit, and its names are found however a checkpoint spells them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.core.errors import CheckpointError
from swissarmy.core.weight_map import WeightMap, joined, reshaped, same, transposed, unsqueezed
from swissarmy.models._family import build_model, find_family
from swissarmy.testing import TINY_CONFIGS

HEADS = [(name, architecture) for name in sat.list_models() for architecture in find_family(name).architectures]


def build(model_type: str, architecture: str, **changes: Any) -> tuple[Any, WeightMap]:
    values = {"model_type": model_type, **TINY_CONFIGS[model_type], "architectures": [architecture], **changes}
    with torch.device("meta"):
        model = build_model(values)
    return model, model.source.family.weights(model.source.config)


def random_parameters(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator).to(dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "architecture"), HEADS)
def test_every_familys_map_round_trips_bit_for_bit(
    model_type: str, architecture: str, dtype: torch.dtype, tied: bool
) -> None:
    model, weight_map = build(model_type, architecture, tie_word_embeddings=tied)
    ours = random_parameters(model, dtype)
    entries = weight_map.entries(ours)
    theirs = {entry.theirs: entry.rule.join([ours[name] for name in entry.ours]) for entry in entries}
    back = {}
    for entry in entries:
        back.update(zip(entry.ours, entry.rule.split(theirs[entry.theirs].clone()), strict=True))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) and back[name].dtype == dtype for name in ours)
    again = {entry.theirs: entry.rule.join([back[name] for name in entry.ours]) for entry in entries}
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(("model_type", "architecture"), HEADS)
def test_every_parameter_has_one_place_and_every_place_one_name(model_type: str, architecture: str) -> None:
    model, weight_map = build(model_type, architecture)
    entries = weight_map.entries(dict(model.named_parameters()))
    theirs, ours = [entry.theirs for entry in entries], [name for entry in entries for name in entry.ours]
    assert len(set(theirs)) == len(theirs)
    assert sorted(ours) == sorted(name for name, _ in model.named_parameters())
    assert not {*theirs} & {*weight_map.duplicates, *weight_map.copies}
    assert not any("{" in name for name in theirs)
    wanted = {entry.theirs: entry for entry in entries}
    for name in theirs:
        assert weight_map.canonical(name, wanted) == name
        if weight_map.prefix:
            bare = name.removeprefix(weight_map.prefix)
            other = weight_map.prefix + name if bare == name else bare
            assert weight_map.canonical(other, wanted) == name
    for copy, original in weight_map.duplicates.items():
        assert original in wanted or copy.removeprefix(weight_map.prefix) != copy or not copy.startswith("lm_head")


@pytest.mark.parametrize(("model_type", "architecture"), HEADS)
def test_what_is_split_shares_no_memory_between_parameters(model_type: str, architecture: str) -> None:
    model, weight_map = build(model_type, architecture)
    ours = random_parameters(model)
    for entry in weight_map.entries(ours):
        parts = entry.rule.split(entry.rule.join([ours[name] for name in entry.ours]))
        storages = [part.untyped_storage().data_ptr() for part in parts if part.numel()]
        assert len(set(storages)) == len(storages), entry.theirs


def test_a_parameter_without_a_place_is_named() -> None:
    weight_map = WeightMap(rules=(same("a.{p}", "b.{p}"),))
    with pytest.raises(CheckpointError, match=r"'b\.other' has no place in this family's checkpoints"):
        weight_map.entries(["b.weight", "b.other"])


def test_placeholders_match_numbers_and_weight_or_bias_only() -> None:
    rule = same("their.{i}.x.{p}", "our.{i}.y.{p}")
    entry = rule.bind("our.12.y.bias")
    assert entry is not None
    assert (entry.theirs, entry.ours) == ("their.12.x.bias", ("our.12.y.bias",))
    for name in ("our.a.y.bias", "our.1.y.table", "xour.1.y.bias", "our.1.y.bias.z", "our/1.y.bias"):
        assert rule.bind(name) is None
    anything = same("{rest}", "our.{rest}").bind("our.1.y")
    assert anything is not None
    assert anything.theirs == "1.y"


def test_any_part_of_a_joined_tensor_finds_the_same_entry_once() -> None:
    names = [f"{{i}}.{part}.{{p}}" for part in ("q", "k", "v")]
    weight_map = WeightMap(rules=(joined("{i}.qkv.{p}", names),))
    entries = weight_map.entries(["0.v.weight", "0.q.weight", "0.k.weight", "1.q.bias", "1.k.bias", "1.v.bias"])
    assert [entry.theirs for entry in entries] == ["0.qkv.weight", "1.qkv.bias"]
    assert entries[0].ours == ("0.q.weight", "0.k.weight", "0.v.weight")


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
def test_joined_puts_parts_of_any_size_one_after_the_other(transpose: bool, dims: int) -> None:
    parts = [torch.randn(rows, 3) if dims == 2 else torch.randn(rows) for rows in (4, 2, 1)]
    rule = joined("x", ("a", "b", "c"), sizes=(4, 2, 1), transpose=transpose)
    whole = rule.join(parts)
    expected = torch.cat(parts)
    assert torch.equal(whole, expected.t() if transpose and dims == 2 else expected)
    assert all(torch.equal(a, b) for a, b in zip(rule.split(whole), parts, strict=True))


def test_the_other_rules_are_their_own_inverses() -> None:
    matrix = torch.randn(2, 3)
    assert torch.equal(transposed("a", "b").join([matrix]), matrix.t())
    flat = reshaped("a", "b", theirs_shape=(1, 1, -1), ours_shape=(-1,))
    assert flat.join([matrix[0]]).shape == (1, 1, 3)
    assert torch.equal(flat.split(flat.join([matrix[0]]))[0], matrix[0])
    front = unsqueezed(same("a", "b"))
    assert front.join([matrix]).shape == (1, 2, 3)
    assert torch.equal(front.split(matrix[None])[0], matrix)


def test_names_are_made_canonical_by_prefix_and_alias() -> None:
    weight_map = WeightMap(
        rules=(same("model.norm.{p}", "norm.{p}"), same("head.{p}", "head.{p}")),
        prefix="model.",
        ignored=("model.buffer",),
        aliases={"norm.gamma": "norm.weight", "norm.beta": "norm.bias"},
    )
    wanted = {entry.theirs: entry for entry in weight_map.entries(["norm.weight", "norm.bias", "head.weight"])}
    spelt = {
        "model.norm.weight": "model.norm.weight",
        "norm.weight": "model.norm.weight",
        "norm.gamma": "model.norm.weight",
        "model.norm.beta": "model.norm.bias",
        "head.weight": "head.weight",
        "model.head.weight": "head.weight",
        "buffer": "model.buffer",
        "other": "other",
    }
    assert {name: weight_map.canonical(name, wanted) for name in spelt} == spelt
    assert weight_map.is_ignored("model.buffer")
    assert not weight_map.is_ignored("model_buffer")
