"""Side neurons: a few more neurons beside those of each MLP, trained alone.

The MLP of width n becomes one of width n + k whose first n neurons stay as they are, which is the sum of two MLPs
(SwissArmyTransformer's FFADD).
Changes: adds to what the MLP, or the experts, give, on the same input.
Hooks: `SublayerMixin`'s, of which it answers the MLP's (wraps).
Parameters: `layers.{i}.up` `[k, h]` and, where the model's MLP is gated, `gate` `[k, h]`, with biases where the MLP has
them, and `down` `[h, k]` without; `down` starts at zero, so new neurons change nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, final

from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.sublayers import LayersConfig, Sublayer, SublayerMixin
from swissarmy.nn.linear import Linear
from swissarmy.nn.mlp import MLP


@final
@dataclass(frozen=True, kw_only=True)
class FFADDConfig(LayersConfig):
    """The options of `FFADDMixin.for_model`."""

    num_neurons: int = 32
    """How many neurons are added to each MLP."""

    def problems(self) -> Iterator[str]:
        """Sizes that are none."""
        if self.num_neurons < 1:
            yield f"num_neurons={self.num_neurons} must be at least 1"


@final
class FFADDMixin(SublayerMixin):
    """More neurons beside each MLP's own; `for_model` takes the options of `FFADDConfig`."""

    def __init__(self, backbone: TransformerConfig, config: FFADDConfig) -> None:
        """Make the neurons, like those of a backbone of these sizes.

        Raises:
            ConfigError: There is no such layer.
        """
        super().__init__()
        self.config = config
        chosen = config.chosen(backbone.num_layers)
        self.layers = nn.ModuleList(
            _neurons(backbone, config.num_neurons) if layer_id in chosen else nn.Identity()
            for layer_id in range(backbone.num_layers)
        )

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's layers, width, activation and gate."""
        return cls(config, FFADDConfig.of(options))

    @property
    def saved_options(self) -> dict[str, Any]:
        """The fields of its configuration."""
        return self.config.to_dict()

    def change(self, sublayer: Sublayer, given: Tensor, result: Tensor, layer_id: int) -> Tensor | None:
        """What the added neurons give on the MLP's input."""
        layer = self.layers[layer_id]
        if sublayer != "mlp" or not isinstance(layer, MLP):
            return None
        change: Tensor = layer(given, lambda x, linear, name: linear(x))
        return change


def _neurons(backbone: TransformerConfig, num_neurons: int) -> MLP:
    """A narrow MLP that gives zero; a bias on what it gives would be the wide one's, so there is none."""
    width, bias = backbone.hidden_size, backbone.mlp_bias
    mlp = MLP(width, num_neurons, activation=backbone.activation, gated=backbone.gated_mlp, bias=bias)
    mlp.down = Linear(num_neurons, width, bias=False)
    nn.init.zeros_(mlp.down.weight)
    return mlp
