"""A head of several layers: an MLP over each token's last hidden state.

Changes: gives the MLP's output in place of logits.
Hooks: `final_forward` (replaces).
Parameters: `projections.{i}.weight` `[size i, size i - 1]` and, unless `bias=False`, `bias`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self, final

from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.config import report, size_problems
from swissarmy.core.errors import nearest
from swissarmy.core.mixin import BaseMixin
from swissarmy.nn.activations import ACTIVATIONS
from swissarmy.nn.linear import Linear


@final
class MLPHeadMixin(BaseMixin):
    """An MLP of any depth as a head: `for_model(model, output_sizes=(256, 3))` gives three numbers for each token."""

    def __init__(
        self,
        hidden_size: int,
        output_sizes: int | Sequence[int],
        *,
        activation: str = "tanh",
        bias: bool = True,
        std: float = 0.005,
    ) -> None:
        """Make the projections.

        Args:
            hidden_size: The model's width.
            output_sizes: What each projection gives; the last size is the head's. A number is one projection.
            activation: Between projections, by its Hugging Face name.
            bias: Whether the projections have biases, which start at zero.
            std: The standard deviation of new weights; small, so that a head starts near zero.

        Raises:
            ConfigError: Sizes or an activation that are none.
        """
        super().__init__()
        sizes = tuple(output_sizes) if isinstance(output_sizes, Sequence) else (output_sizes,)
        problems = [*size_problems(**{f"output_sizes[{index}]": size for index, size in enumerate(sizes)})]
        problems += [] if sizes else ["output_sizes is empty: say what the head gives, such as (256, 2)"]
        if activation not in ACTIVATIONS:
            problems.append(f"activation='{activation}' is unknown.{nearest(activation, ACTIVATIONS)}")
        report("MLPHeadMixin:", problems)
        self._options = {"output_sizes": list(sizes), "activation": activation, "bias": bias, "std": std}
        self.activation = ACTIVATIONS[activation]
        projections = [Linear(*each, bias=bias) for each in pairwise((hidden_size, *sizes))]
        self.projections = nn.ModuleList(projections)
        for projection in projections:
            nn.init.normal_(projection.weight, std=std)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    @classmethod
    def for_config(cls, config: TransformerConfig, *, output_sizes: int | Sequence[int] = 2, **options: Any) -> Self:
        """The model's width."""
        return cls(config.hidden_size, output_sizes, **options)

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made from."""
        return self._options

    def final_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        """`[b, s, h]` to `[b, s, output_sizes[-1]]`."""
        for index, projection in enumerate(self.projections):
            hidden_states = projection(hidden_states if index == 0 else self.activation(hidden_states))
        return hidden_states
