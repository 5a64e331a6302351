"""One model inside an old checkpoint: a place for every parameter of ours, and a fate for every old tensor."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch

from swissarmy.core.errors import CheckpointError
from swissarmy.core.weight_map import Entry, WeightMap
from swissarmy.interop.matching import report
from swissarmy.interop.safetensors_write import LazyTensor
from swissarmy.interop.sat_legacy.added import added_places, first_experts
from swissarmy.interop.sat_legacy.layout import Checkpoint, Found, may_be_cut
from swissarmy.interop.sat_legacy.parameters import ZEROS, ParameterSource, Place, fused_places
from swissarmy.models._family import build_model

_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
"""Ends of names of buffers that no model needs to be told."""

Shapes = Mapping[str, torch.Size]


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """One model to write: the only one, or one of several parts."""

    prefix: str
    """What its old names start with."""
    folder: str
    """Inside the target; empty for the only one."""
    config: Mapping[str, Any]
    parameters: ParameterSource
    """The family's own, under our names."""
    added: ParameterSource
    """Of mixins that the family does not have."""
    files: WeightMap
    """What the family's files call them."""
    tied: tuple[str, ...]
    """Old tensors that are another one again."""
    zeros: tuple[str, ...]
    """Parameters that the old model did not have."""
    dropped: tuple[str, ...]
    """Old tensors that are computed."""

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """The tensors of the family's files, made when their turn comes."""
        for entry in self.files.entries(self.parameters.names()):
            copies = [name for name, original in self.files.copies.items() if original == entry.theirs]
            for name in (entry.theirs, *copies):
                yield name, _joined(entry, self.parameters)


def plan_part(checkpoint: Checkpoint, found: Found, *, prefix: str, by_head: bool, experts: bool) -> Part:
    """Decide what becomes of the tensors whose names start with `prefix`.

    Args:
        checkpoint: All tensors.
        found: What the family's layout makes of them.
        prefix: Of the old names of this part.
        by_head: Whether fused rows are one head after the other.
        experts: Whether experts of the backbone become those of a mixin.

    Raises:
        CheckpointError: Everything that is missing, unexpected or of another size, in one report.
    """
    source = checkpoint.source
    with torch.device("meta"):
        model = build_model(found.config, where=checkpoint.arguments.where)
    ours = {name: parameter.shape for name, parameter in model.named_parameters()}
    shapes = {name: source.shape(name) for name in source.names() if name.startswith(prefix)}
    zeros = _zeros(found, ours, shapes)
    entries = found.weights.entries(name for name in ours if name not in zeros)
    heads = checkpoint.arguments.need("num_attention_heads") if by_head else None
    places, problems = _places(entries, ours, shapes, heads)
    fates = _fates(checkpoint, found, prefix, [name for name in shapes if name not in {e.theirs for e in entries}])
    problems += report("missing", [entry.theirs for entry in entries if entry.theirs not in shapes], shapes)
    problems += report("unexpected", fates.unexpected, [entry.theirs for entry in entries])
    if problems:
        what = f"family {found.config['model_type']}" + (f" in {prefix.rstrip('.')}" if prefix else "")
        raise CheckpointError("\n  - ".join([f"{source.files[0].path.parent} does not fit {what}:", *problems]))
    if experts:
        fates.added |= first_experts((name.removeprefix(prefix), name, shape) for name, shape in shapes.items())
    merged, dtype = source.with_blocks(_blocks(entries, places)), source.dtype(next(iter(shapes)))
    places |= {name: Place(ZEROS, (), ours[name]) for name in zeros}
    return Part(
        prefix=prefix,
        folder=prefix.rstrip("."),
        config=found.config,
        parameters=ParameterSource(merged, {name: places[name] for name in ours}, dtype),
        added=ParameterSource(merged, fates.added, dtype),
        files=model.source.family.weights(model.source.config),
        tied=tuple(fates.tied),
        zeros=tuple(zeros),
        dropped=tuple(fates.dropped),
    )


def lazily(source: ParameterSource) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of a source, made when its turn comes."""
    for name in source.names():
        make = partial(source.read, name)
        yield name, LazyTensor(shape=source.shape(name), dtype=source.dtype(name), make=make)


def count(source: ParameterSource) -> int:
    """How many numbers a source holds."""
    return sum(math.prod(source.shape(name)) for name in source.names())


def _zeros(found: Found, ours: Shapes, stored: Shapes) -> list[str]:
    """Our parameters that old models lack and that are nothing at zero; what some layers have, none may lack."""
    candidates = [name for name in ours if found.zeros.fullmatch(name)]
    present = {name for entry in found.weights.entries(candidates) if entry.theirs in stored for name in entry.ours}
    kinds = {_kind(name) for name in present}
    return [name for name in candidates if _kind(name) not in kinds]


def _kind(name: str) -> str:
    """A parameter's name without its layer."""
    return re.sub(r"\.\d+\.", ".", name)


def _places(
    entries: Sequence[Entry], ours: Shapes, stored: Shapes, heads: int | None
) -> tuple[dict[str, Place], list[str]]:
    """Where each parameter is, and a problem for each old tensor that does not fit."""
    places, problems = dict[str, Place](), list[str]()
    for entry in (entry for entry in entries if entry.theirs in stored):
        wanted, cut = {name: ours[name] for name in entry.ours}, may_be_cut(entry.theirs)
        try:
            places |= fused_places(entry.theirs, stored[entry.theirs], wanted, may_be_cut=cut, heads=heads)
        except CheckpointError as error:
            problems.append(str(error))
    return places, problems


def _blocks(entries: Sequence[Entry], places: Mapping[str, Place]) -> dict[str, list[int]]:
    """The rows of each block that ranks split on its own; one block, where heads lie one after the other."""
    blocks: dict[str, list[int]] = {}
    for entry in (entry for entry in entries if len(entry.ours) > 1):
        rows = [[stop - start for start, stop in places[name].rows] for name in entry.ours]
        blocks[entry.theirs] = [sum(row) for row in rows] if len(rows[0]) == 1 else [sum(map(sum, rows))]
    return blocks


@dataclass
class _Fates:
    """What becomes of old tensors that no rule takes."""

    tied: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    added: dict[str, Place] = field(default_factory=dict)


def _fates(checkpoint: Checkpoint, found: Found, prefix: str, left: Sequence[str]) -> _Fates:
    """Tied to another tensor, computed, of an added mixin, or without a place."""
    fates = _Fates()
    for name in left:
        original = found.weights.duplicates.get(name)
        if original is not None:
            if not checkpoint.source.is_same(name, original):
                raise CheckpointError(f"'{name}' is not '{original}', to which the family ties it")
            fates.tied.append(name)
        elif found.weights.is_ignored(name) or name.endswith(_COMPUTED):
            fates.dropped.append(name)
        elif places := added_places(name.removeprefix(prefix), name, checkpoint.source.shape(name)):
            fates.added |= places
        else:
            fates.unexpected.append(name)
    return fates


def _joined(entry: Entry, parameters: ParameterSource) -> LazyTensor:
    """One tensor of the family's file, from the parameters that it holds."""
    parts = [torch.empty(parameters.shape(name), device="meta") for name in entry.ours]

    def make() -> torch.Tensor:
        return entry.rule.join([parameters.read(name) for name in entry.ours])

    return LazyTensor(shape=entry.rule.join(parts).shape, dtype=parameters.dtype(entry.ours[0]), make=make)
