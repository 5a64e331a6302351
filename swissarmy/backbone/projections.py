"""The projections of a model, by address: what methods that change some of them are told with patterns.

An address is `layers.{i}.{name}`, where the name is what `linear_forward` is given: `layers.3.attention.query`.
A pattern matches the end of an address, so that `query` is every query, `attention.*` all of self-attention,
`cross_attention.*` and `experts.*.up` what they say; one that starts with `layers.` matches the whole of it:
`layers.[0-3].mlp.*`.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from torch import nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.core.errors import ConfigError, nearest

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Projection:
    """A `Linear` that is called through `linear_forward`."""

    layer_id: int
    name: str
    """As `linear_forward` is given it: `attention.query`, `mlp.up`, `experts.3.down`."""
    module: str
    """The module's full name in its model."""
    linear: nn.Linear

    @property
    def address(self) -> str:
        """What patterns are matched against."""
        return f"layers.{self.layer_id}.{self.name}"


def plain_models(model: Model) -> dict[str, BaseModel]:
    """The plain models inside a model by the names of its parts; a plain model itself by the empty name."""
    return {prefix.removeprefix("parts.").rstrip("."): part for prefix, part in iterate_models(model)}


def projections_of(model: BaseModel) -> list[Projection]:
    """Every projection of a plain model, in the order of its layers; experts stand in for the MLP that they replace."""
    found = []
    for layer_id, layer in enumerate(model.transformer.layers):
        inside = _linears(layer, layer_id, f"transformer.layers.{layer_id}")
        experts = [
            projection
            for name, mixin in model.mixins.items()
            if isinstance(layers := mixin._modules.get("layers"), nn.ModuleList)
            for projection in _linears(layers[layer_id], layer_id, f"mixins.{name}.layers.{layer_id}")
            if projection.name.startswith("experts.")
        ]
        found += [each for each in inside if not (experts and each.name.startswith("mlp."))] + experts
    return found


def projections_for(config: TransformerConfig) -> list[Projection]:
    """The projections of a backbone of these sizes, without weights (on the meta device)."""
    with torch.device("meta"):
        return projections_of(BaseModel(config))


def matches(address: str, pattern: str) -> bool:
    """Whether an address, or the end of it, matches a pattern."""
    return fnmatch.fnmatchcase(address, pattern if pattern.startswith("layers.") else f"layers.*.{pattern}")


def first_match(address: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first pattern that an address matches."""
    return next((value for pattern, value in patterns.items() if matches(address, pattern)), default)


def check_patterns(patterns: Iterable[str], addresses: Sequence[str], *, field: str) -> None:
    """Refuse a pattern that matches no address.

    Raises:
        ConfigError: With the nearest name, and those that there are.
    """
    names = sorted({address.split(".", 2)[2] for address in addresses})
    for pattern in patterns:
        if not any(matches(address, pattern) for address in addresses):
            near = nearest(pattern, addresses if pattern.startswith("layers.") else names)
            raise ConfigError(f"{field}: '{pattern}' matches no projection.{near} There are: {_shown(names)}.")


def _linears(module: nn.Module, layer_id: int, prefix: str) -> list[Projection]:
    return [
        Projection(layer_id, name, f"{prefix}.{name}", each)
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear)
    ]


def _shown(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
