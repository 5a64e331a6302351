"""Which module of Hugging Face's model holds which of our projections: what a family's weight map says of it.

A rule of the map may join several of our weights into one of theirs, reorder rows and transpose. Whatever it does to
weights it does to row numbers: sent through the rule, they tell where each of our rows is.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.backbone.projections import Projection, plain_models, projections_of
from swissarmy.core.errors import CheckpointError
from swissarmy.core.weight_map import Entry, WeightMap


@final
@dataclass(frozen=True)
class Place:
    """A projection and the part of the model that has it; the part of a plain model has no name."""

    part: str
    projection: Projection


@final
@dataclass(frozen=True)
class PeftModule:
    """One of their modules."""

    path: str
    """Its name in their model, such as `transformer.h.0.attn.c_attn`."""
    entry: Entry
    places: tuple[Place, ...]
    """Our projections in it, in the order of `entry.ours`."""

    @property
    def in_features(self) -> int:
        """How wide its input is."""
        return self.places[0].projection.linear.in_features

    @property
    def out_features(self) -> int:
        """How wide its output is."""
        return sum(place.projection.linear.out_features for place in self.places)

    @cached_property
    def _probes(self) -> tuple[Tensor, Tensor]:
        """For each element of their weight, the row and the column of ours that it is."""
        rows, columns, start = [], [], 0
        for place in self.places:
            shape = place.projection.linear.weight.shape
            rows.append(torch.arange(start, start + shape[0], dtype=torch.int32)[:, None].expand(shape))
            columns.append(torch.arange(shape[1], dtype=torch.int32).expand(shape))
            start += shape[0]
        return self.entry.rule.join(rows), self.entry.rule.join(columns)

    @property
    def is_transposed(self) -> bool:
        """Whether their weight is `[in, out]`."""
        rows, _ = self._probes
        return rows.dim() == 2 and bool((rows == rows[:1]).all())

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """For each of our projections, where its rows are among their outputs.

        Raises:
            CheckpointError: Their weight is no matrix, or its columns are not ours.
        """
        rows, columns = (probe.t() if self.is_transposed else probe for probe in self._probes)
        plain = rows.dim() == 2 and bool((rows == rows[:, :1]).all())
        if not plain or not bool((columns == torch.arange(self.in_features, dtype=torch.int32)).all()):
            raise CheckpointError(f"'{self.path}' keeps its weight in a shape that PEFT does not adapt.")
        sizes = [place.projection.linear.out_features for place in self.places]
        return torch.split(torch.argsort(rows[:, 0]), sizes)


def peft_modules(model: Model) -> dict[str, PeftModule]:
    """Their modules by their names, for all projections that the model's family has.

    Raises:
        CheckpointError: The model is of no family, so that nobody knows what its modules are called elsewhere.
    """
    if model.source is None:
        raise CheckpointError(
            f"{type(model).__name__} is of no family, and PEFT's names are those of a family's modules."
        )
    places = {name: place for name, place in _places(model) if name in model.source.own_names}
    weight_map = weight_map_of(model)
    modules = (
        PeftModule(
            weight_map.running(entry.theirs).removesuffix(".weight"), entry, tuple(places[name] for name in entry.ours)
        )
        for entry in weight_map.entries(places)
        if set(entry.ours) <= set(places)
    )
    return {module.path: module for module in modules}


def weight_map_of(model: Model) -> WeightMap:
    """The weight map of a model's family."""
    weight_map: WeightMap = model.source.family.weights(model.source.config)
    return weight_map


def find_module(path: str, model: Model, modules: Mapping[str, PeftModule]) -> PeftModule | None:
    """The module of that name, as a model or a checkpoint of the same family may spell it."""
    running = {f"{module.path}.weight": module for module in modules.values()}
    stored = {module.entry.theirs: module for module in modules.values()}
    for table in (running, stored):
        name = weight_map_of(model).canonical(f"{path}.weight", {key: each.entry for key, each in table.items()})
        if name in table:
            return table[name]
    return None


def compact(addresses: Collection[str], projections: Sequence[Projection]) -> tuple[str, ...]:
    """Addresses as patterns: a name where every layer that has it is meant, else layer by layer."""
    partial = {each.name for each in projections if each.address not in addresses}
    chosen = [each for each in projections if each.address in addresses]
    return tuple(dict.fromkeys(each.address if each.name in partial else f"layers.*.{each.name}" for each in chosen))


def _places(model: Model) -> Iterator[tuple[str, Place]]:
    """Each projection by the name of its weight."""
    for name, part in plain_models(model).items():
        for projection in projections_of(part):
            prefix = f"parts.{name}." if name else ""
            yield f"{prefix}{projection.module}.weight", Place(name, projection)
