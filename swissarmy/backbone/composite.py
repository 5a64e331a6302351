"""Models that hold models: each part is a `BaseModel` with its own mixins."""

import copy
from collections.abc import Mapping
from typing import Any, Self

from torch import nn

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import HookDefinitionError, nearest
from swissarmy.core.mixin import BaseMixin, check_is_mixin


class CompositeModel(Model):
    """A model of named parts. A subclass says in `forward` how they work together."""

    def __init__(self, parts: Mapping[str, BaseModel]) -> None:
        """Hold the parts, in their order."""
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))

    def part(self, name: str) -> BaseModel:
        """One part by its name."""
        if name not in self.parts:
            raise HookDefinitionError(
                f"there is no part '{name}'.{nearest(name, self.parts)} The parts are: {', '.join(self.parts)}."
            )
        part = self.parts[name]
        assert isinstance(part, BaseModel)
        return part

    def add_mixin(self, name: str, mixin: BaseMixin | Mapping[str, BaseMixin], part: str | None = None) -> Self:
        """Add a mixin to one part, or without `part` to every part that it suits, each with its own parameters.

        Args:
            name: The mixin's name in each part.
            mixin: A mixin, or what `for_model` gave: one for each part.
            part: The only part to add it to.

        Raises:
            HookConflictError: Some part cannot take it; then no part has it.
        """
        chosen, added = self._for_parts(name, mixin, part), list[BaseModel]()
        try:
            for part_name, own in chosen.items():
                added.append(self.part(part_name).add_mixin(name, own))
        finally:
            if len(added) < len(chosen):  # one part refused: no part keeps it
                for model in added:
                    model.del_mixin(name)
        return self

    def get_mixin(self, name: str, part: str | None = None) -> BaseMixin:
        """The mixin of that name in a part; `part` may be left out where only one has it."""
        holders = self._holders(name) if part is None else [part]
        if len(holders) > 1:
            raise HookDefinitionError(f"several parts have a mixin '{name}': say part='{holders[0]}' or another.")
        return self.part(holders[0]).get_mixin(name)

    def del_mixin(self, name: str, part: str | None = None) -> None:
        """Remove the mixin from one part, or from every part that has it."""
        for holder in self._holders(name) if part is None else [part]:
            self.part(holder).del_mixin(name)

    def explain(self) -> str:
        """Every hook of every part, and the chain of mixins that answers it."""
        return "\n\n".join(f"[{name}] {self.part(name).explain()}" for name in self.parts)

    def enable_activation_checkpointing(self, every: int = 1, *, selective: bool = False) -> Self:
        """Recompute every n-th layer of each part in the backward pass; 0 turns it off."""
        for name in self.parts:
            self.part(name).enable_activation_checkpointing(every, selective=selective)
        return self

    def compile(self, *, dynamic: bool | None = True, **options: Any) -> None:
        """Compile each layer of each part, when it is first called."""
        for name in self.parts:
            self.part(name).compile(dynamic=dynamic, **options)

    @property
    def mixins(self) -> dict[str, dict[str, BaseMixin]]:
        """The mixins by name, each as a dict from the parts that have it."""
        found: dict[str, dict[str, BaseMixin]] = {}
        for key in self.parts:
            for name in self.part(key).mixins:
                found.setdefault(name, {})[key] = self.part(key).get_mixin(name)
        return found

    def _for_parts(
        self, name: str, mixin: BaseMixin | Mapping[str, BaseMixin], part: str | None
    ) -> Mapping[str, BaseMixin]:
        if not isinstance(mixin, Mapping):
            check_is_mixin(name, mixin)
            if part is not None:
                return {part: mixin}
            suited = [key for key in self.parts if mixin.suits(self.part(key).config)]
            mixin = {key: mixin if key == suited[0] else copy.deepcopy(mixin) for key in suited}
        if not mixin:
            raise HookDefinitionError(f"mixin '{name}' suits no part of this model.")
        if part is None:
            return mixin
        if part not in mixin:
            raise HookDefinitionError(f"mixin '{name}' is not for part '{part}'; it is for: {', '.join(mixin)}.")
        return {part: mixin[part]}

    def _holders(self, name: str) -> list[str]:
        holders = [key for key in self.parts if name in self.part(key).mixins]
        if not holders:
            known = sorted({mixin for key in self.parts for mixin in self.part(key).mixins})
            raise HookDefinitionError(f"no part has a mixin '{name}'.{nearest(name, known)} There are: {known}.")
        return holders

    def _route(self, kw_args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Give each keyword to every part that accepts it; one that none accepts goes to all, to be refused."""
        routed: dict[str, dict[str, Any]] = {key: {} for key in self.parts}
        for keyword, value in kw_args.items():
            takers = [key for key in self.parts if keyword in self.part(key).accepted]
            for key in takers or self.parts:
                routed[key][keyword] = value
        return routed
