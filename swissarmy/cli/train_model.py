"""The model of `sat train`: loaded or new, with the mixins that were asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import swissarmy.api
from swissarmy.backbone.model import Model
from swissarmy.cli.train_options import TrainOptions
from swissarmy.core.errors import ConfigError, SwissArmyError, nearest
from swissarmy.core.mixin import BaseMixin
from swissarmy.interop.json_object import read_json_object
from swissarmy.interop.load import load, open_checkpoint, overridden, stored_dtype
from swissarmy.models._family import build_model
from swissarmy.training.parallel.materialize import Weights, outline_checkpoint
from swissarmy.training.parallel.new_weights import outline


class FoundModel(NamedTuple):
    """A model to train."""

    model: Model
    weights: Weights | None
    """What fills it, where it is on the meta device."""


def find_model(options: TrainOptions) -> FoundModel:
    """The model of the options; on the meta device where its weights are new, or shared by processes.

    Raises:
        CheckpointError: It cannot be loaded.
        ConfigError: The configuration, or a mixin, is not understood.
    """

    def extend(model: Model) -> None:
        add_mixins(model, options.wanted_mixins)

    dtype = _dtype(options)
    if options.model is None:
        model, new = outline(builder(options), options.seed)
        return FoundModel(model.to(dtype), new)
    changes: dict[str, Any] = {"dtype": dtype, "allow_missing": options.allow_missing, "overrides": options.overrides}
    if options.shard * options.sharing_size > 1:
        return FoundModel(*outline_checkpoint(options.model, seed=options.seed, extend=extend, **changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = load(options.model, quantize=options.quantize, **changes)
        extend(model)
    return FoundModel(model, None)


def builder(options: TrainOptions) -> Callable[[], Model]:
    """What makes the model, with its mixins, without looking at weights.

    Raises:
        ConfigError: The file of the configuration cannot be read.
    """
    if options.model is None:
        assert options.model_config is not None, "the options refuse neither of the two"
        values, where = _read_json(options.model_config), str(options.model_config)
    else:
        values, _, where = open_checkpoint(options.model)

    def build() -> Model:
        model = build_model(overridden(values, options.overrides), where=where)
        add_mixins(model, options.wanted_mixins)
        return model

    return build


def planner(options: TrainOptions) -> Callable[[], Model]:
    """As `builder`, in the precision that the model will be held in.

    Raises:
        CheckpointError: There is no such checkpoint.
        ConfigError: As `builder`.
    """
    build, dtype = builder(options), _dtype(options)
    if dtype is None and options.model is not None:
        _, source, _ = open_checkpoint(options.model)
        dtype = stored_dtype(source)
    return lambda: build().to(dtype)


def add_mixins(model: Model, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Add mixins of the library by the names of their classes.

    Raises:
        ConfigError: There is no such mixin, or it has no such options.
    """
    for name, each in wanted.items():
        options = {key: value for key, value in each.items() if key != "type"}
        kind = _mixin_class(name, str(each.get("type", "")))
        try:
            model.add_mixin(name, kind.for_model(model, **options))
        except (SwissArmyError, TypeError) as error:
            raise ConfigError(f"mixins.{name} ({kind.__name__}): {error}") from error


def _dtype(options: TrainOptions) -> torch.dtype | None:
    return None if options.dtype is None else getattr(torch, options.dtype)


def _mixin_class(name: str, wanted: str) -> type[BaseMixin]:
    kinds = {
        public: thing
        for public in swissarmy.api.__all__
        if isinstance(thing := getattr(swissarmy.api, public), type) and issubclass(thing, BaseMixin)
    }
    kind = kinds.get(wanted) or kinds.get(f"{wanted}Mixin")
    if kind is None:
        near = nearest(wanted, kinds) or f" There are: {', '.join(kinds)}."
        raise ConfigError(f"mixins.{name}: the library has no mixin of type '{wanted}'.{near}")
    return kind


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except OSError as error:
        raise ConfigError(f"cannot read the model's configuration {path}: {error.strerror or error}.") from error
