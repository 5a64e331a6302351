"""What can be known of a checkpoint without reading a weight: its model on the meta device, its tensors' headers."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import Model, every_mixin, iterate_models
from swissarmy.core.errors import CheckpointError
from swissarmy.interop.gguf import GGUFSource
from swissarmy.interop.load import make_plan, open_checkpoint
from swissarmy.interop.mixin_folder import stored_mixins
from swissarmy.interop.tensor_source import TensorSource
from swissarmy.models._family import build_model


@final
@dataclass(frozen=True)
class Outline:
    """A checkpoint that was opened and not loaded."""

    model: Model
    """On the meta device."""
    source: TensorSource
    misfit: str | None
    """Why the tensors do not fit the model, if they do not."""
    added: Mapping[str, int]
    """Mixins that were saved beside the model, and their parameters; `load` is told what they are."""


def outline(path: str) -> Outline:
    """Open a folder, a hub name or a `.gguf` file, and compare its tensors with the model of its configuration.

    Raises:
        CheckpointError: It cannot be opened.
        ConfigError: Its configuration is not understood.
    """
    values, source, where = open_checkpoint(path)
    with torch.device("meta"):
        model = build_model(values, where=where)
    try:
        make_plan(model, source, stored=values)
    except CheckpointError as error:
        return Outline(model, source, str(error), {})
    return Outline(model, source, None, stored_mixins(Path(where).parent))


def parts_of(model: Model) -> dict[str, TransformerConfig]:
    """The configuration of each plain model inside; of a plain model itself, under the empty name."""
    return {prefix.removeprefix("parts.").rstrip("."): part.config for prefix, part in iterate_models(model)}


def parameters_of(model: Model) -> dict[str, int]:
    """How many parameters each part of a model has: the embedding, the layers, each mixin. A tied one counts once."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        depth = 4 if name.startswith("parts.") else 2
        counts[".".join(name.split(".")[:depth])] += parameter.numel()
    return dict(counts)


def mixins_of(model: Model) -> list[dict[str, Any]]:
    """Each mixin: its full name, its class, how many parameters it has."""
    return [
        {"name": name, "class": type(mixin).__name__, "parameters": sum(p.numel() for p in mixin.parameters())}
        for name, mixin in every_mixin(model)
    ]


def stored_bytes(source: TensorSource) -> dict[str, int]:
    """Bytes of the tensors as they are stored, by type, the largest first."""
    counts: Counter[str] = Counter()
    if isinstance(source, GGUFSource):
        for tensor in source.file.tensors.values():
            counts[str(tensor.kind.name)] += tensor.rows * tensor.row_bytes
    else:
        for name in source.names():
            dtype = source.dtype(name)
            counts[str(dtype).removeprefix("torch.")] += math.prod(source.shape(name)) * dtype.itemsize
    return dict(counts.most_common())
