"""From shapes to shards: a model that was outlined on the meta device and parallelised gets its weights.

Each tensor is read, or made, whole and one at a time, and each rank keeps its own shard of it: no rank ever holds the
model. A rank's peak is its shards and one tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from swissarmy.backbone.model import Model
from swissarmy.core.errors import SwissArmyError
from swissarmy.interop.load import (
    Plan,
    check_duplicates,
    make_plan,
    open_checkpoint,
    overridden,
    read_tensors,
    stored_dtype,
)
from swissarmy.interop.mixin_folder import StoredMixins, add_mixins
from swissarmy.interop.tensor_source import TensorSource
from swissarmy.models._family import build_model
from swissarmy.training.parallel.new_weights import NewWeights, named_tensors, outline


class Weights(Protocol):
    """Where values come from."""

    def tensors(self, model: Model) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors on the CPU by their names, one after the other."""
        ...


def materialize(model: Model, weights: Weights, device: torch.device | str = "cpu") -> None:
    """Give a model on the meta device, sharded or not, its values; tensors that have values keep them.

    Raises:
        SwissArmyError: Some tensor would be left without a value.
    """
    with_values = {name: tensor.detach() for name, tensor in named_tensors(model) if not tensor.is_meta}
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    model.to_empty(device=device)
    places = dict(named_tensors(model))
    for name, parameter in model.named_parameters():
        vars(parameter).update(marks[name])  # lr_scale and the like; a new parameter has none
    with torch.no_grad():
        for name, value in with_values.items():
            places.pop(name).copy_(value)
        for name, whole in weights.tensors(model):
            if name in places:
                _fill(places.pop(name), whole)
    if places:
        raise SwissArmyError(f"no values for: {', '.join(sorted(places))}.")


def _fill(place: Tensor, whole: Tensor) -> None:
    """Copy this rank's shard of `whole`."""
    if not isinstance(place, DTensor):
        place.copy_(whole)
        return
    sizes, offsets = compute_local_shape_and_global_offset(place.shape, place.device_mesh, place.placements)
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(dim, min(offset, whole.shape[dim]), size)
    place.to_local().copy_(whole)


@final
@dataclass(frozen=True)
class StoredWeights:
    """What a checkpoint has, and new weights for the rest."""

    source: TensorSource
    plan: Plan
    new: NewWeights

    def tensors(self, model: Model) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors in its order, then those that it lacks, and may."""
        stored = set[str]()
        for name, tensor in read_tensors(self.plan, self.source):
            stored.add(name)
            yield name, tensor
        yield from self.new.tensors(model, leave_out=stored)


def outline_checkpoint(
    path: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    extend: Callable[[Model], object] = lambda model: None,
    allow_missing: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Model, StoredWeights]:
    """As `sat.load`, but on the meta device; nothing is read beside headers, and mixins that were saved with it.

    Args:
        path: As for `sat.load`.
        seed: Decides what starts anew.
        dtype: The precision; that of the first stored tensor when omitted.
        extend: Adds mixins that start anew.
        allow_missing: As for `sat.load`.
        overrides: As for `sat.load`.

    Raises:
        CheckpointError: As for `sat.load`.
    """
    values, source, where = open_checkpoint(path, dtype)

    def build() -> Model:
        model = build_model(overridden(values, overrides or {}), where=where)
        plans.append(make_plan(model, source, allow_missing=allow_missing, stored=values))
        extend(model)
        return model

    plans: list[Plan] = []
    model, new = outline(build, seed)
    check_duplicates(model, plans[0], source)
    new_names = _names_of(new, model)
    stored_mixins, known = StoredMixins.open(Path(where).parent), model.source.own_names
    add_mixins(model, {}, stored_mixins, without=known, allow_missing=(*allow_missing, *new_names))
    model.to(dtype or stored_dtype(source))
    return model.eval(), StoredWeights(source, plans[0], new)


def _names_of(new: NewWeights, model: Model) -> list[str]:
    """Tensors that `extend` brought: the checkpoint need not have them."""
    return [name for name in new.recipes if name not in model.source.own_names]
