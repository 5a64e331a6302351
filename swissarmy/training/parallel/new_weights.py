"""New weights for a model that was built without any: each tensor is made when it is asked for, one at a time.

Modules initialise themselves in their constructors. On the meta device those operations run on shapes alone; here they
are written down, and repeated for one tensor at a time with real numbers. The random numbers of a tensor depend on the
seed and on its name, and so on neither the number of ranks nor the order in which tensors are made.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from swissarmy.backbone.model import Model
from swissarmy.core.errors import SwissArmyError


def outline(build: Callable[[], Model], seed: int) -> tuple[Model, "NewWeights"]:
    """The model that `build` makes, on the meta device, and the weights that it would have had.

    Args:
        build: Makes the model, and adds to it all mixins that start anew.
        seed: Decides the weights.
    """
    with torch.device("meta"), Recorder() as recorder:
        model = build()
    recipes = {name: recorder.recipe(tensor) for name, tensor in named_tensors(model)}
    _check_independent(recipes)
    return model, NewWeights(recipes, seed)


def _check_independent(recipes: Mapping[str, "Recipe"]) -> None:
    """Refuse a tensor that is computed from another one: that one's values come from elsewhere, and later."""
    owners = {_storage(recipe.result): name for name, recipe in recipes.items()}
    for name, recipe in recipes.items():
        for source in {owners[storage] for storage in recipe.storages if storage in owners} - {name}:
            raise SwissArmyError(
                f"'{name}' starts from the values of '{source}', which a model without weights does not have yet: load "
                "the model whole (sat.load), add the mixin, and shard it then."
            )


def named_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their names, a shared one once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@final
@dataclass(frozen=True)
class Operation:
    """What was done, with meta tensors in the places of real ones."""

    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    results: tuple[Tensor, ...]

    @property
    def meta_arguments(self) -> list[Tensor]:
        """What it reads, or changes in place."""
        return [each for each in _tensors((self.arguments, self.options)) if each.is_meta]


@final
@dataclass(frozen=True)
class Recipe:
    """How one tensor came about."""

    operations: tuple[Operation, ...]
    result: Tensor

    @property
    def storages(self) -> set[int]:
        """The memory of every tensor that takes part."""
        return {_storage(each) for step in self.operations for each in (*step.results, *step.meta_arguments)}

    def make(self) -> Tensor:
        """The tensor, on the CPU, from torch's current random state."""
        storages: dict[int, torch.UntypedStorage] = {}

        def real(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if not isinstance(value, Tensor) or not value.is_meta:
                return value
            view = torch.empty(0, dtype=value.dtype)
            return view.set_(storages[_storage(value)], value.storage_offset(), value.shape, value.stride())

        with torch.no_grad():
            for operation in self.operations:
                results = operation.function(*tree_map(real, operation.arguments), **tree_map(real, operation.options))
                for stand_in, result in zip(operation.results, _tensors(results), strict=True):
                    storages.setdefault(_storage(stand_in), result.untyped_storage())
            value: Tensor = real(self.result)
        return value


@final
@dataclass(frozen=True)
class NewWeights:
    """Recipes by name."""

    recipes: Mapping[str, Recipe]
    seed: int

    def tensors(self, model: Model, leave_out: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers of the model, whole, one after the other."""
        for name, tensor in named_tensors(model):
            if name in self.recipes and name not in leave_out:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(_seed_of(name, self.seed))
                    yield name, self.recipes[name].make().to(tensor.dtype)


@final
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class has no types here
    """While entered, writes down each operation on meta tensors."""

    def __init__(self) -> None:
        """Start with an empty page."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[Operation] = []
        self._writers: dict[int, list[int]] = {}
        """By storage: the operations that made or changed it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and write it down."""
        result = func(*args, **(kwargs or {}))
        results = tuple(map(_stand_in, _tensors(result)))
        for storage in {_storage(tensor) for tensor in results}:
            self._writers.setdefault(storage, []).append(len(self._operations))
        arguments, options = tree_map(_stand_in, (args, kwargs or {}))
        self._operations.append(Operation(func, arguments, options, results))
        return result

    def recipe(self, tensor: Tensor) -> Recipe:
        """The operations that a tensor is the result of, and what these needed."""
        needed, open_storages, seen = set[int](), [_storage(tensor)], set[int]()
        while open_storages:
            storage = open_storages.pop()
            seen.add(storage)
            for index in self._writers.get(storage, ()):
                needed.add(index)
                open_storages.extend({_storage(each) for each in self._operations[index].meta_arguments} - seen)
        return Recipe(tuple(self._operations[index] for index in sorted(needed)), _stand_in(tensor))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _stand_in(value: Any) -> Any:
    """The same memory under another name: a parameter is given other memory when the model changes its precision."""
    return value.detach() if isinstance(value, Tensor) else value


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor, or a view of it, stands for; the recorded operations keep it alive."""
    return int(tensor.untyped_storage()._cdata)


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
