"""VeRA (Kopiczko et al. 2024): two random matrices, the same for all layers; only the vectors between them train.

Changes: adds `b * B (d * A x)` to what the chosen projections give. A and B are made from a seed and stay as they are;
each projection uses the part of them that has its size.
Hooks: `linear_forward` (wraps). b is zero at the start, so that a new mixin changes nothing.
Parameters: `layers.{i}.{projection}.d` `[r]` and `b` `[out]`, where the projection is called `attention_query`.
Buffers: `A` `[r, widest in]` and `B` `[widest out, r]`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.backbone.projections import Projection, first_match
from swissarmy.backbone.targets import TargetedMixin, TargetsConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.nn.precision import precise


@final
@dataclass(frozen=True, kw_only=True)
class VeRAConfig(TargetsConfig):
    """The options of `VeRAMixin.for_model` and `VeRAMixin.for_config`."""

    pattern_fields: ClassVar[tuple[str, ...]] = ("first_rows",)

    r: int = 256
    """The rank of the change: larger than LoRA's, since a rank costs a number a projection."""
    seed: int = 0
    """What A and B are made from."""
    d_initial: float = 0.1
    """What every d starts from."""
    dropout: float = 0.0
    """Dropout on what A is given."""
    first_rows: dict[str, int] = field(default_factory=dict)
    """Where in B the rows of matching projections begin, 0 where none matches: PEFT knows several of our projections as
    one (GPT-2's query, key and value)."""

    def problems(self) -> Iterator[str]:
        """A rank that is none, a chance that is none."""
        yield from super().problems()
        if self.r < 1:
            yield f"r={self.r} is no rank, at least 1"
        if not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout} must be in [0, 1)"
        if min(self.first_rows.values(), default=0) < 0:
            yield f"first_rows={self.first_rows} must not be negative"

    def rows(self, projection: Projection) -> slice:
        """The rows of B that a projection uses."""
        first = first_match(projection.address, self.first_rows, 0)
        return slice(first, first + projection.linear.out_features)


@final
class VeRALinear(nn.Module):
    """The change of one projection."""

    def __init__(self, linear: nn.Linear, rows: slice, config: VeRAConfig) -> None:
        """Start with a change of zero."""
        super().__init__()
        self.rows = rows
        self.dropout = nn.Dropout(config.dropout)
        self.d = nn.Parameter(torch.full((config.r,), config.d_initial))
        self.b = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, projected: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """What the changed projection gives.

        Args:
            projected: What the projection gives without the change, `[..., out]`.
            x: `[..., in]`.
            a: The matrix of all, `[r, widest in]`.
            b: The other one, `[widest out, r]`.
        """
        x = self.dropout(x) if self.training and self.dropout.p else x
        low = F.linear(x, a[:, : x.shape[-1]].to(x.dtype)) * self.d.to(x.dtype)
        changed: Tensor = projected + F.linear(low, b[self.rows].to(x.dtype)) * self.b.to(x.dtype)
        return changed

    def delta(self, linear: nn.Linear, a: Tensor, b: Tensor) -> Tensor:
        """The change of the weight `[out, in]`, in float32 or better."""
        own_d, own_b = precise(self.d.detach()), precise(self.b.detach())
        low = own_d[:, None] * a[:, : linear.in_features].to(own_d.dtype)
        return (own_b[:, None] * b[self.rows].to(own_b.dtype)) @ low


@final
class VeRAMixin(TargetedMixin[VeRALinear]):
    """Changes of random directions and trained sizes; `for_model` takes the options of `VeRAConfig`."""

    A: Tensor
    B: Tensor
    config_type = VeRAConfig
    config: VeRAConfig
    is_additive = True

    def __init__(self, projections: Sequence[Projection], config: VeRAConfig) -> None:
        """Make the matrices, and a change for each of a model's projections that the configuration selects."""
        super().__init__(projections, config)
        chosen = [projection for projection in projections if config.selects(projection)]
        widest_in = max(projection.linear.in_features for projection in chosen)
        widest_out = max(config.rows(projection).stop for projection in chosen)
        a, b = self.matrices(config.r, widest_in, widest_out, seed=config.seed)
        self.register_buffer("A", a)
        self.register_buffer("B", b)

    @staticmethod
    def matrices(r: int, widest_in: int, widest_out: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """A `[r, widest in]` and B `[widest out, r]`, the same on every machine."""
        generator = torch.Generator().manual_seed(seed)
        return _uniform(r, widest_in, generator), _uniform(widest_out, r, generator)

    def make_change(self, projection: Projection) -> VeRALinear:
        """A change of zero."""
        return VeRALinear(projection.linear, self.config.rows(projection), self.config)

    @non_conflict
    def linear_forward(self, x: Tensor, linear: nn.Linear, name: str, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Add the change to what a projection gives."""
        return self.changed(kw_args["layer_id"], name, old_impl(x, linear, name), x, self.A, self.B)

    def merged(self, projection: Projection) -> Tensor | None:
        """The projection's weight with the change in it."""
        return self._weight(projection, 1)

    def unmerged(self, projection: Projection) -> Tensor | None:
        """The projection's weight without the change again."""
        return self._weight(projection, -1)

    def _weight(self, projection: Projection, sign: int) -> Tensor | None:
        change = self.change_at(projection)
        if change is None:
            return None
        return precise(projection.linear.weight.detach()) + sign * change.delta(projection.linear, self.A, self.B)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Kaiming's uniform numbers `[rows, columns]`, on the CPU, so that a seed gives the same everywhere."""
    if torch.get_default_device().type == "meta":  # which asks for shapes only
        return torch.empty(rows, columns)
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator)
