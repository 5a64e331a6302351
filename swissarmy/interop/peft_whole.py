"""Whole tensors of the base model that an adapter of PEFT brings along: `modules_to_save`, and biases that trained.

A head that was trained beside an adapter lies in the adapter's file under its own name. It takes the place of the
model's: only the mixin can be taken away again.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swissarmy.backbone.model import Model
from swissarmy.core.errors import CheckpointError, nearest
from swissarmy.core.weight_map import Entry, WeightMap
from swissarmy.interop.matching import report
from swissarmy.interop.peft_modules import weight_map_of
from swissarmy.interop.peft_tensors import BASE, raise_for, shape_problems
from swissarmy.interop.safetensors_folder import SafetensorsSource

WRAPPED = ".base_layer."
"""What PEFT puts into the names of a module that it has wrapped."""
ECHOES = (".original_module.", ".modules_to_save.")
"""Among all biases PEFT writes those of a module to save twice more, under such names: as it was, and again."""


def read_whole(
    model: Model, values: Mapping[str, Any], source: SafetensorsSource, where: str
) -> tuple[dict[str, Tensor], SafetensorsSource]:
    """New values of the model's own parameters, by our names, and the tensors that are left.

    Raises:
        CheckpointError: A module that is to be there is not, or a tensor has another shape.
    """
    modules, biases = values.get("modules_to_save") or (), values.get("bias", "none")
    if not _is_texts(modules):
        raise CheckpointError(f"{where}: modules_to_save={modules!r} is no list of names of modules.")
    if biases not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{where}: bias={biases!r} is not known; there are none, all and lora_only.")
    if model.source is None or not (modules or biases != "none"):
        return {}, source
    weight_map = weight_map_of(model)
    entries = {weight_map.running(entry.theirs): entry for entry in weight_map.entries(model.source.own_names)}
    stored = {
        entry: name
        for name in source.names()
        if (entry := _meant(name, weight_map, entries)) in entries
        and (_is_in(entry, modules) or (biases != "none" and entry.endswith(".bias")))
    }
    wanted = [name for name in entries if _is_in(name, modules) or (biases == "all" and name.endswith(".bias"))]
    problems = report("missing", [BASE + name for name in wanted if name not in stored], source.names())
    if modules and not any(_is_in(name, modules) for name in stored):
        problems.append(f"modules_to_save={[*modules]}: it holds none of them")
    tied = {original: copy for copy, original in weight_map.duplicates.items()}
    for theirs, name in stored.items():
        if theirs in tied:
            problems.append(f"{name}: PEFT trains a copy of it apart from {tied[theirs]}, and here the two are one")
        problems += shape_problems(name, _shape(model, entries[theirs]), source)
        if any(model.get_parameter(own).is_meta for own in entries[theirs].ours):
            problems.append(f"{name}: the model's own was reduced; load it without `quantize`")
    raise_for(problems, model, source)
    new = dict(_ours(stored, entries, source))
    echoes = [name for name in source.names() if biases == "all" and any(mark in name for mark in ECHOES)]
    return new, source.without({*stored.values(), *echoes})


def put_whole(model: Model, new: Mapping[str, Tensor]) -> None:
    """Give parameters of the model the values that `read_whole` found."""
    with torch.no_grad():
        for name, value in new.items():
            model.get_parameter(name).copy_(value)


def whole_modules(model: Model, prefix: str) -> tuple[list[str], dict[str, Tensor]]:
    """The modules whose parameters begin with `prefix` here, and these parameters, by Hugging Face's names.

    Raises:
        CheckpointError: There are none, or they are tied to others.
    """
    weight_map, all_names = weight_map_of(model), model.source.own_names
    own = [name for name in all_names if name.startswith(prefix)]
    if not own:
        known = sorted({name.rpartition(".")[0] for name in all_names})
        raise CheckpointError(f"'{prefix}*' is no parameter of the model's family.{nearest(prefix, known)}")
    tensors = {
        weight_map.running(entry.theirs): entry.rule.join([model.get_parameter(name).detach() for name in entry.ours])
        for entry in weight_map.entries(own)
    }
    tied = set(weight_map.duplicates.values()) & set(tensors)
    if tied:
        raise CheckpointError(f"'{min(tied)}' is the head as well, and PEFT would train a copy of one of the two.")
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    return modules, tensors


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _meant(name: str, weight_map: WeightMap, entries: Mapping[str, Entry]) -> str:
    """What a model calls the tensor that an adapter calls so."""
    inside = name.removeprefix(BASE) if name.startswith(BASE) else name.removeprefix("base_model.")
    return weight_map.canonical(inside.replace(WRAPPED, "."), entries)


def _is_in(theirs: str, modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of these modules, which are named by the ends of their paths."""
    module = theirs.rpartition(".")[0]
    return any(f".{each}." in f".{module}." for each in modules)


def _shape(model: nn.Module, entry: Entry) -> tuple[int, ...]:
    """The shape of their tensor."""
    parts = [torch.empty_like(model.get_parameter(name), device="meta") for name in entry.ours]
    return tuple(entry.rule.join(parts).shape)


def _ours(
    stored: Mapping[str, str], entries: Mapping[str, Entry], source: SafetensorsSource
) -> Iterator[tuple[str, Tensor]]:
    for theirs, name in stored.items():
        yield from zip(entries[theirs].ours, entries[theirs].rule.split(source.read(name)), strict=True)
