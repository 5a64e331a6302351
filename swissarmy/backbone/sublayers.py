"""Mixins that add to what a sublayer gives, before it reaches the residual stream: where adapters sit.

A sublayer is attention, cross-attention or the MLP (experts included). With `norm_placement="pre"` it is given the
normalised residual stream and what it gives is added to that stream; with `post` the sum is normalised afterwards, as
in BERT; with `sandwich` what the sublayer gives is normalised before the sum. What a mixin adds here comes before that
norm in either case: directly after the sublayer's last projection.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from torch import Tensor

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.config import Config
from swissarmy.core.errors import ConfigError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin

Sublayer = Literal["attention", "cross_attention", "mlp"]


@dataclass(frozen=True, kw_only=True)
class LayersConfig(Config):
    """Options of a mixin that changes some layers."""

    layers: tuple[int, ...] | None = None
    """The layers to change; all when `None`."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From options as people write them: layers as a range."""
        return cls.from_dict(
            {key: list(value) if isinstance(value, range) else value for key, value in options.items()}
        )

    def chosen(self, num_layers: int) -> frozenset[int]:
        """The layers to change, of so many.

        Raises:
            ConfigError: There is no such layer, or none is chosen.
        """
        chosen = frozenset(range(num_layers) if self.layers is None else self.layers)
        unknown = sorted(chosen - frozenset(range(num_layers)))
        if unknown:
            raise ConfigError(f"layers: there is no layer {unknown[0]}; they are 0 to {num_layers - 1}.")
        if not chosen:
            raise ConfigError("layers is empty: nothing would change.")
        return chosen


def sublayers_of(config: TransformerConfig) -> tuple[Sublayer, ...]:
    """The sublayers of a backbone's layers, in their order."""
    return ("attention", "cross_attention", "mlp") if config.cross_attention else ("attention", "mlp")


class SublayerMixin(BaseMixin, ABC):
    """A mixin that adds something to what sublayers give; a subclass says what, and gets the three hooks."""

    @abstractmethod
    def change(self, sublayer: Sublayer, given: Tensor, result: Tensor, layer_id: int) -> Tensor | None:
        """What is added to a sublayer's result, or `None` where nothing is.

        Args:
            sublayer: Which sublayer of the layer.
            given: What the sublayer was given, `[b, s, h]`.
            result: What it gave, `[b, s, h]`.
            layer_id: The layer.
        """

    @non_conflict
    def attention_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Add to what attention gives."""
        return self._add("attention", hidden_states, old_impl(hidden_states, mask, **kw_args), kw_args)

    @non_conflict
    def cross_attention_forward(
        self, hidden_states: Tensor, cross_attention_mask: Any, encoder_outputs: Any, *, old_impl: Hook, **kw_args: Any
    ) -> Tensor:
        """Add to what cross-attention gives."""
        attended: Tensor = old_impl(hidden_states, cross_attention_mask, encoder_outputs, **kw_args)
        return self._add("cross_attention", hidden_states, attended, kw_args)

    @non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Add to what the MLP, or the experts, give."""
        return self._add("mlp", hidden_states, old_impl(hidden_states, **kw_args), kw_args)

    def _add(self, sublayer: Sublayer, given: Tensor, result: Tensor, kw_args: Mapping[str, Any]) -> Tensor:
        change = self.change(sublayer, given, result, kw_args["layer_id"])
        return result if change is None else result + change
