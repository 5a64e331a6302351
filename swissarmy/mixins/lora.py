"""LoRA (Hu et al. 2021): a trained change of low rank beside frozen projections, `y = W x + scale * B A x`.

Also rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), LoRA+ (Hayou et al. 2024), and the starting values of PiSSA
(Meng et al. 2024) and OLoRA (Büyükakyüz 2024).
Changes: what the chosen projections give. PiSSA and OLoRA take what they start from out of the weight; here the weight
stays, and the initial product is subtracted beside it: `W x + scale * (B A - B0 A0) x`, the same to rounding.
Several LoRAs of one projection add up; DoRA also stretches what was added before it.
Hooks: `linear_forward` (wraps).
Parameters: `layers.{i}.{projection}.lora_A` `[r, in]` and `lora_B` `[out, r]`, where the projection is called
`attention_query`; with DoRA `magnitude` `[out]`. Buffers: with PiSSA and OLoRA `initial_A` and `initial_B`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.backbone.projections import Projection, first_match
from swissarmy.backbone.targets import TargetedMixin, TargetsConfig
from swissarmy.core.errors import ConfigError, HookCallError, HookDefinitionError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.nn.precision import precise


@final
@dataclass(frozen=True, kw_only=True)
class LoRAConfig(TargetsConfig):
    """The options of `LoRAMixin.for_model` and `LoRAMixin.for_config`."""

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    r: int = 8
    """The rank of the change."""
    alpha: float = 16.0
    """The change is scaled by `alpha / r`; positive."""
    dropout: float = 0.0
    """Dropout on what A is given."""
    rslora: bool = False
    """Whether to scale by `alpha / sqrt(r)` (rsLoRA)."""
    dora: bool = False
    """Whether the length of each row of the weight is a parameter of its own, and B A changes directions (DoRA)."""
    init: Literal["random", "pissa", "olora"] = "random"
    """`random`: A random, B zero; `pissa`: the largest singular vectors; `olora`: the first columns of a QR."""
    lr_ratio: float = 1.0
    """How much faster B learns than A (LoRA+): left on each B as the mark `lr_scale`, for the optimizer."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Another rank for the projections that match; the first match counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Another alpha for the projections that match; the first match counts."""

    def problems(self) -> Iterator[str]:
        """Ranks and scales that are none."""
        ranks, scales = {"r": self.r, **self.rank_pattern}, {"alpha": self.alpha, **self.alpha_pattern}
        yield from (f"{name}: {r!r} is no rank, at least 1" for name, r in ranks.items() if not _is_positive(r, int))
        yield from (
            f"{name}: {alpha!r} is no scale: it must be positive and finite, as the change is multiplied by it"
            for name, alpha in scales.items()
            if not _is_positive(alpha, float)
        )
        yield from super().problems()
        if not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout} must be in [0, 1)"
        if not 0 < self.lr_ratio < math.inf:
            yield f"lr_ratio={self.lr_ratio} must be positive"

    def rank_and_scale(self, address: str) -> tuple[int, float]:
        """The rank at a projection, and what `B A` is multiplied by there."""
        r = first_match(address, self.rank_pattern, self.r)
        alpha = first_match(address, self.alpha_pattern, self.alpha)
        return r, alpha / (math.sqrt(r) if self.rslora else r)


@final
class LoRALinear(nn.Module):
    """The change of one projection."""

    initial_A: Tensor | None  # noqa: N815 - the paper's names, as in lora_A
    initial_B: Tensor | None  # noqa: N815

    def __init__(self, linear: nn.Linear, r: int, scale: float, config: LoRAConfig) -> None:
        """Start with a change of zero.

        Raises:
            ConfigError: The start needs weights that are not there, or more ranks than they have.
        """
        super().__init__()
        self.r, self.scale = r, scale
        self.dropout = nn.Dropout(config.dropout)
        if config.init == "random" or torch.get_default_device().type == "meta":  # which asks for shapes only
            a, b = torch.empty(r, linear.in_features), torch.zeros(linear.out_features, r)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        else:
            a, b = _principal(_weight_of(linear, config.init), r, scale, config.init)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("initial_A", None if config.init == "random" else a.clone())
        self.register_buffer("initial_B", None if config.init == "random" else b.clone())
        lengths = torch.linalg.vector_norm(_weight_of(linear, "dora"), dim=1) if config.dora else None
        self.magnitude = None if lengths is None else nn.Parameter(lengths)
        self.divided_by: Tensor | None = None
        self.lr_ratio = config.lr_ratio
        self._mark_rates()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; a copied parameter loses its marks."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_rates()

    def _mark_rates(self) -> None:
        self.lora_B.lr_scale = self.lr_ratio  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"r={self.r}, scale={self.scale:g}"

    def forward(self, projected: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
        """What the changed projection gives.

        Args:
            projected: What the projection gives without the change, `[..., out]`.
            x: `[..., in]`.
            linear: The projection, whose weight and bias DoRA reads.
        """
        low = F.linear(self.dropout(x) if self.training and self.dropout.p else x, self.lora_A)
        b: Tensor = self.lora_B
        if self.initial_A is not None and self.initial_B is not None:
            low = torch.cat((low, F.linear(x, self.initial_A)), dim=-1)
            b = torch.cat((b, -self.initial_B), dim=1)
        if self.magnitude is None:
            # One kernel adds the change; a sum of its own would read and write the whole output once more.
            flat = torch.addmm(projected.flatten(0, -2), (low * self.scale).flatten(0, -2), b.t())
            return flat.view_as(projected)
        bias = torch.zeros_like(self.magnitude) if linear.bias is None else linear.bias
        stretch = self.magnitude / self.row_lengths(linear.weight)
        stretched: Tensor = (projected - bias + F.linear(low * self.scale, b)) * stretch + bias
        return stretched.type_as(projected)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The change of the weight is `scale * b @ a`, what is subtracted included: a `[k, in]`, b `[out, k]`."""
        a, b = self.lora_A.detach(), self.lora_B.detach()
        if self.initial_A is None or self.initial_B is None:
            return a, b
        return torch.cat((a, self.initial_A)), torch.cat((b, -self.initial_B), dim=1)

    def _precise_factors(self) -> tuple[Tensor, Tensor]:
        """The change of the weight as `b @ a`."""
        a, b = self.factors()
        return precise(a), precise(b) * self.scale

    @torch.no_grad()
    def row_lengths(self, weight: Tensor) -> Tensor:
        """The lengths of the rows of `weight + b @ a`, `[out]`, without making that matrix; DoRA takes no gradient.

        Raises:
            HookCallError: The weight was let go, as `sat.load(..., quantize=...)` does.
        """
        if weight.is_meta:
            raise HookCallError("DoRA reads the weights that it changes, and these have no values (quantize=...).")
        weight = precise(weight)
        a, b = (factor.type_as(weight) for factor in self._precise_factors())
        squares: Tensor = torch.linalg.vector_norm(weight, dim=1).square()
        squares += (b * (2 * (weight @ a.t()) + b @ (a @ a.t()))).sum(1)
        lengths: Tensor = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        return lengths

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the change in it, `[out, in]`, in float32 or better."""
        weight = precise(weight)
        a, b = (factor.type_as(weight) for factor in self._precise_factors())
        changed = torch.addmm(weight, b, a)
        if self.magnitude is None:
            return changed
        self.divided_by = self.row_lengths(weight)
        return changed * (self.magnitude.detach() / self.divided_by)[:, None]

    def unmerged(self, weight: Tensor) -> Tensor:
        """The weight without the change again.

        Raises:
            HookDefinitionError: DoRA that this process did not merge, or a row that it made zero.
        """
        weight = precise(weight)
        a, b = (factor.type_as(weight) for factor in self._precise_factors())
        if self.magnitude is not None:
            if self.divided_by is None or not self.magnitude.all():
                raise HookDefinitionError("DoRA cannot be unmerged: the lengths of the weight's rows are lost.")
            weight = weight * (self.divided_by.type_as(weight) / self.magnitude.detach())[:, None]
        return torch.addmm(weight, b, a, alpha=-1)


@final
class LoRAMixin(TargetedMixin[LoRALinear]):
    """Changes of low rank at the projections that match `targets`; `for_model` takes the options of `LoRAConfig`.

    DoRA, PiSSA and OLoRA start from a model's weights, and so from `for_model`.
    """

    config_type = LoRAConfig
    config: LoRAConfig

    def make_change(self, projection: Projection) -> LoRALinear:
        """A change of zero."""
        r, scale = self.config.rank_and_scale(projection.address)
        return LoRALinear(projection.linear, r, scale, self.config)

    @property
    def is_additive(self) -> bool:
        """Plain LoRA adds to a weight and does not look at it; DoRA does."""
        return not self.config.dora

    def merged(self, projection: Projection) -> Tensor | None:
        """The projection's weight with the change in it."""
        change = self.change_at(projection)
        return None if change is None else change.merged(projection.linear.weight.detach())

    def unmerged(self, projection: Projection) -> Tensor | None:
        """The projection's weight without the change again."""
        change = self.change_at(projection)
        return None if change is None else change.unmerged(projection.linear.weight.detach())

    @non_conflict
    def linear_forward(self, x: Tensor, linear: nn.Linear, name: str, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Add the change to what a projection gives."""
        return self.changed(kw_args["layer_id"], name, old_impl(x, linear, name), x, linear)


def _is_positive(value: object, kind: type) -> bool:
    numbers = int if kind is int else int | float
    return isinstance(value, numbers) and not isinstance(value, bool) and 0 < value < math.inf


def _weight_of(linear: nn.Linear, purpose: str) -> Tensor:
    if linear.weight.is_meta:
        raise ConfigError(
            f"{purpose} starts from a model's weights: use LoRAMixin.for_model(model, ...) where it has them."
        )
    return precise(linear.weight.detach())


def _principal(weight: Tensor, r: int, scale: float, init: Literal["pissa", "olora"]) -> tuple[Tensor, Tensor]:
    """A `[r, in]` and B `[out, r]` from the weight itself; of PiSSA, `scale * B A` is its best approximation."""
    if r > min(weight.shape):
        raise ConfigError(f"init='{init}': a weight {list(weight.shape)} has no rank {r}.")
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].clone(memory_format=torch.contiguous_format), q[:, :r].contiguous()
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:r] / scale).sqrt()
    return (roots[:, None] * v[:r]).contiguous(), (u[:, :r] * roots).contiguous()  # as sharding needs them
