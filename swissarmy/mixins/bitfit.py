"""BitFit (Ben Zaken et al. 2022): only biases train. Here a trained bias is added beside each frozen one.

Changes: adds a vector to what the chosen projections give, also to those that have no bias of their own.
Norms are no hook, and where a norm comes last before the residual stream no other hook could stand in for it, so their
biases are left out. Who wants these too, and needs no adapter beside the model, trains the model's own:
`model.freeze_except("*.bias")`.
Hooks: `linear_forward` (wraps). Zero at the start, so that a new mixin changes nothing.
Parameters: `layers.{i}.{projection}.bias` `[out]`, where the projection is called `attention_query`.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.projections import Projection
from swissarmy.backbone.targets import TargetedMixin, TargetsConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.nn.precision import precise


@final
@dataclass(frozen=True, kw_only=True)
class BitFitConfig(TargetsConfig):
    """The options of `BitFitMixin.for_model` and `BitFitMixin.for_config`."""

    targets: tuple[str, ...] = ("*",)
    """Patterns of projections (`swissarmy.backbone.projections`); BEFT (2025) trains those of `value` only."""


@final
class AddedBias(nn.Module):
    """The bias of one projection."""

    def __init__(self, size: int) -> None:
        """Start with zeros."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, projected: Tensor) -> Tensor:
        """Add to `[..., size]`."""
        return projected + self.bias.to(projected.dtype)


@final
class BitFitMixin(TargetedMixin[AddedBias]):
    """Trained biases; `for_model` takes the options of `BitFitConfig`."""

    config_type = BitFitConfig
    config: BitFitConfig
    is_additive = True

    def make_change(self, projection: Projection) -> AddedBias:
        """A bias of zeros."""
        return AddedBias(projection.linear.out_features)

    @non_conflict
    def linear_forward(self, x: Tensor, linear: nn.Linear, name: str, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Add the bias to what a projection gives."""
        return self.changed(kw_args["layer_id"], name, old_impl(x, linear, name))

    def merged(self, projection: Projection) -> None:
        """No weight changes."""

    def unmerged(self, projection: Projection) -> None:
        """No weight changed."""

    def merged_bias(self, projection: Projection) -> Tensor | None:
        """The sum of both biases; one of zeros needs no place."""
        return self._bias(projection, 1)

    def unmerged_bias(self, projection: Projection) -> Tensor | None:
        """The bias before."""
        return self._bias(projection, -1)

    def _bias(self, projection: Projection, sign: int) -> Tensor | None:
        change, bias = self.change_at(projection), projection.linear.bias
        if change is None or (bias is None and not change.bias.any()):
            return None
        own = precise(change.bias.detach())
        return own * sign if bias is None else precise(bias.detach()) + own * sign
