"""The parameters of a feed-forward block: `[b, s, h] -> [b, s, intermediate] -> [b, s, h]`."""

from collections.abc import Callable
from typing import final

from torch import Tensor, nn

from swissarmy.nn.activations import ACTIVATIONS
from swissarmy.nn.linear import Linear


@final
class MLP(nn.Module):
    """Projections `up`, `down` and, when gated (Shazeer 2020), `gate`."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str, gated: bool, bias: bool) -> None:
        """Make the projections; `activation` is a key of `ACTIVATIONS`."""
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up = Linear(hidden_size, intermediate_size, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, project: Callable[[Tensor, nn.Linear, str], Tensor]) -> Tensor:
        """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` when gated.

        Args:
            x: `[..., h]`.
            project: Applies a projection; it is given the input, the projection, and its name in this block.
        """
        if self.gate is None:
            inner = self.activation(project(x, self.up, "up"))
        else:
            inner = self.activation(project(x, self.gate, "gate")) * project(x, self.up, "up")
        return project(inner, self.down, "down")
