"""IA3 (Liu et al. 2022): trained vectors that stretch keys, values, and what is inside the MLP.

Changes: what the chosen projections give, or with `inputs` what they are given, is multiplied element by element.
Hooks: `linear_forward` (wraps). One at the start, so that a new mixin changes nothing.
Parameters: `layers.{i}.{projection}.scale` `[out]`, or `[in]` for a projection of `inputs`; `mlp_down` is `mlp.down`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.projections import Projection, matches
from swissarmy.backbone.targets import TargetedMixin, TargetsConfig, module_name
from swissarmy.core.errors import HookDefinitionError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.nn.precision import precise


@final
@dataclass(frozen=True, kw_only=True)
class IA3Config(TargetsConfig):
    """The options of `IA3Mixin.for_model` and `IA3Mixin.for_config`."""

    pattern_fields: ClassVar[tuple[str, ...]] = ("inputs",)

    targets: tuple[str, ...] = ("key", "value", "down")
    """Patterns of projections (`swissarmy.backbone.projections`)."""
    inputs: tuple[str, ...] | None = None
    """Those of them whose input is stretched in place of their output; `down`, if it is one of them, when `None`."""

    def stretches_input(self, projection: Projection) -> bool:
        """Whether it is the input of a projection that is stretched."""
        inputs = ("down",) if self.inputs is None else self.inputs
        return any(matches(projection.address, pattern) for pattern in inputs)


@final
class Stretch(nn.Module):
    """The vector of one projection."""

    def __init__(self, size: int, *, of_input: bool) -> None:
        """Start with ones."""
        super().__init__()
        self.of_input = of_input
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Stretch `[..., size]`."""
        return x * self.scale.to(x.dtype)


@final
class IA3Mixin(TargetedMixin[Stretch]):
    """Stretched projections; `for_model` takes the options of `IA3Config`."""

    config_type = IA3Config
    config: IA3Config
    is_additive = False

    def make_change(self, projection: Projection) -> Stretch:
        """A vector of ones."""
        of_input = self.config.stretches_input(projection)
        return Stretch(projection.linear.in_features if of_input else projection.linear.out_features, of_input=of_input)

    @non_conflict
    def linear_forward(self, x: Tensor, linear: nn.Linear, name: str, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Stretch what a projection is given, or what it gives."""
        layer, key = self.layers[kw_args["layer_id"]], module_name(name)
        if key not in layer:
            projected: Tensor = old_impl(x, linear, name)
        elif layer[key].of_input:
            projected = old_impl(layer(key, x), linear, name)
        else:
            projected = layer(key, old_impl(x, linear, name))
        return projected

    def merged(self, projection: Projection) -> Tensor | None:
        """The weight with its rows, or its columns, stretched."""
        change = self.change_at(projection)
        return None if change is None else precise(projection.linear.weight.detach()) * _along(change)

    def unmerged(self, projection: Projection) -> Tensor | None:
        """The weight before."""
        change = self.change_at(projection)
        return None if change is None else precise(projection.linear.weight.detach()) / _checked(_along(change))

    def merged_bias(self, projection: Projection) -> Tensor | None:
        """The bias of a stretched output."""
        change, bias = self.change_at(projection), projection.linear.bias
        return None if change is None or change.of_input or bias is None else precise(bias.detach()) * _scale(change)

    def unmerged_bias(self, projection: Projection) -> Tensor | None:
        """The bias before."""
        change, bias = self.change_at(projection), projection.linear.bias
        if change is None or change.of_input or bias is None:
            return None
        return precise(bias.detach()) / _checked(_scale(change))


def _scale(change: Stretch) -> Tensor:
    return precise(change.scale.detach())


def _along(change: Stretch) -> Tensor:
    """The vector as it multiplies a weight `[out, in]`."""
    return _scale(change) if change.of_input else _scale(change)[:, None]


def _checked(scale: Tensor) -> Tensor:
    if not scale.all():
        raise HookDefinitionError("IA3 cannot be unmerged: rows or columns that were multiplied by zero are lost.")
    return scale
