"""Compacter (Mahabadi et al. 2021): adapters whose matrices are sums of Kronecker products with a shared rule.

Each matrix of a bottleneck adapter is `sum_i A_i ⊗ (s_i t_i)`: the `num_terms` small matrices `A_i` are shared by all
adapters of the model, and `s_i t_i` has a low rank (parametrised hypercomplex multiplication, Zhang et al. 2021).
A hundredth of an adapter's parameters is common. Compacter++ is `sublayers=("mlp",)`.
Changes: adds to what attention, cross-attention and MLP give, where an adapter after them would.
Hooks: `SublayerMixin`'s, one for each sublayer (wraps).
Parameters: `rule` `[n, n, n]`, shared; `layers.{i}.{sublayer}.{down,up}` with `left` `[n, out/n, rank]`, `right`
`[n, rank, in/n]` and `bias` `[out]`; `up.right` starts at zero, so a new Compacter changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.sublayers import Sublayer, SublayerMixin
from swissarmy.core.errors import ConfigError
from swissarmy.mixins.adapter import SUBLAYERS, BottleneckConfig
from swissarmy.nn.activations import ACTIVATIONS
from swissarmy.nn.linear import linear


@final
@dataclass(frozen=True, kw_only=True)
class CompacterConfig(BottleneckConfig):
    """The options of `CompacterMixin.for_model`."""

    activation: str = "gelu_new"
    """The activation inside, by its Hugging Face name."""
    num_terms: int = 4
    """How many Kronecker products make a matrix; it divides the model's width and the adapter's."""
    rank: int = 1
    """The rank of each product's second factor."""

    def problems(self) -> Iterator[str]:
        """Sizes and names that are none."""
        yield from BottleneckConfig.problems(self)
        for name in ("num_terms", "rank"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1"

    def size_for(self, hidden_size: int) -> int:
        """The width inside an adapter, filled in.

        Raises:
            ConfigError: It or the model's width cannot be divided into `num_terms`.
        """
        n = self.num_terms
        size = self.bottleneck_size or -(-max(hidden_size // 16, 1) // n) * n
        for name, width in (("hidden_size", hidden_size), ("bottleneck_size", size)):
            if width % n:
                raise ConfigError(f"{name}={width} is not divisible by num_terms={n}: change num_terms.")
        return size


@final
class HypercomplexLinear(nn.Module):
    """A projection whose matrix is `sum_i A_i ⊗ (left_i right_i)`; the rule `A` is given with each call."""

    def __init__(self, in_features: int, out_features: int, config: CompacterConfig) -> None:
        """Start with entries as large as those of a usual projection."""
        super().__init__()
        n, rank = config.num_terms, config.rank
        self.left = nn.Parameter(torch.randn(n, out_features // n, rank) * rank**-0.5)
        self.right = nn.Parameter(torch.randn(n, rank, in_features // n) * in_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def weight(self, rule: Tensor) -> Tensor:
        """The matrix `[out, in]`; it is small, and made anew in each call."""
        factors = self.left @ self.right
        return torch.einsum("npq,noi->poqi", rule, factors).flatten(2).flatten(0, 1)

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        """`[b, s, in]` to `[b, s, out]`; rule `[n, n, n]`."""
        return linear(x, self.weight(rule), self.bias)


@final
class HypercomplexBottleneck(nn.Module):
    """The adapter of one sublayer."""

    def __init__(self, hidden_size: int, config: CompacterConfig) -> None:
        """Start with a change of zero."""
        super().__init__()
        size = config.size_for(hidden_size)
        self.activation, self.dropout = ACTIVATIONS[config.activation], nn.Dropout(config.dropout)
        self.down = HypercomplexLinear(hidden_size, size, config)
        self.up = HypercomplexLinear(size, hidden_size, config)
        nn.init.zeros_(self.up.right)

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        """What is added, `[b, s, h]` from `[b, s, h]`."""
        change: Tensor = self.up(self.dropout(self.activation(self.down(x, rule))), rule)
        return change


@final
class CompacterLayer(nn.ModuleDict):
    """The adapters of one layer, by sublayer."""

    def forward(self, sublayer: Sublayer, x: Tensor, rule: Tensor) -> Tensor:
        """What is added at a sublayer, `[b, s, h]`."""
        change: Tensor = self[sublayer](x, rule)
        return change


@final
class CompacterMixin(SublayerMixin):
    """A compact adapter in every layer; `for_model` takes the options of `CompacterConfig`."""

    def __init__(self, backbone: TransformerConfig, config: CompacterConfig) -> None:
        """Make the rule, and the adapters for a backbone of these sizes.

        Raises:
            ConfigError: Widths that cannot be divided, or no such layer or sublayer.
        """
        super().__init__()
        self.config = config
        self.rule = nn.Parameter(torch.randn((config.num_terms,) * 3) * config.num_terms**-0.5)
        self.layers = nn.ModuleList(
            CompacterLayer({sublayer: HypercomplexBottleneck(backbone.hidden_size, config) for sublayer in places})
            for places in config.places(backbone, SUBLAYERS["houlsby"])
        )

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's layers and width."""
        return cls(config, CompacterConfig.of(options))

    @property
    def saved_options(self) -> dict[str, Any]:
        """The fields of its configuration."""
        return self.config.to_dict()

    def change(self, sublayer: Sublayer, given: Tensor, result: Tensor, layer_id: int) -> Tensor | None:
        """What the adapter makes of the sublayer's result."""
        layer = self.layers[layer_id]
        assert isinstance(layer, CompacterLayer)
        if sublayer not in layer:
            return None
        change: Tensor = layer(sublayer, result, self.rule)
        return change
