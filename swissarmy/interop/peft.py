"""LoRA adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`, read and written.

PEFT names modules as Hugging Face's models do. Where one of their modules holds several of our projections (GPT-2's
`c_attn` is query, key and value), an adapter of it becomes one of each, with the same A; the other way, adapters with
different A become one of the sum of their ranks, with B in blocks. Both are exact.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.backbone.projections import Projection, plain_models, projections_of
from swissarmy.core.errors import CheckpointError, nearest
from swissarmy.interop.hub import describe_folder, resolve
from swissarmy.interop.load import read_json
from swissarmy.interop.matching import report
from swissarmy.interop.peft_config import PeftLoRAConfig
from swissarmy.interop.peft_modules import PeftModule, find_module, peft_modules
from swissarmy.interop.safe_write import write_folder
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.interop.safetensors_write import save_safetensors
from swissarmy.mixins.lora import LoRAConfig, LoRALinear, LoRAMixin

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.model."
"""What PEFT puts before the names of the model inside."""
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


def load_adapter(model: Model, path: str | Path, *, name: str = "lora") -> Model:
    """Add a LoRA adapter that PEFT (or `save_adapter`) wrote, as a `LoRAMixin`.

    Args:
        model: A model of the family that the adapter was trained on.
        path: The adapter's folder, or its name on the hub.
        name: The mixin's name; other adapters under other names add to it.

    Returns:
        The model.

    Raises:
        CheckpointError: No such adapter, not LoRA, or a tensor that has no place or is missing; nothing was added.
        ConfigError: A field of its configuration is not what it must be.
    """
    folder = resolve(path, (CONFIG_FILE, WEIGHTS_FILE))
    source = _open(folder)
    config = PeftLoRAConfig.read(read_json(folder / CONFIG_FILE), where=str(folder / CONFIG_FILE))
    modules = peft_modules(model)
    changes = _read_changes(model, modules, config, source, folder)
    parts = plain_models(model)
    ours: dict[str, dict[str, Change]] = {}
    for path_of_theirs, change in changes.items():
        module = modules[path_of_theirs]
        for place, rows in zip(module.places, module.rows, strict=True):
            magnitude = None if change.magnitude is None else change.magnitude[rows]
            own = Change(change.a, change.b[rows], magnitude, change.alpha)
            ours.setdefault(place.part, {})[place.projection.address] = own
    mixins = {key: _mixin(parts[key], config, own) for key, own in ours.items()}
    model.add_mixin(name, mixins if model.parts else mixins[""])
    return model


def save_adapter(model: Model, folder: str | Path, *, name: str | None = None) -> None:
    """Write a `LoRAMixin` of a model as PEFT does, to a new folder.

    Args:
        model: A model of a family, so that PEFT's names are known.
        folder: Where to.
        name: The mixin; may be left out where there is one only.

    Raises:
        CheckpointError: There is no such mixin, PEFT cannot represent it, or the folder cannot be written.
    """
    mixins = _lora_mixins(model, name)
    modules = peft_modules(model)
    _check_places(mixins, modules, model)
    changes = {path: change for path, module in modules.items() if (change := _joined(module, mixins)) is not None}
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        tensors |= {f"{BASE}{path}.lora_A.weight": change.a, f"{BASE}{path}.lora_B.weight": change.b}
        if change.magnitude is not None:
            tensors[f"{BASE}{path}.lora_magnitude_vector"] = change.magnitude
    some = next(iter(mixins.values())).config
    with write_folder(folder) as target:
        values = _config_values(some, changes, [modules[path] for path in changes])
        (target / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (written,) = save_safetensors(target, tensors, max_shard_bytes=1 << 62)
        os.rename(target / written, target / WEIGHTS_FILE)


def _open(folder: Path) -> SafetensorsSource:
    if not folder.is_dir() or not (folder / CONFIG_FILE).is_file():
        holds = describe_folder(folder) if folder.is_dir() else f"{folder} is a file"
        raise CheckpointError(f"{folder} is no adapter of PEFT: it needs {CONFIG_FILE} and {WEIGHTS_FILE}; {holds}.")
    if not (folder / WEIGHTS_FILE).is_file() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder / 'adapter_model.bin'} is a pickle, and adapters are read from safetensors only: let PEFT load "
            "it and save it again with save_pretrained(dir, safe_serialization=True)."
        )
    return SafetensorsSource(folder / WEIGHTS_FILE)


def _read_changes(
    model: Model,
    modules: Mapping[str, PeftModule],
    config: PeftLoRAConfig,
    source: SafetensorsSource,
    folder: Path,
) -> dict[str, Change]:
    """The adapter at each of their modules, every name and shape compared before a tensor is read."""
    stored, problems = _sorted_names(model, modules, source)
    wanted = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
    lacking = [
        f"{BASE}{path}.{end}"
        for path in modules
        if path in stored or config.targets(path)
        for kind, end in zip(("A", "B", "magnitude"), ENDS, strict=False)
        if kind in wanted - set(stored.get(path, {}))
    ]
    problems += report("missing", lacking, source.names())
    for path, module in modules.items():
        names = stored.get(path, {})
        if set(names) == wanted:
            problems += _shape_problems(module, config.rank_and_alpha(path)[0], names, source)
        elif surplus := set(names) - wanted:
            problems.append(f"unexpected: {names[min(surplus)]}, without use_dora")
    if not stored and not problems:
        problems = ["it holds no tensors"]
    if problems:
        raise CheckpointError("\n  - ".join([f"{folder} does not fit {type(model).__name__}:", *problems]))
    return {path: _read(names, config.rank_and_alpha(path)[1], source) for path, names in stored.items()}


def _sorted_names(
    model: Model, modules: Mapping[str, PeftModule], source: SafetensorsSource
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The stored names by module and by what they are, and a line for each group that has no place."""
    stored: dict[str, dict[str, str]] = {}
    strangers, problems = [], []
    for name in source.names():
        end = next((end for end in ENDS if name.endswith(f".{end}")), None)
        path = name.removeprefix(BASE).removesuffix(f".{end}")
        module = find_module(path, model, modules) if end is not None and name.startswith(BASE) else None
        if module is None or end is None:
            strangers.append(name)
        elif ENDS[end] in stored.setdefault(module.path, {}):
            problems.append(f"unexpected: {name}, beside {stored[module.path][ENDS[end]]}")
        else:
            stored[module.path][ENDS[end]] = name
    known = [f"{BASE}{path}.{end}" for path in modules for end in ENDS]
    return stored, [*report("unexpected", strangers, known), *problems]


def _shape_problems(module: PeftModule, r: int, names: Mapping[str, str], source: SafetensorsSource) -> Iterator[str]:
    want = {"A": (r, module.in_features), "B": (module.out_features, r), "magnitude": (module.out_features,)}
    for kind, name in names.items():
        have = tuple(source.shape(name))
        if have != want[kind]:
            yield f"{name}: have {list(have)}, want {list(want[kind])}"
        elif not source.dtype(name).is_floating_point:
            yield f"{name}: {source.dtype(name)} is no precision of weights"


def _read(names: Mapping[str, str], alpha: float, source: SafetensorsSource) -> Change:
    tensors = {kind: source.read(name) for kind, name in names.items()}
    return Change(tensors["A"], tensors["B"], tensors.get("magnitude"), alpha)


def _mixin(model: BaseModel, config: PeftLoRAConfig, changes: Mapping[str, Change]) -> LoRAMixin:
    """The mixin for one plain model."""
    r = _most_common(change.r for change in changes.values())
    alpha = _most_common(float(change.alpha) for change in changes.values())
    lora = LoRAConfig(
        r=r,
        alpha=alpha,
        targets=_compact(changes, projections_of(model)),
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


def _compact(addresses: Mapping[str, object], projections: Sequence[Projection]) -> tuple[str, ...]:
    """Addresses as patterns: a name where every layer that has it is meant, else layer by layer."""
    partial = {each.name for each in projections if each.address not in addresses}
    chosen = [each for each in projections if each.address in addresses]
    return tuple(dict.fromkeys(each.address if each.name in partial else f"layers.*.{each.name}" for each in chosen))


def _lora_mixins(model: Model, name: str | None) -> dict[str, LoRAMixin]:
    """The mixin in each part that has it, by the part's name."""
    found = {
        (part_name, key): mixin
        for part_name, part in plain_models(model).items()
        for key in part.mixins
        if isinstance(mixin := part.get_mixin(key), LoRAMixin)
    }
    names = sorted({key for _, key in found})
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        problem = f"several LoRAMixins: say name={names[0]!r} or another" if names else "no LoRAMixin"
        if name is not None:
            problem = f"no LoRAMixin '{name}'.{nearest(name, names)} There are: {names}"
        raise CheckpointError(f"the model has {problem}; only LoRA is written for PEFT.")
    return {part: mixin for (part, key), mixin in found.items() if key == name}


def _check_places(mixins: Mapping[str, LoRAMixin], modules: Mapping[str, PeftModule], model: Model) -> None:
    """Refuse what PEFT would have no module for; it must not be lost in silence."""
    known = {(place.part, place.projection.address) for module in modules.values() for place in module.places}
    for key, mixin in mixins.items():
        for projection in projections_of(plain_models(model)[key]):
            if mixin.change_at(projection) is not None and (key, projection.address) not in known:
                raise CheckpointError(
                    f"'{projection.module}' has no module in this family's Hugging Face model, so PEFT cannot "
                    "represent its LoRA: save_pretrained keeps it."
                )


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
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
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
