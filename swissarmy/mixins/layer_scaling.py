"""Soft layer scaling: a trained factor on what each sublayer adds to the residual stream.

One number a sublayer, as in ReZero (Bachlechner et al. 2021) but from one on, so that a trained model stays as it is
and learns which of its layers matter; or one for each channel, as in LayerScale (Touvron et al. 2021).
Changes: what attention, cross-attention and MLP give is multiplied; with `sandwich` norms before they are normalised.
Hooks: `attention_forward`, `cross_attention_forward`, `mlp_forward` (wrap).
Parameters: `layers.{i}.{sublayer}` `[1]`, or `[h]` per channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.merging import MergeableMixin
from swissarmy.backbone.projections import Projection
from swissarmy.backbone.sublayers import LayersConfig, Sublayer, sublayers_of
from swissarmy.core.errors import HookDefinitionError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.nn.precision import precise

LAST: dict[str, Sublayer] = {
    "attention.output": "attention",
    "cross_attention.output": "cross_attention",
    "mlp.down": "mlp",
}
"""The projections that sublayers end with."""


@final
@dataclass(frozen=True, kw_only=True)
class LayerScalingConfig(LayersConfig):
    """The options of `LayerScalingMixin.for_model` and `LayerScalingMixin.for_config`."""

    per_channel: bool = False
    """Whether each channel has a factor of its own."""


@final
class SublayerScales(nn.Module):
    """The factors of one layer's sublayers; an attribute for each."""

    def __init__(self, sublayers: Sequence[Sublayer], size: int) -> None:
        """Start with ones."""
        super().__init__()
        for sublayer in sublayers:
            self.register_parameter(sublayer, nn.Parameter(torch.ones(size)))

    def forward(self, sublayer: str, result: Tensor) -> Tensor:
        """Scale what a sublayer gives, `[b, s, h]`."""
        scale = self._parameters.get(sublayer)
        return result if scale is None else result * scale.to(result.dtype)


@final
class LayerScalingMixin(MergeableMixin):
    """A factor for each sublayer of the chosen layers; `for_model` takes the options of `LayerScalingConfig`."""

    is_additive = False

    def __init__(self, backbone: TransformerConfig, config: LayerScalingConfig) -> None:
        """Start with ones.

        Raises:
            ConfigError: There is no such layer.
        """
        super().__init__()
        self.config = config
        chosen, size = config.chosen(backbone.num_layers), backbone.hidden_size if config.per_channel else 1
        self.layers = nn.ModuleList(
            SublayerScales(sublayers_of(backbone) if layer_id in chosen else (), size)
            for layer_id in range(backbone.num_layers)
        )

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's layers, sublayers and width."""
        return cls(config, LayerScalingConfig.of(options))

    @property
    def saved_options(self) -> dict[str, Any]:
        """The fields of its configuration."""
        return self.config.to_dict()

    @non_conflict
    def attention_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Scale what attention gives."""
        scaled: Tensor = self.layers[kw_args["layer_id"]]("attention", old_impl(hidden_states, mask, **kw_args))
        return scaled

    @non_conflict
    def cross_attention_forward(
        self, hidden_states: Tensor, cross_attention_mask: Any, encoder_outputs: Any, *, old_impl: Hook, **kw_args: Any
    ) -> Tensor:
        """Scale what cross-attention gives."""
        attended: Tensor = old_impl(hidden_states, cross_attention_mask, encoder_outputs, **kw_args)
        scaled: Tensor = self.layers[kw_args["layer_id"]]("cross_attention", attended)
        return scaled

    @non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Scale what the MLP, or the experts, give."""
        scaled: Tensor = self.layers[kw_args["layer_id"]]("mlp", old_impl(hidden_states, **kw_args))
        return scaled

    def merged(self, projection: Projection) -> Tensor | None:
        """The weight of a sublayer's last projection, scaled."""
        scale = self._scale_of(projection)
        return None if scale is None else precise(projection.linear.weight.detach()) * scale[:, None]

    def unmerged(self, projection: Projection) -> Tensor | None:
        """The weight before."""
        scale = self._scale_of(projection)
        return None if scale is None else precise(projection.linear.weight.detach()) / _checked(scale)[:, None]

    def merged_bias(self, projection: Projection) -> Tensor | None:
        """The bias of that projection, scaled."""
        scale, bias = self._scale_of(projection), projection.linear.bias
        return None if scale is None or bias is None else precise(bias.detach()) * scale

    def unmerged_bias(self, projection: Projection) -> Tensor | None:
        """The bias before."""
        scale, bias = self._scale_of(projection), projection.linear.bias
        return None if scale is None or bias is None else precise(bias.detach()) / _checked(scale)

    def _scale_of(self, projection: Projection) -> Tensor | None:
        """The factors of the sublayer that ends with this projection, `[1]` or `[h]`."""
        ends_experts = projection.name.startswith("experts.") and projection.name.endswith(".down")
        sublayer = "mlp" if ends_experts else LAST.get(projection.name)
        scale = None if sublayer is None else self.layers[projection.layer_id]._parameters.get(sublayer)
        return None if scale is None else precise(scale.detach())


def _checked(scale: Tensor) -> Tensor:
    if not scale.all():
        raise HookDefinitionError("layer scaling cannot be unmerged: what was multiplied by zero is lost.")
    return scale
