"""LoRA adapters between PEFT's form and ours.

Where one of PEFT's modules holds several of our projections (GPT-2's `c_attn` is query, key and value), an adapter of
it becomes one of each, with the same A; the other way, adapters with different A become one of the sum of their ranks,
with B in blocks. Both are exact.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.backbone.projections import plain_models, projections_of
from swissarmy.interop.peft_config import PeftLoRAConfig
from swissarmy.interop.peft_modules import PeftModule, compact, peft_modules
from swissarmy.interop.peft_tensors import BASE, Layout, read_modules
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.mixins.lora import LoRAConfig, LoRALinear, LoRAMixin

ENDS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
T = TypeVar("T", bound=Hashable)


@final
@dataclass(frozen=True)
class Change:
    """LoRA at one of their modules: `scale * B A`; with DoRA the lengths of the rows."""

    a: Tensor
    """`[r, in]`."""
    b: Tensor
    """`[out, r]`."""
    magnitude: Tensor | None
    """`[out]`."""
    alpha: float

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.a)


def read_lora(model: Model, values: Mapping[str, Any], source: SafetensorsSource, where: str) -> dict[str, LoRAMixin]:
    """The mixin for each part that the adapter changes.

    Raises:
        CheckpointError: A tensor has no place, is missing or does not fit, or a field is not supported.
    """
    config = PeftLoRAConfig.read(values, where=where)
    modules = peft_modules(model)
    ours: dict[str, dict[str, Change]] = {}
    for found in read_modules(model, modules, source, _layout(config)):
        own = found.tensors
        change = Change(own["A"], own["B"], own.get("magnitude"), config.rank_and_alpha(found.path)[1])
        for place, rows in zip(found.module.places, found.module.rows, strict=True):
            magnitude = None if change.magnitude is None else change.magnitude[rows]
            part = Change(change.a, change.b[rows], magnitude, change.alpha)
            ours.setdefault(place.part, {})[place.projection.address] = part
    parts = plain_models(model)
    return {key: _mixin(parts[key], config, changes) for key, changes in ours.items()}


def write_lora(model: Model, mixins: Mapping[str, LoRAMixin]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `adapter_config.json` says, and the tensors."""
    modules = peft_modules(model)
    changes = {path: change for path, module in modules.items() if (change := _joined(module, mixins)) is not None}
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        tensors |= {f"{BASE}{path}.lora_A.weight": change.a, f"{BASE}{path}.lora_B.weight": change.b}
        if change.magnitude is not None:
            tensors[f"{BASE}{path}.lora_magnitude_vector"] = change.magnitude
    some = next(iter(mixins.values())).config
    return _config_values(some, changes, [modules[path] for path in changes]), tensors


def _layout(config: PeftLoRAConfig) -> Layout:
    def shapes(module: PeftModule, path: str) -> dict[str, tuple[int, ...]]:
        r, _ = config.rank_and_alpha(path)
        return {"A": (r, module.in_features), "B": (module.out_features, r), "magnitude": (module.out_features,)}

    kinds = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
    return Layout(ENDS, frozenset(kinds), shapes, config.targets, surplus="without use_dora")


def _mixin(model: BaseModel, config: PeftLoRAConfig, changes: Mapping[str, Change]) -> LoRAMixin:
    """The mixin for one plain model."""
    r = _most_common(change.r for change in changes.values())
    alpha = _most_common(float(change.alpha) for change in changes.values())
    lora = LoRAConfig(
        r=r,
        alpha=alpha,
        targets=compact(changes, projections_of(model)),
        dropout=config.lora_dropout,
        rslora=config.use_rslora,
        dora=config.use_dora,
        rank_pattern={address: change.r for address, change in changes.items() if change.r != r},
        alpha_pattern={address: float(change.alpha) for address, change in changes.items() if change.alpha != alpha},
    )
    mixin = LoRAMixin(projections_of(model), lora)
    for projection in filter(lora.selects, projections_of(model)):
        own, change = mixin.change_at(projection), changes[projection.address]
        assert own is not None
        own.to(change.a.dtype)
        with torch.no_grad():
            own.lora_A.copy_(change.a)
            own.lora_B.copy_(change.b)
            if own.magnitude is not None and change.magnitude is not None:
                own.magnitude.copy_(change.magnitude)
    return mixin


def _joined(module: PeftModule, mixins: Mapping[str, LoRAMixin]) -> Change | None:
    """What the mixins change in one of their modules, as one adapter of it."""
    changes = [
        mixins[place.part].change_at(place.projection) if place.part in mixins else None for place in module.places
    ]
    present = [change for change in changes if change is not None]
    if not present:
        return None
    rslora, scale = next(iter(mixins.values())).config.rslora, present[0].scale
    inputs = _distinct([change.factors()[0] for change in present])
    r = sum(map(len, inputs))
    b = present[0].lora_B.new_zeros(module.out_features, r)
    for change, rows in zip(changes, module.rows, strict=True):
        if change is not None:
            own_a, own_b = change.factors()
            start = _start_of(own_a, inputs)
            b[rows.to(b.device), start : start + len(own_a)] = own_b * (change.scale / scale)
    magnitude = _magnitudes(module, changes) if present[0].magnitude is not None else None
    return Change(torch.cat(inputs), b.detach(), magnitude, scale * (math.sqrt(r) if rslora else r))


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    kept: list[Tensor] = []
    for tensor in tensors:
        if not any(torch.equal(tensor, other) for other in kept):
            kept.append(tensor)
    return kept


def _start_of(a: Tensor, inputs: Sequence[Tensor]) -> int:
    """Where the rows of one A begin among all of them."""
    index = next(index for index, other in enumerate(inputs) if torch.equal(a, other))
    return sum(map(len, inputs[:index]))


def _magnitudes(module: PeftModule, changes: Sequence[LoRALinear | None]) -> Tensor:
    """The lengths of the rows; where nothing is changed, those that the weight has."""
    weights = [place.projection.linear.weight.detach() for place in module.places]
    lengths = torch.empty(module.out_features, dtype=weights[0].dtype, device=weights[0].device)
    for weight, change, rows in zip(weights, changes, module.rows, strict=True):
        own = torch.linalg.vector_norm(weight, dim=1) if change is None else change.magnitude
        assert own is not None
        lengths[rows.to(lengths.device)] = own.detach()
    return lengths


def _config_values(config: LoRAConfig, changes: Mapping[str, Change], modules: Sequence[PeftModule]) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    r = _most_common(change.r for change in changes.values())
    alpha = _most_common(_number(change.alpha) for change in changes.values())
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": all(module.is_transposed for module in modules),
        "init_lora_weights": True,
        "target_modules": sorted(changes),
        "rank_pattern": {path: change.r for path, change in changes.items() if change.r != r},
        "alpha_pattern": {p: _number(change.alpha) for p, change in changes.items() if _number(change.alpha) != alpha},
    }


def _number(value: float) -> int | float:
    """An integer where it is one, to rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _most_common(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]
