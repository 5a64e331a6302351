"""The parameters of a feed-forward block: `[b, s, h] -> [b, s, intermediate] -> [b, s, h]`."""

from typing import final

from torch import nn

from swissarmy.nn.activations import ACTIVATIONS


@final
class MLP(nn.Module):
    """Projections `up`, `down` and, when gated (Shazeer 2020), `gate`; the `mlp_forward` hook runs them."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str, gated: bool, bias: bool) -> None:
        """Make the projections; `activation` is a key of `ACTIVATIONS`."""
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
