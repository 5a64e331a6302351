"""A bank of LoRA adapters in one model: another one for each call, or for each row of a batch; or several, weighted.

Changes: what the chosen projections give; nothing at all in a call that names no adapter.
Hooks: `linear_forward` (wraps); it reads the keywords `adapter` and `adapter_ids`.
Parameters: `layers.{i}.{projection}.lora_A` `[n, r, in]` and `lora_B` `[n, out, r]` for n adapters, scales included;
an adapter of a smaller rank is filled up with zeros. (Rows of their own: Wen & Chaudhuri 2023, Chen et al. 2023.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel, Model
from swissarmy.backbone.projections import Projection, plain_models, projections_for, projections_of
from swissarmy.backbone.targets import TargetsConfig, module_name
from swissarmy.core.errors import HookCallError, HookDefinitionError, nearest
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin, MixinHost
from swissarmy.mixins.lora import LoRAMixin

Weights = Sequence[tuple[int, float]]
"""Adapters by number, and how much of each."""


@final
@dataclass(frozen=True, kw_only=True)
class BankConfig(TargetsConfig):
    """The options of `LoRABankMixin.for_model` and `LoRABankMixin.for_config`."""

    adapters: tuple[str, ...]
    """Their names, in the order in which `adapter_ids` counts them."""
    r: int = 8
    """The largest rank."""

    def problems(self) -> Iterator[str]:
        """No adapters, names that repeat, no rank."""
        if not self.adapters or len(set(self.adapters)) < len(self.adapters):
            yield f"adapters={self.adapters} must be one name or more, each once"
        if self.r < 1:
            yield f"r={self.r} must be at least 1"
        yield from super().problems()


@final
class LoRABankLinear(nn.Module):
    """The changes of one projection, one for each adapter."""

    def __init__(self, linear: nn.Linear, config: BankConfig) -> None:
        """Start with changes of zero."""
        super().__init__()
        count = len(config.adapters)
        self.lora_A = nn.Parameter(torch.empty(count, config.r, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(count, linear.out_features, config.r))
        nn.init.uniform_(self.lora_A, -(linear.in_features**-0.5), linear.in_features**-0.5)

    def forward(self, x: Tensor, projected: Tensor, weights: Weights | None, ids: Tensor | None) -> Tensor:
        """What the changed projection gives.

        Args:
            x: `[b, s, in]`; any number of dimensions without `ids`.
            projected: What the projection gives without a change, `[b, s, out]`.
            weights: The adapters for all rows.
            ids: The adapter of each row, `[b]`; none where it is negative.
        """
        if ids is not None:
            rows = ids.clamp(min=0)
            try:
                a, b = self.lora_A[rows], self.lora_B[rows]
            except IndexError:
                raise HookCallError(
                    f"adapter_ids go from {int(ids.min())} to {int(ids.max())}; there are {len(self.lora_A)} adapters, "
                    "from 0 on, and -1 is none."
                ) from None
            return torch.baddbmm(projected, torch.bmm(x, a.mT) * (ids >= 0)[:, None, None], b.mT)
        for index, weight in weights or ():
            low = F.linear(x, self.lora_A[index]).flatten(0, -2) * weight
            projected = torch.addmm(projected.flatten(0, -2), low, self.lora_B[index].t()).view_as(projected)
        return projected


@final
class LoRABankLayer(nn.ModuleDict):
    """The changes of one layer's projections, by name, with `_` for each dot."""

    def forward(self, key: str, x: Tensor, projected: Tensor, weights: Weights | None, ids: Tensor | None) -> Tensor:
        """What the changed projection gives, `[b, s, out]`."""
        changed: Tensor = self[key](x, projected, weights, ids)
        return changed


@final
class LoRABankMixin(BaseMixin):
    """Several adapters: `model(ids, adapter="name")`, `adapter={"a": 0.5, "b": 0.5}`, or `adapter_ids=tensor`.

    `bundle_adapters` makes it of `LoRAMixin`s that were trained apart; `for_model` makes one to train.
    """

    def __init__(self, projections: Sequence[Projection], config: BankConfig) -> None:
        """Make changes for each of a model's projections that the configuration selects."""
        super().__init__()
        self.config = config
        num_layers = max(projection.layer_id for projection in projections) + 1
        self.layers = nn.ModuleList(LoRABankLayer() for _ in range(num_layers))
        for projection in filter(config.selects, projections):
            layer = self.layers[projection.layer_id]
            assert isinstance(layer, LoRABankLayer)
            layer[module_name(projection.name)] = LoRABankLinear(projection.linear, config)

    @classmethod
    def for_model(cls, model: MixinHost, **options: Any) -> Any:
        """The mixin for a model's projections; for a model of parts, one for each that has projections to change.

        Args:
            model: The model.
            **options: The fields of `BankConfig`.

        Raises:
            ConfigError: Options that are none, or a pattern that matches no projection.
        """
        config = BankConfig.of(options)
        models: Mapping[str, Any] = model.parts or {"": model}
        found = {name: projections_of(part) for name, part in models.items()}
        config.check_found([each for part in found.values() for each in part])
        mixins = {
            name: cls(each, config.within(each)) for name, each in found.items() if any(map(config.selects, each))
        }
        return mixins if model.parts else mixins[""]

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The mixin for a backbone of these sizes, without experts."""
        projections, bank = projections_for(config), BankConfig.of(options)
        bank.check_found(projections)
        return cls(projections, bank.within(projections))

    @property
    def saved_options(self) -> dict[str, Any]:
        """The fields of its configuration."""
        return self.config.to_dict()

    @non_conflict
    def linear_forward(
        self,
        x: Tensor,
        linear: nn.Linear,
        name: str,
        *,
        old_impl: Hook,
        adapter: str | Mapping[str, float] | None = None,
        adapter_ids: Tensor | None = None,
        **kw_args: Any,
    ) -> Tensor:
        """Add the changes that the call asks for to what a projection gives."""
        projected: Tensor = old_impl(x, linear, name)
        layer, key = self.layers[kw_args["layer_id"]], module_name(name)
        if key not in layer or (adapter is None and adapter_ids is None):
            return projected
        weights = None if adapter is None else self._weights(adapter)
        if adapter_ids is not None:
            _check_rows(adapter_ids, weights, x, name)
        changed: Tensor = layer(key, x, projected, weights, adapter_ids)
        return changed

    def _weights(self, adapter: str | Mapping[str, float]) -> Weights:
        given = {adapter: 1.0} if isinstance(adapter, str) else adapter
        if not isinstance(given, Mapping):
            raise HookCallError(
                f"adapter is {given!r}; it is a name, or weights by name, {{'a': 0.5, 'b': 0.5}}. There are: "
                f"{', '.join(self.config.adapters)}. adapter_ids=tensor chooses for each row."
            )
        for name, weight in given.items():
            if name not in self.config.adapters:
                raise HookCallError(
                    f"there is no adapter '{name}'.{nearest(str(name), self.config.adapters)} "
                    f"There are: {', '.join(self.config.adapters)}."
                )
            if not isinstance(weight, Real) or not -math.inf < weight < math.inf:
                raise HookCallError(f"adapter: the weight of '{name}' is {weight!r}; it must be a finite number.")
        return [(self.config.adapters.index(name), weight) for name, weight in given.items()]


def bundle_adapters(model: Model, *names: str, name: str = "adapters") -> None:
    """Put a bank in place of `LoRAMixin`s of a model; then each call, or each row, says which it wants.

    Args:
        model: The model that has them.
        *names: The mixins' names, which become the adapters'.
        name: The name of the bank.

    Raises:
        HookDefinitionError: No such mixins, or one is DoRA, whose changes no sum can express.
    """
    parts = plain_models(model)
    banks = {key: _bank(part, names) for key, part in parts.items() if any(adapter in part.mixins for adapter in names)}
    missing = [adapter for adapter in names if not any(adapter in part.mixins for part in parts.values())]
    if missing or not banks:
        known = sorted({mixin for part in parts.values() for mixin in part.mixins})
        wanted = missing[0] if missing else ""
        raise HookDefinitionError(f"there is no mixin '{wanted}'.{nearest(wanted, known)} There are: {known}.")
    model.add_mixin(name, banks if model.parts else banks[""])
    for part in parts.values():
        for adapter in set(names).intersection(part.mixins):
            part.del_mixin(adapter)


def _bank(model: BaseModel, names: Sequence[str]) -> LoRABankMixin:
    """The bank of one plain model; an adapter that it lacks changes nothing in it."""
    adapters = {index: _lora(model, name) for index, name in enumerate(names) if name in model.mixins}
    changes = {
        (index, projection.address): (change.factors(), change.scale)
        for index, mixin in adapters.items()
        for projection in projections_of(model)
        if (change := mixin.change_at(projection)) is not None
    }
    r = max(len(a) for (a, _), _ in changes.values())
    targets = tuple(dict.fromkeys(address for _, address in changes))
    bank = LoRABankMixin(projections_of(model), BankConfig(adapters=tuple(names), r=r, targets=targets))
    some, _ = next(iter(changes.values()))
    bank.to(some[0])
    with torch.no_grad():
        for projection in filter(bank.config.selects, projections_of(model)):
            linear = bank.layers[projection.layer_id].get_submodule(module_name(projection.name))
            assert isinstance(linear, LoRABankLinear)
            linear.lora_A.zero_()
            for index in adapters:
                if (index, projection.address) in changes:
                    (a, b), scale = changes[index, projection.address]
                    linear.lora_A[index, : len(a)], linear.lora_B[index, :, : len(a)] = a, b * scale
    return bank


def _lora(model: BaseModel, name: str) -> LoRAMixin:
    mixin = model.get_mixin(name)
    if not isinstance(mixin, LoRAMixin) or mixin.config.dora:
        kind = "DoRA" if isinstance(mixin, LoRAMixin) else f"a {type(mixin).__name__}"
        raise HookDefinitionError(f"'{name}' is {kind}, and a bank adds up changes of LoRAMixin: leave it out.")
    return mixin


def _check_rows(ids: Tensor, weights: Weights | None, x: Tensor, name: str) -> None:
    if weights is not None:
        raise HookCallError("adapter is for all rows and adapter_ids for each: give one of them.")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 1:
        raise HookCallError(
            f"adapter_ids is {ids!r}; it is a tensor [b] with an adapter's number, or -1, for each row."
        )
    if x.dim() != 3 or len(x) != len(ids):
        raise HookCallError(
            f"adapter_ids has {len(ids)} rows, and {name} is given {list(x.shape)}: one number for each row of the "
            "batch; experts are given tokens without rows, and take `adapter` only."
        )
