"""IA3, VeRA and BEFT (our BitFit) between PEFT's form and ours: vectors for modules.

Where one of PEFT's modules holds several of our projections (GPT-2's `c_attn`), a vector of its output is split into
theirs, and joined again; one of its input, or VeRA's d, belongs to all of them alike.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.backbone.projections import Projection, plain_models, projections_of
from swissarmy.backbone.targets import TargetedMixin
from swissarmy.core.errors import CheckpointError
from swissarmy.interop.peft_config import PeftIA3Config, PeftTargetsConfig, PeftVeRAConfig
from swissarmy.interop.peft_modules import PeftModule, Place, compact, peft_modules
from swissarmy.interop.peft_tensors import BASE, Layout, raise_for, read_modules, shape_problems
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.mixins.bitfit import BitFitConfig, BitFitMixin
from swissarmy.mixins.ia3 import IA3Config, IA3Mixin
from swissarmy.mixins.vera import VeRAConfig, VeRAMixin

VERA_SHARED = ("base_model.vera_A", "base_model.vera_B")
M = TypeVar("M", bound=TargetedMixin[Any])
Vectors = dict[str, dict[str, dict[str, Tensor]]]
"""What belongs to our projections: by part, address, and the parameter's name."""


def read_ia3(model: Model, values: Mapping[str, Any], source: SafetensorsSource, where: str) -> dict[str, IA3Mixin]:
    """The mixin for each part that the adapter changes.

    Raises:
        CheckpointError: A tensor has no place, is missing or does not fit, or a field is not supported.
    """
    config = PeftIA3Config.read(values, where=where)
    modules = peft_modules(model)

    def shapes(module: PeftModule, path: str) -> dict[str, tuple[int, ...]]:
        of_input = config.stretches_input(path)
        return {"scale": (1, module.in_features) if of_input else (module.out_features, 1)}

    layout = Layout({"ia3_l": "scale"}, frozenset({"scale"}), shapes, config.targets)
    vectors: Vectors = {}
    inputs: dict[str, set[str]] = {}
    for found in read_modules(model, modules, source, layout):
        for place, rows in zip(found.module.places, found.module.rows, strict=True):
            scale = found.tensors["scale"].flatten()
            of_input = config.stretches_input(found.path)
            vectors.setdefault(place.part, {})[place.projection.address] = {"scale": scale if of_input else scale[rows]}
            if of_input:
                inputs.setdefault(place.part, set()).add(place.projection.address)
    mixins = {}
    for part, own in vectors.items():
        projections = projections_of(plain_models(model)[part])
        ours = IA3Config(targets=compact(own, projections), inputs=compact(inputs.get(part, set()), projections))
        mixins[part] = _filled(IA3Mixin(projections, ours), projections, own)
    return mixins


def write_ia3(model: Model, mixins: Mapping[str, IA3Mixin]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `adapter_config.json` says, and the tensors.

    Raises:
        CheckpointError: Projections that are one for PEFT are stretched in ways that one vector cannot.
    """
    tensors, inputs = {}, []
    for path, module in _changed(model, mixins).items():
        changes = [change and change.scale.detach() for change in _changes(module, mixins)]
        of_input = {_stretches_input(mixins, place) for place in module.places if _has_change(mixins, place)}
        if of_input == {True}:
            inputs.append(path)
            tensors[f"{BASE}{path}.ia3_l"] = _same(changes, path)[None]
        elif of_input == {False}:
            tensors[f"{BASE}{path}.ia3_l"] = _joined(module, changes, 1.0)[:, None]
        else:
            raise CheckpointError(f"'{path}' is one module for PEFT: stretch its input or its outputs, not both.")
    paths = [name.removeprefix(BASE).removesuffix(".ia3_l") for name in tensors]
    return {**_targets(model, paths), "feedforward_modules": sorted(inputs)}, tensors


def read_bias(model: Model, values: Mapping[str, Any], source: SafetensorsSource, where: str) -> dict[str, BitFitMixin]:
    """The mixin for each part that the adapter changes; errors as in `read_ia3`."""
    config = PeftTargetsConfig.read(values, where=where)
    modules = peft_modules(model)
    layout = Layout(
        {"beft_bias": "bias"}, frozenset({"bias"}), lambda module, _: {"bias": (1, module.out_features)}, config.targets
    )
    vectors: Vectors = {}
    for found in read_modules(model, modules, source, layout):
        for place, rows in zip(found.module.places, found.module.rows, strict=True):
            bias = found.tensors["bias"].flatten()[rows]
            vectors.setdefault(place.part, {})[place.projection.address] = {"bias": bias}
    mixins = {}
    for part, own in vectors.items():
        projections = projections_of(plain_models(model)[part])
        ours = BitFitConfig(targets=compact(own, projections))
        mixins[part] = _filled(BitFitMixin(projections, ours), projections, own)
    return mixins


def write_bias(model: Model, mixins: Mapping[str, BitFitMixin]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `adapter_config.json` says, and the tensors."""
    changed = _changed(model, mixins)
    conv = sorted(path for path, module in changed.items() if module.is_transposed)
    if conv:
        raise CheckpointError(f"'{conv[0]}' is a Conv1D, and PEFT has BEFT for Linear only.")
    tensors = {}
    for path, module in changed.items():
        biases = [change and change.bias.detach() for change in _changes(module, mixins)]
        tensors[f"{BASE}{path}.beft_bias"] = _joined(module, biases, 0.0)[None]
    return {"target_modules": sorted(changed)}, tensors


def read_vera(model: Model, values: Mapping[str, Any], source: SafetensorsSource, where: str) -> dict[str, VeRAMixin]:
    """The mixin for each part that the adapter changes; errors as in `read_ia3`."""
    config = PeftVeRAConfig.read(values, where=where)
    modules = peft_modules(model)
    layout = Layout(
        {"vera_lambda_b": "b", "vera_lambda_d": "d"},
        frozenset({"b", "d"}),
        lambda module, _: {"b": (module.out_features,), "d": (config.r,)},
        config.targets,
        shared=VERA_SHARED,
    )
    stored = read_modules(model, modules, source, layout)
    a, b = _matrices(model, [found.module for found in stored], config, source)
    vectors: Vectors = {}
    first_rows: dict[str, dict[str, int]] = {}
    for found in stored:
        for place, rows in zip(found.module.places, found.module.rows, strict=True):
            address = place.projection.address
            vectors.setdefault(place.part, {})[address] = {"d": found.tensors["d"], "b": found.tensors["b"][rows]}
            if start := _first_row(rows, found.module.path):
                first_rows.setdefault(place.part, {})[address] = start
    mixins = {}
    for part, own in vectors.items():
        projections = projections_of(plain_models(model)[part])
        ours = VeRAConfig(
            r=config.r,
            targets=compact(own, projections),
            seed=config.projection_prng_key,
            d_initial=config.d_initial,
            dropout=config.vera_dropout,
            first_rows=first_rows.get(part, {}),
        )
        mixin = _filled(VeRAMixin(projections, ours), projections, own)
        mixin.A, mixin.B = a[:, : mixin.A.shape[1]].clone(), b[: len(mixin.B)].clone()
        mixins[part] = mixin
    return mixins


def write_vera(model: Model, mixins: Mapping[str, VeRAMixin]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `adapter_config.json` says, and the tensors.

    Raises:
        CheckpointError: Parts have random matrices of their own, projections that are one for PEFT have several d, or
            use other rows of B than PEFT would.
    """
    changed = _changed(model, mixins)
    a = _widest([mixin.A for mixin in mixins.values()], dim=1)
    b = _widest([mixin.B for mixin in mixins.values()], dim=0)
    b = torch.cat((b, b.new_zeros(max(0, max(each.out_features for each in changed.values()) - len(b)), b.shape[1])))
    tensors = dict(zip(VERA_SHARED, (a, b), strict=True))
    for path, module in changed.items():
        changes = _changes(module, mixins)
        for change, rows in zip(changes, module.rows, strict=True):
            if change is not None and change.rows.start != (start := _first_row(rows, path)):
                raise CheckpointError(
                    f"'{path}' is one module for PEFT, in which a projection begins at row {start} of B, and here at "
                    f"{change.rows.start}: make the mixin with first_rows."
                )
        tensors[f"{BASE}{path}.vera_lambda_b"] = _joined(module, [each and each.b.detach() for each in changes], 0.0)
        tensors[f"{BASE}{path}.vera_lambda_d"] = _same([each.d.detach() for each in changes if each], path)
    config = next(iter(mixins.values())).config
    own = {
        "r": config.r,
        "projection_prng_key": config.seed,
        "save_projection": True,
        "vera_dropout": config.dropout,
        "d_initial": config.d_initial,
        "bias": "none",
    }
    return {**own, **_targets(model, list(changed))}, tensors


def _matrices(
    model: Model, modules: list[PeftModule], config: PeftVeRAConfig, source: SafetensorsSource
) -> tuple[Tensor, Tensor]:
    """A and B, from the file or from the key that they were made from."""
    sizes = max(module.in_features for module in modules), max(module.out_features for module in modules)
    shapes = dict(zip(VERA_SHARED, ((config.r, sizes[0]), (sizes[1], config.r)), strict=True))
    if not config.save_projection:
        raise_for([f"unexpected: {name}" for name in VERA_SHARED if name in source.names()], model, source)
        a, b = VeRAMixin.matrices(config.r, *sizes, seed=config.projection_prng_key)
        return a, b
    raise_for([f"missing: {name}" for name in VERA_SHARED if name not in source.names()], model, source)
    raise_for([line for name, shape in shapes.items() for line in shape_problems(name, shape, source)], model, source)
    return source.read(VERA_SHARED[0]), source.read(VERA_SHARED[1])


def _first_row(rows: Tensor, path: str) -> int:
    first = int(rows[0])
    if not torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device)):
        raise CheckpointError(f"'{path}' keeps the rows of our projections in another order: VeRA cannot follow.")
    return first


def _filled(mixin: M, projections: list[Projection], vectors: Mapping[str, Mapping[str, Tensor]]) -> M:
    """The mixin with what was read, in its precision."""
    for projection in projections:
        change = mixin.change_at(projection)
        if change is not None:
            own = vectors[projection.address]
            change.to(next(iter(own.values())).dtype)
            with torch.no_grad():
                for name, tensor in own.items():
                    change.get_parameter(name).copy_(tensor)
    return mixin


def _changes(module: PeftModule, mixins: Mapping[str, Any]) -> list[Any]:
    """The change of each of our projections in a module, `None` where there is none."""
    return [mixins[place.part].change_at(place.projection) if place.part in mixins else None for place in module.places]


def _has_change(mixins: Mapping[str, TargetedMixin[Any]], place: Place) -> bool:
    return place.part in mixins and mixins[place.part].change_at(place.projection) is not None


def _stretches_input(mixins: Mapping[str, IA3Mixin], place: Place) -> bool:
    return mixins[place.part].config.stretches_input(place.projection)


def _changed(model: Model, mixins: Mapping[str, TargetedMixin[Any]]) -> dict[str, PeftModule]:
    """The modules in which something is changed."""
    modules = peft_modules(model).items()
    return {path: module for path, module in modules if any(_has_change(mixins, place) for place in module.places)}


def _targets(model: Model, paths: list[str]) -> dict[str, Any]:
    modules = peft_modules(model)
    return {
        "target_modules": sorted(paths),
        "fan_in_fan_out": all(modules[path].is_transposed for path in paths),
    }


def _joined(module: PeftModule, vectors: list[Tensor | None], default: float) -> Tensor:
    """Vectors of our projections' outputs as one of the module's."""
    some = next(vector for vector in vectors if vector is not None)
    joined = some.new_full((module.out_features,), default)
    for vector, rows in zip(vectors, module.rows, strict=True):
        if vector is not None:
            joined[rows.to(joined.device)] = vector
    return joined


def _same(vectors: list[Tensor | None], path: str) -> Tensor:
    """The one vector that all of a module's projections have."""
    first = vectors[0]
    if first is None or not all(vector is not None and torch.equal(vector, first) for vector in vectors):
        raise CheckpointError(
            f"'{path}' is one module for PEFT, and has one vector where its projections have several."
        )
    return first


def _widest(matrices: list[Tensor], *, dim: int) -> Tensor:
    """The matrix that all others are the beginning of."""
    widest = max(matrices, key=lambda matrix: matrix.shape[dim])
    for matrix in matrices:
        if not torch.equal(matrix, widest.narrow(dim, 0, matrix.shape[dim])):
            raise CheckpointError("the parts of the model have VeRA matrices of their own, and PEFT has one for all.")
    return widest
