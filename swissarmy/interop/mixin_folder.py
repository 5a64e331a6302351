"""Mixins that were added to a model: a folder of their own beside the family's tensors.

`mixins/mixins.json` names those without which the model would compute something else; `mixins/model.safetensors` holds
their tensors. A mixin of the library that says what it was made from (`saved_options`) is made again; any other class
is never looked up from a file: the caller gives the mixin.
"""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor, nn

import swissarmy.mixins
from swissarmy.backbone.model import BaseModel, Model, every_mixin, iterate_models
from swissarmy.core.errors import CheckpointError, SwissArmyError
from swissarmy.core.mixin import BaseMixin
from swissarmy.interop.json_object import read_json_object
from swissarmy.interop.matching import allowed, assign, report
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.interop.safetensors_write import LazyTensor, Saved, save_safetensors
from swissarmy.models._family import Source

FOLDER = "mixins"
NAMES_FILE = "mixins.json"
Whole = Callable[[str, Tensor], Tensor]
"""From the name of a parameter or buffer, and the tensor, to the tensor to write; it gathers what is sharded."""


@final
@dataclass(frozen=True)
class Record:
    """What is written of a mixin beside its tensors."""

    kind: str
    """The name of its class."""
    options: Mapping[str, Any] | None = None
    """What `for_model` makes it from, where that is known."""

    @classmethod
    def of(cls, mixin: BaseMixin) -> "Record":
        """The record of a mixin."""
        return cls(type(mixin).__name__, mixin.saved_options)

    @classmethod
    def read(cls, value: object, *, where: str) -> "Record":
        """A record from the file: the name of a class, or an object with that and the options."""
        match value:
            case str():
                return cls(value)
            case {"class": str(kind), "options": dict(options), **rest} if not rest:
                return cls(kind, options)
        raise CheckpointError(f"{where} is neither the name of a class nor an object of `class` and `options`.")

    def to_json(self) -> object:
        """As it is written."""
        return self.kind if self.options is None else {"class": self.kind, "options": self.options}


@final
@dataclass(frozen=True)
class StoredMixins:
    """What the folder of mixins beside a checkpoint holds; nothing, where there is none."""

    folder: Path
    records: Mapping[str, Record]
    """By the full names of mixins, `mixins.lora`."""
    source: SafetensorsSource | None
    stored_names: Mapping[str, str]
    """From the name of a tensor to the one that it has in the file."""

    @classmethod
    def open(cls, checkpoint: Path) -> Self:
        """Read the records, and where the tensors are.

        Raises:
            CheckpointError: They are damaged.
        """
        folder = checkpoint / FOLDER
        file = folder / NAMES_FILE
        values = read_json_object(file) if file.is_file() else {}
        records = {name: Record.read(value, where=f"{file}: '{name}'") for name, value in values.items()}
        source = SafetensorsSource(folder) if any(folder.glob("*.safetensors")) else None
        return cls(folder, records, source, {name: name for name in (source.names() if source else ())})

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each tensor."""
        return {} if self.source is None else {own: self.source.shape(name) for own, name in self.stored_names.items()}

    def read(self, name: str) -> Tensor:
        """A tensor."""
        assert self.source is not None, "what has a name is in a file"
        return self.source.read(self.stored_names[name])

    def renamed(self, name: str) -> Self:
        """The same with another name for its mixin; of several, what their names begin with."""
        single = len({full_name.rpartition("mixins.")[2] for full_name in self.records}) == 1

        def renamed(tensor: str) -> str:
            before, found, after = tensor.partition("mixins.")
            mixin, dot, rest = after.partition(".")
            return f"{before}{found}{name if single else f'{name}-{mixin}'}{dot}{rest}"

        return replace(
            self,
            records={renamed(full_name): record for full_name, record in self.records.items()},
            stored_names={renamed(own): stored for own, stored in self.stored_names.items()},
        )


def mixin_of(tensor: str) -> str:
    """The full name of the mixin that a tensor of this name belongs to."""
    before, found, after = tensor.partition("mixins.")
    return before + found + after.partition(".")[0]


def added_mixins(model: Model, source: Source | None) -> dict[str, BaseMixin]:
    """The mixins that were added to what a family made, and are worth keeping, by their full names."""
    own = () if source is None else source.own_mixins
    return {name: mixin for name, mixin in every_mixin(model) if name not in own and not mixin.keeps_outputs}


def added_tensors(model: Model, own_names: Collection[str]) -> dict[str, Tensor]:
    """Parameters, and buffers that are kept, of mixins that were added to what a family made."""
    kept = model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in kept}}
    return {name: tensor for name, tensor in tensors.items() if name not in own_names}


def as_it_is(name: str, tensor: Tensor) -> Tensor:
    """The `Whole` of tensors that are not sharded."""
    return tensor


def write_mixins(
    model: Model,
    source: Source | None,
    target: Path,
    whole: Whole = as_it_is,
    *,
    only: Collection[str] | None = None,
) -> None:
    """Write the mixins that are not the family's own, or `only` those of these full names, if there are any."""
    tensors: dict[str, Saved] = {}
    for name, tensor in added_tensors(model, () if source is None else source.own_names).items():
        if only is None or mixin_of(name) in only:
            made = partial(whole, name, tensor.detach())  # sharded ones are put together one at a time
            tensors[name] = LazyTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, make=made)
    mixins = {name: mixin for name, mixin in added_mixins(model, source).items() if only is None or name in only}
    if tensors or mixins:
        folder = target / FOLDER
        folder.mkdir()
        records = {name: Record.of(mixin).to_json() for name, mixin in mixins.items()}
        (folder / NAMES_FILE).write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
        if tensors:
            save_safetensors(folder, tensors)


def stored_mixins(checkpoint: Path) -> dict[str, int]:
    """The mixins that a checkpoint's folder holds beside the family's own, and how many parameters of each."""
    stored = StoredMixins.open(checkpoint)
    counts = {name.rpartition("mixins.")[2]: 0 for name in stored.records}
    for name, shape in stored.shapes().items():
        mixin = mixin_of(name).rpartition("mixins.")[2]
        counts[mixin] = counts.get(mixin, 0) + shape.numel()
    return counts


def add_mixins(
    model: Model,
    mixins: Mapping[str, BaseMixin],
    stored: StoredMixins,
    *,
    without: Collection[str],
    allow_missing: Sequence[str] = (),
) -> None:
    """Add the caller's mixins, make the library's again, and fill them all.

    Args:
        model: Theirs.
        mixins: The caller's, by name.
        stored: What they are filled from.
        without: The names of the tensors that the model has without them.
        allow_missing: Patterns of what starts anew.

    Raises:
        CheckpointError: There are mixins that the caller did not give, or tensors that do not fit.
    """
    for name, mixin in mixins.items():
        model.add_mixin(name, mixin)
    _add_stock_mixins(model, stored, allow_missing)
    ours = added_tensors(model, without)
    present = {name: type(mixin).__name__ for name, mixin in every_mixin(model)}
    problems = [
        f"it was saved with '{name}' ({record.kind}), and has {present.get(name, 'none of that name')} now"
        for name, record in stored.records.items()
        if present.get(name) != record.kind and not allowed(name, allow_missing)
    ]
    problems += _tensor_problems(ours, stored, allow_missing)
    if problems:
        cure = (
            'give the mixins that it was saved with, sat.load(path, mixins={"name": MyMixin(...)}) (sat.load_adapter '
            'takes them too), and list in allow_missing those that start anew, ["mixins.name.*"]'
        )
        raise CheckpointError("\n  - ".join([f"{stored.folder} does not fit the model; {cure}:", *problems]))
    _fill(model, {name: ours[name] for name in stored.stored_names if name in ours}, stored)


def _tensor_problems(ours: Mapping[str, Tensor], stored: StoredMixins, allow_missing: Sequence[str]) -> list[str]:
    have = stored.shapes()
    unexpected = sorted(name for name in have if name not in ours and not allowed(name, allow_missing))
    missing = [name for name in ours if name not in have and not allowed(name, allow_missing)]
    misshapen = [
        f"{name}: have {list(shape)}, want {list(ours[name].shape)}"
        for name, shape in sorted(have.items())
        if name in ours and shape != ours[name].shape
    ]
    return [*report("unexpected", unexpected, ours), *report("missing", missing, have), *misshapen]


def _fill(model: Model, tensors: Mapping[str, Tensor], stored: StoredMixins) -> None:
    for name, tensor in tensors.items():
        value = stored.read(name).to(device=tensor.device, dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter) and tensor.is_meta:
            assign(model, name, value)
        else:
            with torch.no_grad():  # in place: a parameter keeps what its mixin marked it with
                tensor.copy_(value)


def _add_stock_mixins(model: Model, stored: StoredMixins, allow_missing: Sequence[str]) -> None:
    """Make the library's mixins again that the caller neither gave nor allows to be missing."""
    models = {f"{prefix}mixins.": part for prefix, part in iterate_models(model)}
    present = {name for name, _ in every_mixin(model)}
    records = {
        name: record
        for name, record in stored.records.items()
        if record.options is not None and name not in present and not allowed(name, allow_missing)
    }
    kinds = _stock_mixins() if records else {}
    for full_name, record in records.items():
        name = full_name.rpartition("mixins.")[2]
        part, kind = models.get(full_name.removesuffix(name)), kinds.get(record.kind)
        if part is None or kind is None:  # reported with all else that does not fit
            continue
        try:
            part.add_mixin(name, _made_again(kind, part, record, full_name, stored))
        except (SwissArmyError, TypeError) as error:
            place = f"{stored.folder / NAMES_FILE}: '{full_name}' ({record.kind})"
            raise CheckpointError(f"{place}: {error}") from error


def _made_again(
    kind: type[BaseMixin], part: BaseModel, record: Record, full_name: str, stored: StoredMixins
) -> BaseMixin:
    """The mixin of a record. A file may ask for any size: first the shapes alone are compared with its tensors."""
    shapes, options = stored.shapes(), record.options or {}
    with torch.device("meta"):
        outline = kind.for_model(part, **options)
    for name, tensor in outline.state_dict(prefix=f"{full_name}.").items():
        if (have := shapes.get(name, tensor.shape)) != tensor.shape:
            raise CheckpointError(f"{name}: have {list(have)}, want {list(tensor.shape)}")
    mixin: BaseMixin = kind.for_model(part, **options)
    return mixin


def _stock_mixins() -> dict[str, type[BaseMixin]]:
    """The mixins of this library, by the names of their classes."""
    modules = [
        importlib.import_module(f"{swissarmy.mixins.__name__}.{module.name}")
        for module in pkgutil.iter_modules(swissarmy.mixins.__path__)
    ]
    return {
        name: kind
        for module in modules
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, BaseMixin) and kind.__module__ == module.__name__
    }
