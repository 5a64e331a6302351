"""The projections of a model, by address: what methods that change some of them are told with patterns.

An address is `layers.{i}.{name}`, where the name is what `linear_forward` is given: `layers.3.attention.query`.
A pattern matches the end of a name, so that `query` is every query, `attention.*` all of self-attention,
`cross_attention.*` and `experts.*.up` what they say; one that starts with `layers.` says in which layers:
`layers.[0-3].mlp.*`. Braces are those of `freeze_except`: `layers.{8..11}.query`, `mlp.{up,down}`.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from torch import nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.backbone.parameters import expanded, shown, singles_of
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
    """Whether an address matches a pattern, which may leave out how its name begins."""
    for single in expanded(pattern):
        whole = single if single.startswith("layers.") else f"layers.*.{single}"
        ends = re.sub(r"^(layers\.[^.]*)\.", r"\1.*.", whole)
        if fnmatch.fnmatchcase(address, whole) or fnmatch.fnmatchcase(address, ends):
            return True
    return False


def first_match(address: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first pattern that an address matches."""
    return next((value for pattern, value in patterns.items() if matches(address, pattern)), default)


def matching(patterns: Iterable[str], addresses: Sequence[str]) -> dict[str, str]:
    """The patterns without braces that match some address, each with the one that it comes from.

    Raises:
        ConfigError: A range of nothing.
    """
    singles = singles_of(patterns).items()
    return {single: pattern for single, pattern in singles if any(matches(address, single) for address in addresses)}


def check_patterns(patterns: Iterable[str], addresses: Sequence[str], *, field: str, among: str = "") -> None:
    """Refuse a pattern that matches no address, or one of its braces that makes it match none.

    Args:
        patterns: The patterns.
        addresses: What they have to match.
        field: The option that holds them, for the message.
        among: Which projections the addresses are, for the message; all of a model's when empty.

    Raises:
        ConfigError: With the nearest name, and those that there are.
    """
    names = sorted({address.split(".", 2)[2] for address in addresses})
    known = matching(patterns, addresses)
    for single, pattern in singles_of(patterns).items():
        if single not in known:
            raise ConfigError(
                f"{field}: {shown(single, pattern)} matches no projection{among}.{_nearest(single, addresses)} "
                f"There are: {_listed(names)}."
            )


def _nearest(pattern: str, addresses: Iterable[str]) -> str:
    """The nearest name, or end of one, with its layer where the pattern says in which."""
    valid = set()
    for address in addresses:
        _, layer, name = address.split(".", 2)
        start = f"layers.{layer}." if pattern.startswith("layers.") else ""
        valid |= {start + name, start + name.rpartition(".")[2]}
    return nearest(pattern, sorted(valid))


def _linears(module: nn.Module, layer_id: int, prefix: str) -> list[Projection]:
    return [
        Projection(layer_id, name, f"{prefix}.{name}", each)
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear)
    ]


def _listed(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
