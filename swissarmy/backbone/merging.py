"""Taking a trained change into the weights, and out of them again, where the mathematics allows it.

In float32 (float64 weights in float64), and exact to the rounding of the weights' own precision.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.backbone.projections import Projection, plain_models, projections_of
from swissarmy.core.errors import HookConflictError, HookDefinitionError, nearest
from swissarmy.core.hooks import HOOKS, answers, mark_of
from swissarmy.core.mixin import BaseMixin


class MergeableMixin(BaseMixin, ABC):
    """A mixin that does nothing but change projections, in a way that other weights could do as well."""

    _merged = False
    """Whether weights hold what it does: `merge_mixin` says so, and `unmerge_mixin` takes it back."""

    @abstractmethod
    def merged(self, projection: Projection) -> Tensor | None:
        """The weight `[out, in]` that does what projection and mixin do together, or `None` where nothing changes."""

    @abstractmethod
    def unmerged(self, projection: Projection) -> Tensor | None:
        """The weight before `merged`, from the one after it."""

    def merged_bias(self, projection: Projection) -> Tensor | None:
        """The bias `[out]` that goes with `merged`, or `None` where it stays as it is."""
        del projection
        return None

    def unmerged_bias(self, projection: Projection) -> Tensor | None:
        """The bias before `merged_bias`, from the one after it."""
        del projection
        return None

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
        HookDefinitionError: There is no such mixin, it cannot be merged, the weights were reduced, or merging would
            change no weight.
        HookConflictError: Other mixins change the same projections in a way that does not commute with it.
    """
    parts = plain_models(model)
    known = {mixin for part in parts.values() for mixin in part.mixins}
    if name not in known:
        raise HookDefinitionError(f"there is no mixin '{name}'.{nearest(name, known)} There are: {sorted(known)}.")
    mixins = {key: (part, _mergeable(name, part.get_mixin(name))) for key, part in parts.items() if name in part.mixins}
    for part, mixin in mixins.values():
        _check_whole(part, name)
        _check_commutes(part, name, mixin)
    changed = [_changes(part, mixin) for part, mixin in mixins.values()]
    if not any(changed):
        raise HookDefinitionError(
            f"merging '{name}' would change no weight: it is untrained, or too small for {model.dtype}."
        )
    for part, mixin in mixins.values():
        for parameter, value in _merged(part, mixin):
            _write(parameter, value)
        part.del_mixin(name)
        mixin._merged = True
    removed: dict[str, BaseMixin] = {key: mixin for key, (_, mixin) in mixins.items()}
    return removed if model.parts else removed[""]


def unmerge_mixin(model: Model, name: str, mixin: BaseMixin | Mapping[str, BaseMixin]) -> None:
    """Take what `merge_mixin` put into the weights out again, and add the mixin as before.

    Args:
        model: The model.
        name: The name to add it by.
        mixin: What `merge_mixin` gave.

    Raises:
        HookDefinitionError: It was not merged, or was unmerged already, a weight cannot be brought back, or the name is
            none. Nothing was changed.
        HookConflictError: The name is taken, the mixin is in the model, or others change the same projections in a way
            that does not commute with it. Nothing was changed.
    """
    given: Mapping[str, BaseMixin] = mixin if isinstance(mixin, Mapping) else {"": mixin}
    parts = plain_models(model)
    if not given or not set(given) <= set(parts):
        raise HookDefinitionError(f"'{name}' was not merged into this model: give what merge_mixin returned.")
    mixins = {key: (parts[key], _mergeable(name, each)) for key, each in given.items()}
    if not all(each._merged for _, each in mixins.values()):
        raise HookDefinitionError(
            f"'{name}' was not merged, or was unmerged already: give what merge_mixin returned, once."
        )
    for part, each in mixins.values():
        part.hooks_with(name, each)
        _check_whole(part, name)
        _check_commutes(part, name, each)
        for _ in _unmerged(part, each):  # what cannot be brought back says so before anything is written
            pass
    for part, each in mixins.values():
        for parameter, value in _unmerged(part, each):
            _write(parameter, value)
        each._merged = False
    model.add_mixin(name, mixin)


def _mergeable(name: str, mixin: BaseMixin) -> MergeableMixin:
    if not isinstance(mixin, MergeableMixin):
        raise HookDefinitionError(
            f"'{name}' ({type(mixin).__name__}) cannot be merged: no weights of the backbone do what it does."
        )
    return mixin


def _check_whole(model: BaseModel, name: str) -> None:
    """Refuse to change weights that were let go."""
    if any(projection.linear.weight.is_meta for projection in projections_of(model)):
        raise HookDefinitionError(
            f"'{name}' cannot be merged: the weights were reduced (quantize=...), and have no values of their own. "
            "Load the model whole, without quantize, put the adapter on it (sat.load_adapter), then merge."
        )


def _check_commutes(model: BaseModel, name: str, mixin: MergeableMixin) -> None:
    """Refuse to merge beside a mixin whose effect on the same projections would become another one."""
    for other_name, other in model.mixins.items():
        if other is mixin or not _meets(other, mixin, is_family=_is_familys(model, other_name)):
            continue
        if not (isinstance(other, MergeableMixin) and other.is_additive and mixin.is_additive):
            raise HookConflictError(
                f"'{name}' cannot be merged beside '{other_name}' ({type(other).__name__}): both change projections, "
                f"and not by sums, so that the result would be another. del_mixin('{other_name}') first."
            )


def _meets(other: nn.Module, mixin: MergeableMixin, *, is_family: bool) -> bool:
    """Whether another mixin takes part in projections, or wraps a hook that this one wraps too."""
    shared = [hook for hook in HOOKS if answers(mixin, hook) and answers(other, hook)]
    wrapped = [hook for hook in shared if mark_of(getattr(other, hook)).kind == "non_conflict"]
    return answers(other, "linear_forward") or (bool(wrapped) and not is_family)


def _is_familys(model: BaseModel, name: str) -> bool:
    """Whether a mixin is one that the family's models are made of: these do not change what sublayers give."""
    return model.source is not None and f"mixins.{name}" in model.source.own_mixins


def _merged(model: BaseModel, mixin: MergeableMixin) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that a mixin changes, and its value with the change in it, one at a time."""
    for projection in projections_of(model):
        with torch.no_grad():
            weight, bias = mixin.merged(projection), mixin.merged_bias(projection)
        yield from _with_values(projection, weight, bias)


def _unmerged(model: BaseModel, mixin: MergeableMixin) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that a mixin changed, and its value before."""
    for projection in projections_of(model):
        with torch.no_grad():
            weight, bias = mixin.unmerged(projection), mixin.unmerged_bias(projection)
        yield from _with_values(projection, weight, bias)


def _with_values(projection: Projection, weight: Tensor | None, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    if bias is not None and projection.linear.bias is None:
        raise HookDefinitionError(f"'{projection.module}' has no bias that could take the change: keep the mixin.")
    for parameter, value in ((projection.linear.weight, weight), (projection.linear.bias, bias)):
        if value is not None:
            yield parameter, value.to(parameter.dtype)


def _changes(model: BaseModel, mixin: MergeableMixin) -> bool:
    """Whether any parameter would be another one, in its own precision. All are made, so that none fails later."""
    changed = [not torch.equal(value, parameter) for parameter, value in _merged(model, mixin)]
    return any(changed)


def _write(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)
