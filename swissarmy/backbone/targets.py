"""Methods with a change of their own for each of some projections: which ones, and where the changes live."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar, cast, final

from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.merging import MergeableMixin
from swissarmy.backbone.projections import (
    Projection,
    check_patterns,
    matches,
    matching,
    projections_for,
    projections_of,
)
from swissarmy.core.config import Config
from swissarmy.core.errors import ConfigError
from swissarmy.core.mixin import MixinHost


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(Config):
    """Options of a mixin that changes some projections."""

    pattern_fields: ClassVar[tuple[str, ...]] = ()
    """The fields beside `targets` that hold patterns, alone or as the keys of a dict: of what is chosen to change."""

    targets: tuple[str, ...] = ("query", "value")
    """Patterns of projections (`swissarmy.backbone.projections`): `attention.*`, `mlp.*`, `experts.*.up`."""
    layers: tuple[int, ...] | None = None
    """The layers to change; all when `None`."""

    def problems(self) -> Iterator[str]:
        """No targets."""
        if not self.targets:
            yield "targets is empty: nothing would change"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From options as people write them: one pattern as a string, layers as a range."""
        values = {key: list(value) if isinstance(value, range) else value for key, value in options.items()}
        for name in ("targets", *cls.pattern_fields):
            if isinstance(values.get(name), str):
                values[name] = (values[name],)
        return cls.from_dict(values)

    def selects(self, projection: Projection) -> bool:
        """Whether a projection is to be changed."""
        in_layer = self.layers is None or projection.layer_id in self.layers
        return in_layer and any(matches(projection.address, pattern) for pattern in self.targets)

    def within(self, projections: Sequence[Projection]) -> Self:
        """The same for one part of a model: no braces, and nothing that is in other parts only."""

        def kept(value: Any, addresses: Sequence[str]) -> Any:
            found = matching(value or (), addresses)
            if isinstance(value, dict):
                return {single: value[pattern] for single, pattern in found.items()}
            return None if value is None else tuple(found)

        chosen = self._chosen(projections)
        there = {projection.layer_id for projection in projections}
        return self.replace(
            targets=kept(self.targets, [projection.address for projection in projections]),
            layers=None if self.layers is None else tuple(layer for layer in self.layers if layer in there),
            **{name: kept(getattr(self, name), chosen) for name in self.pattern_fields},
        )

    def check_found(self, projections: Sequence[Projection]) -> None:
        """Refuse patterns and layers that are nowhere in a model, and patterns that choose among others than targets.

        Raises:
            ConfigError: Naming the pattern or the layer.
        """
        check_patterns(self.targets, [projection.address for projection in projections], field="targets")
        unknown = {*(self.layers or ())} - {projection.layer_id for projection in projections}
        if unknown:
            raise ConfigError(f"layers: there is no layer {min(unknown)}.")
        chosen = self._chosen(projections)
        if not chosen:
            raise ConfigError(f"targets={self.targets} are in none of the layers {self.layers}.")
        for name in self.pattern_fields:
            check_patterns(getattr(self, name) or (), chosen, field=name, among=" that `targets` and `layers` choose")

    def _chosen(self, projections: Sequence[Projection]) -> list[str]:
        """The addresses of the projections to be changed."""
        return [projection.address for projection in projections if self.selects(projection)]


@final
class LayerChanges(nn.ModuleDict):
    """The changes of one layer's projections, by name, with `_` for each dot."""

    def forward(self, key: str, *arguments: Any) -> Tensor:
        """What the change of one projection gives."""
        changed: Tensor = self[key](*arguments)
        return changed


Change = TypeVar("Change", bound=nn.Module)
"""What a method does to one projection."""


class TargetedMixin(MergeableMixin, ABC, Generic[Change]):
    """A mixin with a change for each projection that its configuration selects, in `layers[i]`."""

    config_type: ClassVar[type[TargetsConfig]]
    """The class of its options."""
    config: TargetsConfig

    def __init__(self, projections: Sequence[Projection], config: TargetsConfig) -> None:
        """Make a change for each of a model's projections that the configuration selects."""
        super().__init__()
        self.config = config
        num_layers = max(projection.layer_id for projection in projections) + 1
        self.layers = nn.ModuleList(LayerChanges() for _ in range(num_layers))
        for projection in filter(config.selects, projections):
            self._changes(projection.layer_id)[module_name(projection.name)] = self.make_change(projection)

    @abstractmethod
    def make_change(self, projection: Projection) -> Change:
        """The change of one projection, at its start."""

    @classmethod
    def for_model(cls, model: MixinHost, **options: Any) -> Any:
        """The mixin for a model's projections, those of its experts included; for a model of parts, one for each.

        Args:
            model: The model.
            **options: The fields of the mixin's configuration.

        Returns:
            A mixin, or for a model of several parts a dict from part name to mixin; `add_mixin` takes both.

        Raises:
            ConfigError: Options that are none, or a pattern that matches no projection.
        """
        config = cls.config_type.of(options)
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
        projections, own = projections_for(config), cls.config_type.of(options)
        own.check_found(projections)
        return cls(projections, own.within(projections))

    @property
    def saved_options(self) -> dict[str, Any]:
        """The fields of its configuration."""
        return self.config.to_dict()

    def change_at(self, projection: Projection) -> Change | None:
        """The change of a projection, if it has one."""
        return cast("Change | None", self._changes(projection.layer_id)._modules.get(module_name(projection.name)))

    def changed(self, layer_id: int, name: str, projected: Tensor, *arguments: Any) -> Tensor:
        """What a projection's change makes of its result and more; the result itself where there is no change."""
        layer, key = self._changes(layer_id), module_name(name)
        if key not in layer:
            return projected
        changed: Tensor = layer(key, projected, *arguments)
        return changed

    def _changes(self, layer_id: int) -> LayerChanges:
        layer = self.layers[layer_id]
        assert isinstance(layer, LayerChanges)
        return layer


def module_name(name: str) -> str:
    """A projection's name as a module's, which has no dots."""
    return name.replace(".", "_")
