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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.merging import MergeableMixin
from swissarmy.backbone.projections import (
    Projection,
    check_patterns,
    first_match,
    matches,
    projections_for,
    projections_of,
)
from swissarmy.core.config import Config
from swissarmy.core.errors import ConfigError, HookCallError, HookDefinitionError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import MixinHost


@final
@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """The options of `LoRAMixin.for_model` and `LoRAMixin.for_config`."""

    r: int = 8
    """The rank of the change."""
    alpha: float = 16.0
    """The change is scaled by `alpha / r`."""
    targets: tuple[str, ...] = ("query", "value")
    """Patterns of projections (`swissarmy.backbone.projections`): `attention.*`, `mlp.*`, `experts.*.up`."""
    layers: tuple[int, ...] | None = None
    """The layers to change; all when `None`."""
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
        yield from (f"{name}: {r!r} is no rank, at least 1" for name, r in ranks.items() if not _is_number(r, int, 1))
        yield from (f"{name}: {alpha!r} is no scale" for name, alpha in scales.items() if not _is_number(alpha, float))
        if not self.targets:
            yield "targets is empty: nothing would change"
        if not 0 <= self.dropout < 1:
            yield f"dropout={self.dropout} must be in [0, 1)"
        if not 0 < self.lr_ratio < math.inf:
            yield f"lr_ratio={self.lr_ratio} must be positive"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From options as people write them: one pattern as a string, layers as a range."""
        values = {key: list(value) if isinstance(value, range) else value for key, value in options.items()}
        if isinstance(values.get("targets"), str):
            values["targets"] = (values["targets"],)
        return cls.from_dict(values)

    def selects(self, projection: Projection) -> bool:
        """Whether a projection is to be changed."""
        in_layer = self.layers is None or projection.layer_id in self.layers
        return in_layer and any(matches(projection.address, pattern) for pattern in self.targets)

    def rank_and_scale(self, address: str) -> tuple[int, float]:
        """The rank at a projection, and what `B A` is multiplied by there."""
        r = first_match(address, self.rank_pattern, self.r)
        alpha = first_match(address, self.alpha_pattern, self.alpha)
        return r, alpha / (math.sqrt(r) if self.rslora else r)

    def within(self, projections: Sequence[Projection]) -> Self:
        """The same for one part of a model, without the patterns that match in other parts only."""

        def known(pattern: str) -> bool:
            return any(matches(projection.address, pattern) for projection in projections)

        return self.replace(
            targets=tuple(filter(known, self.targets)),
            rank_pattern={pattern: r for pattern, r in self.rank_pattern.items() if known(pattern)},
            alpha_pattern={pattern: alpha for pattern, alpha in self.alpha_pattern.items() if known(pattern)},
        )

    def check_found(self, projections: Sequence[Projection]) -> None:
        """Refuse patterns and layers that are nowhere in a model.

        Raises:
            ConfigError: Naming the pattern or the layer.
        """
        addresses = [projection.address for projection in projections]
        for name in ("targets", "rank_pattern", "alpha_pattern"):
            check_patterns(getattr(self, name), addresses, field=name)
        unknown = {*(self.layers or ())} - {projection.layer_id for projection in projections}
        if unknown:
            raise ConfigError(f"layers: there is no layer {min(unknown)}.")
        if not any(map(self.selects, projections)):
            raise ConfigError(f"targets={self.targets} are in none of the layers {self.layers}.")


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

    def forward(self, x: Tensor, projected: Tensor, linear: nn.Linear) -> Tensor:
        """What the changed projection gives.

        Args:
            x: `[..., in]`.
            projected: What the projection gives without the change, `[..., out]`.
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
        return _precise(a), _precise(b) * self.scale

    @torch.no_grad()
    def row_lengths(self, weight: Tensor) -> Tensor:
        """The lengths of the rows of `weight + b @ a`, `[out]`, without making that matrix; DoRA takes no gradient.

        Raises:
            HookCallError: The weight was let go, as `sat.load(..., quantize=...)` does.
        """
        if weight.is_meta:
            raise HookCallError("DoRA reads the weights that it changes, and these have no values (quantize=...).")
        weight = _precise(weight)
        a, b = (factor.type_as(weight) for factor in self._precise_factors())
        squares: Tensor = torch.linalg.vector_norm(weight, dim=1).square()
        squares += (b * (2 * (weight @ a.t()) + b @ (a @ a.t()))).sum(1)
        lengths: Tensor = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        return lengths

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the change in it, `[out, in]`, in float32 or better."""
        weight = _precise(weight)
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
        weight = _precise(weight)
        a, b = (factor.type_as(weight) for factor in self._precise_factors())
        if self.magnitude is not None:
            if self.divided_by is None or not self.magnitude.all():
                raise HookDefinitionError("DoRA cannot be unmerged: the lengths of the weight's rows are lost.")
            weight = weight * (self.divided_by.type_as(weight) / self.magnitude.detach())[:, None]
        return torch.addmm(weight, b, a, alpha=-1)


@final
class LoRALayer(nn.ModuleDict):
    """The changes of one layer's projections, by name, with `_` for each dot."""

    def forward(self, key: str, x: Tensor, projected: Tensor, linear: nn.Linear) -> Tensor:
        """What the changed projection gives, `[..., out]`."""
        changed: Tensor = self[key](x, projected, linear)
        return changed


@final
class LoRAMixin(MergeableMixin):
    """Changes of low rank at the projections that match `targets`; `for_model` takes the options of `LoRAConfig`."""

    def __init__(self, projections: Sequence[Projection], config: LoRAConfig) -> None:
        """Make a change for each of a model's projections that the configuration selects."""
        super().__init__()
        self.config = config
        num_layers = max(projection.layer_id for projection in projections) + 1
        self.layers = nn.ModuleList(LoRALayer() for _ in range(num_layers))
        for projection in filter(config.selects, projections):
            r, scale = config.rank_and_scale(projection.address)
            layer = self.layers[projection.layer_id]
            assert isinstance(layer, LoRALayer)
            layer[module_name(projection.name)] = LoRALinear(projection.linear, r, scale, config)

    @classmethod
    def for_model(cls, model: MixinHost, **options: Any) -> Any:
        """The mixin for a model's projections, those of its experts included; for a model of parts, one for each.

        Args:
            model: The model; DoRA, PiSSA and OLoRA start from its weights.
            **options: The fields of `LoRAConfig`.

        Returns:
            A mixin, or for a model of several parts a dict from part name to mixin; `add_mixin` takes both.

        Raises:
            ConfigError: Options that are none, or a pattern that matches no projection.
        """
        config = LoRAConfig.of(options)
        models: Mapping[str, Any] = model.parts or {"": model}
        found = {name: projections_of(part) for name, part in models.items()}
        config.check_found([each for projections in found.values() for each in projections])
        mixins = {
            name: cls(each, config.within(each)) for name, each in found.items() if any(map(config.selects, each))
        }
        return mixins if model.parts else mixins[""]

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The mixin for a backbone of these sizes, without experts."""
        projections, lora = projections_for(config), LoRAConfig.of(options)
        lora.check_found(projections)
        return cls(projections, lora)

    @property
    def saved_options(self) -> dict[str, Any]:
        """The fields of its configuration."""
        return self.config.to_dict()

    @property
    def is_additive(self) -> bool:
        """Plain LoRA adds to a weight and does not look at it; DoRA does."""
        return not self.config.dora

    def change_at(self, projection: Projection) -> LoRALinear | None:
        """The change of a projection, if it has one."""
        layer = self.layers[projection.layer_id]
        assert isinstance(layer, LoRALayer)
        change = layer._modules.get(module_name(projection.name))
        assert change is None or isinstance(change, LoRALinear)
        return change

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
        projected: Tensor = old_impl(x, linear, name)
        layer, key = self.layers[kw_args["layer_id"]], module_name(name)
        if key not in layer:
            return projected
        changed: Tensor = layer(key, x, projected, linear)
        return changed


def module_name(name: str) -> str:
    """A projection's name as a module's, which has no dots."""
    return name.replace(".", "_")


def _is_number(value: object, kind: type, least: float = -math.inf) -> bool:
    numbers = int if kind is int else int | float
    return isinstance(value, numbers) and not isinstance(value, bool) and least <= value < math.inf


def _precise(weight: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _weight_of(linear: nn.Linear, purpose: str) -> Tensor:
    if linear.weight.is_meta:
        raise ConfigError(
            f"{purpose} starts from a model's weights: use LoRAMixin.for_model(model, ...) where it has them."
        )
    return _precise(linear.weight.detach())


def _principal(weight: Tensor, r: int, scale: float, init: Literal["pissa", "olora"]) -> tuple[Tensor, Tensor]:
    """A `[r, in]` and B `[out, r]` from the weight itself; of PiSSA, `scale * B A` is its best approximation."""
    if r > min(weight.shape):
        raise ConfigError(f"init='{init}': a weight {list(weight.shape)} has no rank {r}.")
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].clone(), q[:, :r].clone()
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:r] / scale).sqrt()
    return roots[:, None] * v[:r], u[:, :r] * roots
