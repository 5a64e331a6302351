"""Taking a trained change into the weights, and out of them again, where the mathematics allows it.

In float32 (float64 weights in float64), and exact to the rounding of the weights' own precision.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.backbone.projections import Projection, plain_models, projections_of
from swissarmy.core.errors import HookConflictError, HookDefinitionError, nearest
from swissarmy.core.hooks import answers
from swissarmy.core.mixin import BaseMixin


class MergeableMixin(BaseMixin, ABC):
    """A mixin that does nothing but change projections, in a way that other weights could do as well."""

    @abstractmethod
    def merged(self, projection: Projection) -> Tensor | None:
        """The weight `[out, in]` that does what projection and mixin do together, or `None` where nothing changes."""

    @abstractmethod
    def unmerged(self, projection: Projection) -> Tensor | None:
        """The weight before `merged`, from the one after it."""

    @property
    @abstractmethod
    def is_additive(self) -> bool:
        """Whether the change is a sum that depends neither on the weight nor on what other mixins add to it."""


def merge_mixin(model: Model, name: str) -> BaseMixin | dict[str, BaseMixin]:
    """Put what a mixin does into the backbone's weights, and take the mixin away.

    Every model that shares the backbone changes with it.

    Args:
        model: The model; in a model of parts, the mixin is merged in each part that has it.
        name: The mixin's name.

    Returns:
        What was taken away, for `unmerge_mixin`.

    Raises:
        HookDefinitionError: There is no such mixin, it cannot be merged, or merging would change no weight.
        HookConflictError: Other mixins change the same projections in a way that does not commute with it.
    """
    parts = plain_models(model)
    known = {mixin for part in parts.values() for mixin in part.mixins}
    if name not in known:
        raise HookDefinitionError(f"there is no mixin '{name}'.{nearest(name, known)} There are: {sorted(known)}.")
    mixins = {key: (part, _mergeable(name, part.get_mixin(name))) for key, part in parts.items() if name in part.mixins}
    for part, mixin in mixins.values():
        _check_commutes(part, name, mixin)
    if not any(_changes(part, mixin) for part, mixin in mixins.values()):
        raise HookDefinitionError(
            f"merging '{name}' would change no weight: it is untrained, or too small for {model.dtype}."
        )
    for part, mixin in mixins.values():
        for projection, weight in _weights(part, mixin.merged):
            _write(projection, weight)
        part.del_mixin(name)
    removed: dict[str, BaseMixin] = {key: mixin for key, (_, mixin) in mixins.items()}
    return removed if model.parts else removed[""]


def unmerge_mixin(model: Model, name: str, mixin: BaseMixin | Mapping[str, BaseMixin]) -> None:
    """Take what `merge_mixin` put into the weights out again, and add the mixin as before.

    Args:
        model: The model.
        name: The name to add it by.
        mixin: What `merge_mixin` gave.

    Raises:
        HookDefinitionError: It was not merged, or a weight cannot be brought back.
        HookConflictError: Other mixins change the same projections in a way that does not commute with it.
    """
    given: Mapping[str, BaseMixin] = {"": mixin} if isinstance(mixin, BaseMixin) else mixin
    parts = plain_models(model)
    if not given or not set(given) <= set(parts):
        raise HookDefinitionError(f"'{name}' was not merged into this model: give what merge_mixin returned.")
    mixins = {key: (parts[key], _mergeable(name, each)) for key, each in given.items()}
    for part, each in mixins.values():
        _check_commutes(part, name, each)
        for _ in _weights(part, each.unmerged):  # what cannot be brought back says so before anything is written
            pass
    for part, each in mixins.values():
        for projection, weight in _weights(part, each.unmerged):
            _write(projection, weight)
    model.add_mixin(name, mixin)


def _mergeable(name: str, mixin: BaseMixin) -> MergeableMixin:
    if not isinstance(mixin, MergeableMixin):
        raise HookDefinitionError(
            f"'{name}' ({type(mixin).__name__}) cannot be merged: no weights of the backbone do what it does."
        )
    return mixin


def _check_commutes(model: BaseModel, name: str, mixin: MergeableMixin) -> None:
    """Refuse to merge beside a mixin whose effect on the same projections would become another one."""
    for other_name, other in model.mixins.items():
        if other is mixin or not answers(other, "linear_forward"):
            continue
        if not (isinstance(other, MergeableMixin) and other.is_additive and mixin.is_additive):
            raise HookConflictError(
                f"'{name}' cannot be merged beside '{other_name}' ({type(other).__name__}): both change projections, "
                f"and not by sums, so that the result would be another. del_mixin('{other_name}') first."
            )


def _weights(model: BaseModel, make: Callable[[Projection], Tensor | None]) -> Iterator[tuple[Projection, Tensor]]:
    """Each projection that a mixin changes, and what `make` gives for it, one at a time."""
    for projection in projections_of(model):
        with torch.no_grad():
            weight = make(projection)
        if weight is not None:
            yield projection, weight.to(projection.linear.weight.dtype)


def _changes(model: BaseModel, mixin: MergeableMixin) -> bool:
    """Whether any weight would be another one, in its own precision."""
    return any(not torch.equal(weight, each.linear.weight) for each, weight in _weights(model, mixin.merged))


def _write(projection: Projection, weight: Tensor) -> None:
    with torch.no_grad():
        projection.linear.weight.copy_(weight)
