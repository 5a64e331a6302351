"""`load`: any supported checkpoint into a model, strictly, one tensor at a time.

The model is built on the meta device, every name and shape is compared before anything is read, and then the tensors
stream in: nothing is silently missing, unexpected, or left at a random value.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.model import Model
from swissarmy.core.errors import CheckpointError, ConfigError
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import Entry, WeightMap
from swissarmy.interop.gguf import GGUFSource
from swissarmy.interop.hub import resolve
from swissarmy.interop.json_object import read_json_object
from swissarmy.interop.matching import allowed, assign, report
from swissarmy.interop.mixin_folder import FOLDER as MIXINS_FOLDER
from swissarmy.interop.mixin_folder import StoredMixins, add_mixins
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.interop.tensor_source import TensorSource
from swissarmy.mixins.reduced_weights import check_kind, reduce_weights
from swissarmy.models._family import build_model
from swissarmy.nn.norms import RMSNorm
from swissarmy.nn.reduced_linear import Kind

PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.jinja", "*.model", "mixins/*")
_OF_THE_OLDER_SAT = ("latest", "mp_rank_*", "*.pt")


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: Kind | None = None,
    mixins: Mapping[str, BaseMixin] | None = None,
    allow_missing: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Model:
    """Load a model, ready for use (in evaluation mode).

    Args:
        path: A Hugging Face folder, the name of a model on the hub, or a `.gguf` file.
        dtype: The precision of the parameters; as stored when omitted (float32 for GGUF).
        device: Where they go.
        quantize: `"fp16"`, `"int8"` or `"int4"`: hold the projections, the word embedding and the head in so many bits,
            for inference or for training mixins on top. The model cannot be saved then.
        mixins: Mixins to add, by name; their weights are read too where the folder has them.
        allow_missing: Patterns of parameters that the checkpoint may lack, by its names or the model's
            (`"classifier.*"`, `"mixins.head.*"`); they start anew.
        overrides: Fields of the configuration to change before building (`{"num_labels": 3}`).

    Raises:
        CheckpointError: No such checkpoint, or tensors that are missing, unexpected or of another shape.
        ConfigError: A configuration that is not understood.
    """
    _check_options(dtype, device, mixins, allow_missing)
    kind = None if quantize is None else check_kind(quantize)
    values, source, where = open_checkpoint(path, dtype)
    with torch.device("meta"):
        model = build_model(overridden(values, overrides or {}), where=where)
    plan = make_plan(model, source, allow_missing=allow_missing, stored=values)
    check_duplicates(model, plan, source)
    for name, tensor in read_tensors(plan, source, dtype):
        assign(model, name, tensor.to(device=torch.device(device), dtype=dtype or tensor.dtype))
    stored_dtype = next((p.dtype for p in model.parameters() if p.device.type != "meta"), torch.float32)
    for name in plan.missing:
        _start_anew(model, name, torch.device(device), dtype or stored_dtype)
    stored_mixins = StoredMixins.open(Path(where).parent)
    add_mixins(model, mixins or {}, stored_mixins, without=model.source.own_names, allow_missing=allow_missing)
    if kind is not None:
        reduce_weights(model, kind)
    return model.eval()


def _check_options(dtype: object, device: object, mixins: object, allow_missing: object) -> None:
    """Refuse what would fail late or, worse, do something else."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r} is no precision of weights: give torch.float32, torch.bfloat16, ...")
    if isinstance(allow_missing, str):
        raise ConfigError(f"allow_missing={allow_missing!r} is one string: give a list of patterns.")
    if mixins is not None and not isinstance(mixins, Mapping):
        raise ConfigError(f"mixins is a {type(mixins).__name__}; it is a dict from names to mixins.")
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={device!r} is no device: give 'cpu', 'cuda' or 'cuda:1'.") from None


def overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the caller's changes; names of labels do not survive another number of labels."""
    stale = {"id2label", "label2id"} if "num_labels" in overrides else set()
    return {**{key: value for key, value in values.items() if key not in stale}, **overrides}


class AutoModel:
    """The names that users of `transformers` know."""

    @staticmethod
    def from_pretrained(path: str | Path, **options: Any) -> Model:
        """The same as `load`."""
        return load(path, **options)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Model:
        """A model with new weights from what a `config.json` would hold; `model_type` names the family."""
        return build_model(config)


@final
@dataclass(frozen=True)
class Plan:
    """Which tensor goes where, after everything was compared."""

    entries: tuple[Entry, ...]
    names: Mapping[str, str]
    """What the checkpoint calls the tensor of an entry."""
    missing: tuple[str, ...]
    """Our parameters that it lacks, and may."""
    stored: Mapping[str, Any]
    """Its own `config.json`, before any override."""


def make_plan(
    model: Model, source: TensorSource, *, allow_missing: Sequence[str] = (), stored: Mapping[str, Any] | None = None
) -> Plan:
    """Compare names and shapes of a checkpoint with a model's, without reading any tensor.

    Raises:
        CheckpointError: Everything that does not fit, in one report.
    """
    stored = model.source.values if stored is None else stored
    weight_map: WeightMap = model.source.family.weights(model.source.config)
    parameters = dict(model.named_parameters())
    entries = {entry.theirs: entry for entry in weight_map.entries(parameters)}
    names, problems = _canonical_names(weight_map, entries, source)
    names |= {own: names[copy] for copy, own in weight_map.duplicates.items() if copy in names and own not in names}
    names |= {own: names[copy] for copy, own in weight_map.copies.items() if copy in names and own not in names}
    names |= {own: names[other] for own, other in weight_map.fallbacks.items() if other in names and own not in names}
    lacking = [entry for theirs, entry in entries.items() if theirs not in names]
    missing = tuple(
        name
        for entry in lacking
        for name in entry.ours
        if allowed(name, allow_missing) or allowed(entry.theirs, allow_missing)
    )
    absent = [entry.theirs for entry in lacking if not set(entry.ours) <= {*missing}]
    problems += report("missing", absent, names)
    extra = [
        name
        for name in names
        if name not in {**entries, **weight_map.duplicates, **weight_map.copies} and not weight_map.is_ignored(name)
    ]
    problems += report("unexpected", extra, entries)
    for theirs, entry in entries.items():
        if theirs in names:
            problems += _shape_problems(entry, names[theirs], source, parameters, stored)
    if problems:
        lines = "\n  - ".join([f"{_place(source)} does not fit {type(model).__name__}:", *problems])
        cure = f"\nTo let what is missing start anew, name it: allow_missing=[{absent[0]!r}]" if absent else ""
        raise CheckpointError(f"{lines}{cure}")
    return Plan(tuple(e for e in entries.values() if e.theirs in names), names, missing, stored)


def _canonical_names(
    weight_map: WeightMap, entries: Mapping[str, Entry], source: TensorSource
) -> tuple[dict[str, str], list[str]]:
    """Their names by the rules' spelling of them, and a problem for each two that are the same tensor."""
    names: dict[str, str] = {}
    problems = []
    for name in source.names():
        canonical = weight_map.canonical(name, entries)
        if canonical in names and not weight_map.is_ignored(canonical):
            problems.append(f"unexpected: {name}, beside {names[canonical]}: both are {canonical}.")
        names.setdefault(canonical, name)
    return names, problems


def open_checkpoint(path: str | Path, dtype: torch.dtype | None = None) -> tuple[dict[str, Any], TensorSource, str]:
    """The configuration, the tensors, and the name of the configuration for messages; only headers are read.

    Raises:
        CheckpointError: No such checkpoint, or one that is damaged.
    """
    if str(path).endswith(".gguf"):
        gguf = GGUFSource(path, dtype=dtype or torch.float32)
        return gguf.config, gguf, str(path)
    folder = resolve(path, PATTERNS)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise _no_config(folder)
    return read_json_object(config_file), SafetensorsSource(folder), str(config_file)


def stored_dtype(source: TensorSource) -> torch.dtype:
    """The precision of a checkpoint's weights: of the first that has one."""
    return next(dtype for dtype in map(source.dtype, source.names()) if dtype.is_floating_point)


def _no_config(place: Path) -> CheckpointError:
    """The error for a file, or a folder without `config.json`; adapters and what the older SAT wrote get a hint."""
    names = [place.name] if place.is_file() else sorted(item.name for item in place.iterdir())
    what = f"has no config.json; it holds: {', '.join(names) or 'nothing'}"
    if place.is_file():
        what = "is a file; a checkpoint is a folder with a config.json, or a .gguf file"
    cure = ""
    if any(Path(name).match(pattern) for name in names for pattern in _OF_THE_OLDER_SAT):
        cure = f" It looks like a checkpoint of the older SAT: bring it along with `sat migrate {place} NEW`."
    elif {"adapter_config.json", MIXINS_FOLDER} & set(names):
        cure = " It looks like an adapter: load its base, and add it with sat.load_adapter, or as --adapter."
    return CheckpointError(f"{place} {what}.{cure}")


def read_tensors(plan: Plan, source: TensorSource, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Our parameters by their names, each read when its turn comes; as stored when `dtype` is omitted."""
    for entry in plan.entries:
        whole = source.read(plan.names[entry.theirs])
        if entry.rule.fit is not None:
            whole = entry.rule.fit(whole.to(dtype=dtype or whole.dtype), plan.stored)
        yield from zip(entry.ours, entry.rule.split(whole), strict=True)


def _start_anew(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """A starting value for a parameter that the checkpoint lacks: small for matrices, one for norms, else zero."""
    owner = model.get_submodule(name.rpartition(".")[0])
    fresh = torch.zeros(model.get_parameter(name).shape, device=device, dtype=dtype)
    if fresh.dim() > 1:
        nn.init.normal_(fresh, std=0.02)
    elif isinstance(owner, nn.LayerNorm) and name.endswith("weight"):
        nn.init.ones_(fresh)
    assign(model, name, fresh)
    if isinstance(owner, RMSNorm):
        owner.reset_parameters()


def _shape_problems(
    entry: Entry,
    name: str,
    source: TensorSource,
    parameters: Mapping[str, nn.Parameter],
    stored: Mapping[str, Any],
) -> Iterable[str]:
    want = [parameters[ours].shape for ours in entry.ours]
    whole = entry.rule.join([torch.empty(shape, device="meta") for shape in want]).shape
    have = torch.empty(source.shape(name), device="meta")
    if entry.rule.fit is not None:
        have = entry.rule.fit(have, stored)
    if have.shape != whole:
        yield f"{name}: have {list(source.shape(name))}, want {list(whole)} ({', '.join(entry.ours)})"


def check_duplicates(model: Model, plan: Plan, source: TensorSource) -> None:
    """Refuse tied tensors that were stored twice and differ."""
    weight_map: WeightMap = model.source.family.weights(model.source.config)
    names = plan.names
    for copy, original in weight_map.duplicates.items():
        if (
            copy in names
            and original in names
            and not torch.equal(source.read(names[copy]), source.read(names[original]))
        ):
            raise CheckpointError(
                f"{names[copy]} differs from {names[original]}, and the config ties them (tie_word_embeddings): "
                'load with overrides={"tie_word_embeddings": False} to keep both.'
            )


def _place(source: TensorSource) -> str:
    names = source.names()
    return source.where(names[0]) if names else "the checkpoint"
