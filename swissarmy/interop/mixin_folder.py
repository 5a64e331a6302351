"""Mixins that were added to a model: a folder of their own beside the family's tensors.

`mixins/mixins.json` names those without which the model would compute something else; `mixins/model.safetensors` holds
their tensors. No class is ever looked up from a file: the caller gives the mixins.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from swissarmy.backbone.model import Model, every_mixin
from swissarmy.core.errors import CheckpointError
from swissarmy.core.mixin import BaseMixin
from swissarmy.interop.matching import allowed, assign, report
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.interop.safetensors_write import save_safetensors
from swissarmy.interop.tensor_source import parse_json_object
from swissarmy.models._family import Source

FOLDER = "mixins"
NAMES_FILE = "mixins.json"


def added_tensors(model: Model, own_names: Collection[str]) -> dict[str, Tensor]:
    """Parameters, and buffers that are kept, of mixins that were added to what a family made."""
    kept = model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in kept}}
    return {name: tensor for name, tensor in tensors.items() if name not in own_names}


def write_mixins(model: Model, source: Source, target: Path) -> None:
    """Write the mixins that are not the family's own, if there are any worth keeping."""
    tensors = {name: tensor.detach() for name, tensor in added_tensors(model, source.own_names).items()}
    names = {
        name: type(mixin).__name__
        for name, mixin in every_mixin(model)
        if name not in source.own_mixins and not mixin.keeps_outputs
    }
    if tensors or names:
        folder = target / FOLDER
        folder.mkdir()
        (folder / NAMES_FILE).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
        if tensors:
            save_safetensors(folder, tensors)


def stored_mixins(folder: Path) -> dict[str, int]:
    """The mixins that a checkpoint's folder holds beside the family's own, and how many parameters of each."""
    folder = folder / FOLDER
    counts = dict.fromkeys((name.rpartition("mixins.")[2] for name in _names(folder)), 0)
    if any(folder.glob("*.safetensors")):
        stored = SafetensorsSource(folder)
        for name in stored.names():
            mixin = name.partition("mixins.")[2].partition(".")[0]
            counts[mixin] = counts.get(mixin, 0) + stored.shape(name).numel()
    return counts


def add_mixins(model: Model, mixins: Mapping[str, BaseMixin], folder: Path, allow_missing: Sequence[str]) -> None:
    """Add the caller's mixins and fill them from the checkpoint's folder of mixins, if it has one.

    Raises:
        CheckpointError: The model was saved with mixins that the caller did not give, or their tensors do not fit.
    """
    for name, mixin in mixins.items():
        model.add_mixin(name, mixin)
    folder = folder / FOLDER
    stored = SafetensorsSource(folder) if any(folder.glob("*.safetensors")) else None
    ours = added_tensors(model, model.source.own_names)
    present = {name: type(mixin).__name__ for name, mixin in every_mixin(model)}
    problems = [
        f"it was saved with '{name}' ({kind}), and has {present.get(name, 'none of that name')} now"
        for name, kind in _names(folder).items()
        if present.get(name) != kind and not allowed(name, allow_missing)
    ]
    problems += _tensor_problems(ours, stored, allow_missing)
    if problems:
        cure = (
            'give the mixins that it was saved with, sat.load(path, mixins={"name": MyMixin(...)}), and list in '
            'allow_missing those that start anew, ["mixins.name.*"]'
        )
        raise CheckpointError("\n  - ".join([f"{folder} does not fit the model; {cure}:", *problems]))
    if stored is not None:
        _fill(model, {name: ours[name] for name in stored.names() if name in ours}, stored)


def _tensor_problems(
    ours: Mapping[str, Tensor], stored: SafetensorsSource | None, allow_missing: Sequence[str]
) -> list[str]:
    have = {} if stored is None else {name: stored.shape(name) for name in stored.names()}
    unexpected = sorted(name for name in have if name not in ours and not allowed(name, allow_missing))
    missing = [name for name in ours if name not in have and not allowed(name, allow_missing)]
    misshapen = [
        f"{name}: have {list(shape)}, want {list(ours[name].shape)}"
        for name, shape in sorted(have.items())
        if name in ours and shape != ours[name].shape
    ]
    return [*report("unexpected", unexpected, ours), *report("missing", missing, have), *misshapen]


def _fill(model: Model, tensors: Mapping[str, Tensor], stored: SafetensorsSource) -> None:
    for name, tensor in tensors.items():
        value = stored.read(name).to(device=tensor.device, dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            assign(model, name, value)
        else:
            tensor.copy_(value)


def _names(folder: Path) -> dict[str, str]:
    file = folder / NAMES_FILE
    return parse_json_object(file.read_bytes(), str(file)) if file.is_file() else {}
