"""`save_pretrained`: a model in Hugging Face's layout, written whole or not at all.

The family's own tensors go to `model.safetensors`, for `transformers` to read; mixins that were added later go to
`mixins/` beside it, for `sat.load(..., mixins={...})`.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swissarmy.backbone.model import BaseModel, Model, every_mixin
from swissarmy.core.errors import CheckpointError
from swissarmy.core.hooks import HOOKS, answers
from swissarmy.core.weight_map import Entry, WeightMap
from swissarmy.interop.mixin_folder import Whole, as_it_is, write_mixins
from swissarmy.interop.safe_write import write_folder
from swissarmy.interop.safetensors_write import LazyTensor, save_safetensors
from swissarmy.models._family import Source, build_model


def save_pretrained(model: Model, folder: Path) -> None:
    """Write configuration and weights to a new folder.

    Raises:
        CheckpointError: The folder exists and is not empty, cannot be written, or the model has lost a part that its
            family's layout needs.
    """
    with write_folder(folder) as target:
        write_model(model, target)


def write_model(model: Model, target: Path, whole: Whole = as_it_is) -> None:
    """Write configuration and weights into an empty folder, a tensor at a time.

    Args:
        model: With its weights here, or sharded.
        target: The folder.
        whole: From a parameter or buffer to the tensor to write, by its name: gathers what is sharded.

    Raises:
        CheckpointError: The model has lost a part that its family's layout needs.
    """
    source, parameters = check_savable(model), dict(model.named_parameters())
    _check_present(parameters)
    weight_map: WeightMap = source.family.weights(source.config)
    own = {name: parameters[name] for name in parameters if name in source.own_names}
    entries = weight_map.entries(own)
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    values = {**source.values, "architectures": [source.config.architecture], "dtype": dtype}
    values.pop("torch_dtype", None)  # the old name of dtype
    (target / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_safetensors(target, _their_tensors(entries, own, weight_map.copies, whole))
    write_mixins(model, source, target, whole)


def check_savable(model: Model) -> Source:
    """Refuse a model that no folder could bring back; gives what it will be saved as. Looks at no values.

    Raises:
        CheckpointError: The model has lost a part that its family's layout needs, or is no family's and more than
            the plain backbone.
    """
    source: Source = model.source or _plain_source(model)
    _check_complete(source, model, dict(model.named_parameters()))
    return source


def _their_tensors(
    entries: list[Entry], parameters: Mapping[str, Tensor], copies: Mapping[str, str], whole: Whole
) -> Iterator[tuple[str, LazyTensor]]:
    """Each tensor of the file, made when its turn comes."""
    for entry in entries:
        parts = {name: parameters[name].detach() for name in entry.ours}
        outlines = [torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts.values()]
        made = LazyTensor(
            shape=entry.rule.join(outlines).shape, dtype=outlines[0].dtype, make=partial(_joined, entry, parts, whole)
        )
        yield entry.theirs, made
        yield from ((name, made) for name, original in copies.items() if original == entry.theirs)


def _joined(entry: Entry, parts: Mapping[str, Tensor], whole: Whole) -> Tensor:
    return entry.rule.join([whole(name, part) for name, part in parts.items()])


def _check_present(parameters: Mapping[str, Tensor]) -> None:
    """Refuse a model whose weights were let go, as `sat.load(..., quantize=...)` does."""
    gone = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    if gone is not None:
        raise CheckpointError(
            f"'{gone}' has no values: weights that were reduced (quantize=...) cannot be saved. Load without quantize, "
            "or save what was trained on top with save_adapter."
        )


def _check_complete(source: Source, model: Model, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a model that is no longer what its configuration says; a reader would find another network."""
    with torch.device("meta"):
        original = build_model(source.values)
    mixins = dict(every_mixin(model))
    for name, mixin in every_mixin(original):
        if type(mixins.get(name)) is not type(mixin):
            raise CheckpointError(
                f"'{name}' ({type(mixin).__name__}) was removed from the model, and its family's layout needs it."
            )
        if _settings(mixins[name]) != _settings(mixin):
            raise CheckpointError(
                f"'{name}' is no longer what the configuration says: it is {mixins[name]}, and was {mixin}."
            )
    for name, shape in source.own_names.items():
        if name not in parameters:
            raise CheckpointError(f"'{name}' was removed from the model, and its family's layout needs it.")
        if parameters[name].shape != shape:
            raise CheckpointError(
                f"'{name}' is {list(parameters[name].shape)} and the configuration says {list(shape)}: build the model "
                "with the configuration that you want and copy the weights."
            )


def _settings(mixin: nn.Module) -> list[tuple[str, str, str]]:
    """What a mixin is apart from its weights: each module's kind and printed settings."""
    return [
        (name, type(module).__name__, module.extra_repr())
        for name, module in mixin.named_modules()
        if not isinstance(module, nn.ParameterList)  # which prints precision and device
    ]


def _plain_source(model: Model) -> Source:
    """A `BaseModel` that no family built is saved as the plain backbone."""
    if not isinstance(model, BaseModel):
        raise CheckpointError(f"{type(model).__name__} belongs to no family; save its parts one by one.")
    if any(answers(model, hook) for hook in HOOKS):
        raise CheckpointError(
            f"{type(model).__name__} defines hooks itself, which no file can bring back: make them a mixin to save it."
        )
    fields: dict[str, Any] = {key: value for key, value in model.config.to_dict().items() if value is not None}
    with torch.device("meta"):
        plain = build_model({"model_type": "swissarmy", "architectures": ["BaseModel"], "backbone": fields})
    assert isinstance(plain.source, Source)
    return plain.source
