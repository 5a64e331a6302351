"""Sliding-window attention (Beltagy et al. 2020; Mistral, Gemma): some layers see only the last keys.

Hooks: `attention_forward` (wraps). Parameters: none.
"""

from collections.abc import Sequence
from typing import Any, Self, final

from torch import Tensor

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.nn.masks import Mask, SlidingWindow


@final
class SlidingWindowMixin(BaseMixin):
    """A causal window of `window` keys, in the layers where `layers_with_window` says so."""

    def __init__(self, window: int, layers_with_window: Sequence[bool]) -> None:
        """Set the window and, for each layer, whether it has one."""
        super().__init__()
        self.window = SlidingWindow(window)
        self.layers_with_window = tuple(layers_with_window)

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"window": self.window.window, "layers_with_window": list(self.layers_with_window)}

    @classmethod
    def for_config(cls, config: TransformerConfig, *, window: int = 1024, every: int = 1, **options: Any) -> Self:
        """A window in every layer, or in all but each `every`-th (`every=6`: five with, one without)."""
        pattern = [every == 1 or (layer_id + 1) % every != 0 for layer_id in range(config.num_layers)]
        return cls(window, **{"layers_with_window": pattern, **options})

    @non_conflict
    def attention_forward(self, hidden_states: Tensor, mask: Mask, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Narrow the mask of this layer."""
        if self.layers_with_window[kw_args["layer_id"]]:
            mask = mask & self.window
        attended: Tensor = old_impl(hidden_states, mask, **kw_args)
        return attended
