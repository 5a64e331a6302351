"""The tensors of an adapter of PEFT that belong to modules: found by the ends of their names, and checked before any is
read."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.core.errors import CheckpointError
from swissarmy.interop.matching import report
from swissarmy.interop.peft_modules import PeftModule, find_module
from swissarmy.interop.safetensors_folder import SafetensorsSource

BASE = "base_model.model."
"""What PEFT puts before the names of the model inside."""


@final
@dataclass(frozen=True)
class Layout:
    """What a method keeps for each module that it changes."""

    ends: Mapping[str, str]
    """How the names of its tensors end, and what these are."""
    wanted: frozenset[str]
    """What must be there for each module."""
    shapes: Callable[[PeftModule, str], Mapping[str, tuple[int, ...]]]
    """The shapes of what belongs to a module, which the adapter calls so."""
    targets: Callable[[str], bool]
    """Whether the configuration says that a module is changed."""
    surplus: str = "which the configuration does not speak of"
    """What is said of a tensor that is none of those wanted."""
    shared: Collection[str] = field(default=())
    """Names of tensors that belong to no module."""


@final
@dataclass(frozen=True)
class FoundModule:
    """What an adapter has for one of PEFT's modules."""

    module: PeftModule
    path: str
    """What the adapter calls it: its patterns mean this name, with the prefix of the model that it was made for."""
    tensors: Mapping[str, Tensor]
    """By what they are."""


def read_modules(
    model: Model, modules: Mapping[str, PeftModule], source: SafetensorsSource, layout: Layout
) -> list[FoundModule]:
    """What the adapter has for PEFT's modules.

    Raises:
        CheckpointError: With a line for each tensor that has no place, is missing, or does not fit.
    """
    stored, problems = _sorted_names(model, modules, source, layout)
    spelt = {path: _path_of(next(iter(names.values())), layout) for path, names in stored.items()}
    lacking = [
        f"{BASE}{path}.{_end_of(kind, layout)}"
        for path in modules
        if path in stored or layout.targets(path)
        for kind in dict.fromkeys(layout.ends.values())
        if kind in layout.wanted - set(stored.get(path, {}))
    ]
    problems += report("missing", lacking, source.names())
    for path, names in stored.items():
        if set(names) == layout.wanted:
            problems += _shape_problems(names, layout.shapes(modules[path], spelt[path]), source)
        elif surplus := set(names) - layout.wanted:
            problems.append(f"unexpected: {names[min(surplus)]}, {layout.surplus}")
    if not stored and not problems:
        problems = ["it holds no tensors"]
    raise_for(problems, model, source)
    return [
        FoundModule(modules[path], spelt[path], {kind: source.read(name) for kind, name in stored[path].items()})
        for path in modules
        if path in stored
    ]


def raise_for(problems: list[str], model: Model, source: SafetensorsSource) -> None:
    """Report all problems of an adapter, if there are any."""
    if problems:
        raise CheckpointError("\n  - ".join([f"{source.path.parent} does not fit {type(model).__name__}:", *problems]))


def _end(name: str, layout: Layout) -> str | None:
    return next((end for end in layout.ends if name.endswith(f".{end}")), None)


def _path_of(name: str, layout: Layout) -> str:
    return name.removeprefix(BASE).removesuffix(f".{_end(name, layout)}")


def _end_of(kind: str, layout: Layout) -> str:
    return next(end for end, each in layout.ends.items() if each == kind)


def _sorted_names(
    model: Model, modules: Mapping[str, PeftModule], source: SafetensorsSource, layout: Layout
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The stored names by module and by what they are, and a line for each group that has no place."""
    stored: dict[str, dict[str, str]] = {}
    strangers, problems = [], []
    for name in source.names():
        if name in layout.shared:
            continue
        end = _end(name, layout)
        path = _path_of(name, layout)
        module = find_module(path, model, modules) if end is not None and name.startswith(BASE) else None
        if module is None or end is None:
            strangers.append(name)
        elif layout.ends[end] in stored.setdefault(module.path, {}):
            problems.append(f"unexpected: {name}, beside {stored[module.path][layout.ends[end]]}")
        else:
            stored[module.path][layout.ends[end]] = name
    known = [f"{BASE}{path}.{end}" for path in modules for end in layout.ends]
    return stored, [*report("unexpected", strangers, known), *problems]


def _shape_problems(
    names: Mapping[str, str], want: Mapping[str, tuple[int, ...]], source: SafetensorsSource
) -> Iterator[str]:
    for kind, name in names.items():
        yield from shape_problems(name, want[kind], source)


def shape_problems(name: str, want: tuple[int, ...], source: SafetensorsSource) -> Iterator[str]:
    """A line if a tensor has another shape than it must, or no precision of weights."""
    have = tuple(source.shape(name))
    if have != want:
        yield f"{name}: have {list(have)}, want {list(want)}"
    elif not source.dtype(name).is_floating_point:
        yield f"{name}: {source.dtype(name)} is no precision of weights"
