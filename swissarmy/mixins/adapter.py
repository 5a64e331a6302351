"""Bottleneck adapters: a small two-layer network inside each layer, `scale * up(activation(down(x)))`.

Three kinds: after attention and MLP (Houlsby et al. 2019); after the MLP only (Pfeiffer et al. 2020); beside the MLP,
on what the MLP is given, scaled (the parallel adapter of He et al. 2022).
Changes: adds to what these sublayers give, before the residual sum and before any norm that follows the sublayer
(`swissarmy/backbone/sublayers.py` says where that is under each placement of norms). Experts count as the MLP.
Hooks: `SublayerMixin`'s, one for each sublayer (wraps).
Parameters: `layers.{i}.{attention,cross_attention,mlp}.down` `[size, h]` and `up` `[h, size]`, with biases; `up` starts
at zero, so a new adapter changes nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, final

from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.sublayers import LayersConfig, Sublayer, SublayerMixin, sublayers_of
from swissarmy.core.errors import ConfigError, nearest
from swissarmy.nn.activations import ACTIVATIONS
from swissarmy.nn.linear import Linear

Kind = Literal["houlsby", "pfeiffer", "parallel"]
SUBLAYERS: Mapping[Kind, tuple[Sublayer, ...]] = {
    "houlsby": ("attention", "cross_attention", "mlp"),
    "pfeiffer": ("mlp",),
    "parallel": ("mlp",),
}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(LayersConfig):
    """What adapters of all kinds have in common."""

    bottleneck_size: int | None = None
    """The width inside an adapter; a sixteenth of the model's when `None`."""
    activation: str = "relu"
    """The activation inside, by its Hugging Face name."""
    dropout: float = 0.0
    """Dropout inside an adapter."""
    sublayers: tuple[Sublayer, ...] | None = None
    """The sublayers that get one; those of the method when `None`."""

    def problems(self) -> Iterator[str]:
        """Sizes and names that are none."""
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            yield f"bottleneck_size={self.bottleneck_size} must be at least 1"
        if self.activation not in ACTIVATIONS:
            yield f"activation='{self.activation}' is unknown.{nearest(self.activation, ACTIVATIONS)}"
        if not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout} must be in [0, 1)"
        if self.sublayers == ():
            yield "sublayers is empty: nothing would change"

    def places(self, config: TransformerConfig, default: tuple[Sublayer, ...]) -> list[tuple[Sublayer, ...]]:
        """The sublayers of each layer of a backbone that get an adapter.

        Raises:
            ConfigError: There is no such layer, or no such sublayer in it.
        """
        wanted, chosen = self.sublayers or default, self.chosen(config.num_layers)
        places = tuple(sublayer for sublayer in sublayers_of(config) if sublayer in wanted)
        if not places:
            raise ConfigError(f"sublayers={wanted}: the model's layers have {sublayers_of(config)} only.")
        return [places if layer_id in chosen else () for layer_id in range(config.num_layers)]


@final
@dataclass(frozen=True, kw_only=True)
class AdapterConfig(BottleneckConfig):
    """The options of `AdapterMixin.for_model`."""

    kind: Kind = "houlsby"
    """`houlsby`: after every sublayer; `pfeiffer`: after the MLP; `parallel`: beside the MLP."""
    scale: float | None = None
    """What the result is multiplied by; 4 beside the MLP, as in the paper, and otherwise 1 when `None`."""

    @property
    def factor(self) -> float:
        """The scale, filled in."""
        return (4.0 if self.kind == "parallel" else 1.0) if self.scale is None else self.scale


@final
class Bottleneck(nn.Module):
    """The adapter of one sublayer."""

    def __init__(self, hidden_size: int, config: AdapterConfig) -> None:
        """Start with a change of zero."""
        super().__init__()
        size = config.bottleneck_size or max(hidden_size // 16, 1)
        self.activation, self.scale = ACTIVATIONS[config.activation], config.factor
        self.down, self.up = Linear(hidden_size, size), Linear(size, hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, x: Tensor) -> Tensor:
        """What is added, `[b, s, h]` from `[b, s, h]`."""
        change: Tensor = self.up(self.dropout(self.activation(self.down(x)))) * self.scale
        return change


@final
class AdapterLayer(nn.ModuleDict):
    """The adapters of one layer, by sublayer."""

    def forward(self, sublayer: Sublayer, x: Tensor) -> Tensor:
        """What is added at a sublayer, `[b, s, h]`."""
        change: Tensor = self[sublayer](x)
        return change


@final
class AdapterMixin(SublayerMixin):
    """A bottleneck adapter in every layer; `for_model` takes the options of `AdapterConfig`."""

    def __init__(self, backbone: TransformerConfig, config: AdapterConfig) -> None:
        """Make the adapters for a backbone of these sizes.

        Raises:
            ConfigError: There is no such layer, or no such sublayer in it.
        """
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            AdapterLayer({sublayer: Bottleneck(backbone.hidden_size, config) for sublayer in places})
            for places in config.places(backbone, SUBLAYERS[config.kind])
        )

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's layers and width."""
        return cls(config, AdapterConfig.of(options))

    @property
    def saved_options(self) -> dict[str, Any]:
        """The fields of its configuration."""
        return self.config.to_dict()

    def change(self, sublayer: Sublayer, given: Tensor, result: Tensor, layer_id: int) -> Tensor | None:
        """What the adapter makes of the sublayer's result, or beside the sublayer of what that was given."""
        layer = self.layers[layer_id]
        assert isinstance(layer, AdapterLayer)
        if sublayer not in layer:
            return None
        change: Tensor = layer(sublayer, given if self.config.kind == "parallel" else result)
        return change
