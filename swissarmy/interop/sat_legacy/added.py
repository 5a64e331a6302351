"""Mixins beside a family's own: their tensors keep their names under `mixins.<name>.`, for the caller's own mixins.

Where a stock mixin of this library does what the old tensors did, they take its parameters' names: a table of
positions (`LearnedPositionsMixin` as "positions"), experts (`MixtureOfExpertsMixin` as "experts"), prefixes
(`PrefixTuningMixin`).
"""

import re
from collections.abc import Iterable

import torch

from swissarmy.interop.sat_legacy.layout import POSITIONS
from swissarmy.interop.sat_legacy.parameters import Place

_PART = re.compile(r"(?P<part>encoder|decoder)\.(?P<name>(mixins|transformer)\..*)")
_EXPERT = re.compile(
    r"transformer\.(?P<layer>layers\.\d+)\.mlp\.dense_(?P<kind>h_to_4h_gate|h_to_4h|4h_to_h)(_(?P<expert>\d+))?"
    r"\.(?P<p>weight|bias)"
)
_PROJECTIONS = {"h_to_4h": "up", "h_to_4h_gate": "gate", "4h_to_h": "down"}
_ROUTER = re.compile(r"mixins\.mlp\.gates\.(\d+)\.weight")
_PREFIX = re.compile(r"(?P<mixin>mixins\.[^.]+)\.prefix\.(?P<layer>\d+)")


def added_places(name: str, stored: str, shape: torch.Size) -> dict[str, Place]:
    """What an old tensor that no rule of the family takes becomes.

    Args:
        name: Its name within its part of the model.
        stored: Its full name.
        shape: Its shape, merged.

    Returns:
        Our names and their places; empty if it belongs to the backbone, where nothing may be left over.
    """
    part = _PART.fullmatch(name)
    if part is not None:  # of a model that has the same parts here
        inside = added_places(part["name"], stored, shape)
        return {f"parts.{part['part']}.{ours}": place for ours, place in inside.items()}
    if name == POSITIONS:
        return _whole("mixins.positions.table.weight", stored, shape)
    router, prefix = _ROUTER.fullmatch(name), _PREFIX.fullmatch(name)
    if router is not None:
        return _whole(f"mixins.experts.layers.{router[1]}.router.weight", stored, shape)
    if prefix is not None and len(shape) == 4 and shape[0] == 2:
        ours = f"{prefix['mixin']}.layers.{prefix['layer']}"
        rows = {"key": (0, 1), "value": (1, 2)}
        return {f"{ours}.{part}": Place(stored, (row,), torch.Size(shape[1:])) for part, row in rows.items()}
    expert = _EXPERT.fullmatch(name)
    if expert is not None and expert["expert"] is not None:
        return _whole(_expert_name(expert), stored, shape)
    if name.startswith("transformer."):
        return {}
    return _whole(name if name.startswith("mixins.") else f"mixins.model.{name}", stored, shape)


def first_experts(names: Iterable[tuple[str, str, torch.Size]]) -> dict[str, Place]:
    """Expert 0, where there are others: it has the names of a plain MLP. From (name, stored name, shape) of each."""
    found = [(match, stored, shape) for name, stored, shape in names if (match := _EXPERT.fullmatch(name))]
    layers = {match["layer"] for match, _, _ in found if match["expert"] is not None}
    places: dict[str, Place] = {}
    for match, stored, shape in found:
        if match["expert"] is None and match["layer"] in layers:
            places |= _whole(_expert_name(match), stored, shape)
    return places


def _expert_name(match: re.Match[str]) -> str:
    kind, number = _PROJECTIONS[match["kind"]], match["expert"] or 0
    return f"mixins.experts.{match['layer']}.experts.{number}.{kind}.{match['p']}"


def _whole(ours: str, stored: str, shape: torch.Size) -> dict[str, Place]:
    return {ours: Place(stored, ((0, shape[0] if shape else 0),), shape)}
