"""AdapterFusion (Pfeiffer et al. 2021): attention over several trained adapters, which stay as they are.

Where the adapters sit, each token asks with what the sublayer gave, and each adapter answers with what it would add;
the answers, weighted and projected, are added in place of a single adapter's. The value projection starts as the
identity: equal adapters act as one of them.
Changes: adds to what sublayers give, where the adapters did.
Hooks: `SublayerMixin`'s, one for each sublayer (wraps).
Parameters: `layers.{i}.{sublayer}.query`, `key` and `value`, each `[h, h]`, the query with a bias. The adapters'
tensors are the buffers `adapters.{name}.*`: saved, and never trained.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel, Model
from swissarmy.backbone.projections import plain_models
from swissarmy.backbone.sublayers import Sublayer, SublayerMixin, sublayers_of
from swissarmy.core.errors import ConfigError, HookDefinitionError, nearest
from swissarmy.core.mixin import BaseMixin, MixinHost
from swissarmy.mixins.adapter import AdapterMixin
from swissarmy.mixins.compacter import CompacterMixin
from swissarmy.nn.linear import Linear

KINDS: Mapping[str, type[AdapterMixin | CompacterMixin]] = {
    "AdapterMixin": AdapterMixin,
    "CompacterMixin": CompacterMixin,
}
"""What can be fused, by the name that a saved fusion knows it by."""


@final
class Fusion(nn.Module):
    """Attention over what the adapters of one sublayer add."""

    def __init__(self, hidden_size: int) -> None:
        """Start with nearly equal shares, and values as they are."""
        super().__init__()
        self.query = Linear(hidden_size, hidden_size)
        self.key = Linear(hidden_size, hidden_size, bias=False)  # a bias would move all scores alike
        self.value = Linear(hidden_size, hidden_size, bias=False)
        for projection in (self.query, self.key):
            nn.init.normal_(projection.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        nn.init.eye_(self.value.weight)

    def forward(self, result: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """What is added, `[b, s, h]`, from what the sublayer gave and what each adapter would add to it."""
        answers = torch.stack(tuple(changes), dim=-2)
        # The projections of key and value are taken to the one side that is the same for all adapters.
        question = self.query(result) @ self.key.weight
        shares = (answers @ question[..., None]).softmax(dim=-2)
        fused: Tensor = self.value((shares * answers).sum(dim=-2))
        return fused


@final
class FusionLayer(nn.ModuleDict):
    """The fusions of one layer, by sublayer."""

    def forward(self, sublayer: Sublayer, result: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """What is added at a sublayer, `[b, s, h]`."""
        change: Tensor = self[sublayer](result, changes)
        return change


@final
class AdapterFusionMixin(SublayerMixin):
    """Attention over adapters. `fuse_adapters` makes it of mixins that a model has."""

    def __init__(self, backbone: TransformerConfig, adapters: Mapping[str, AdapterMixin | CompacterMixin]) -> None:
        """Take frozen copies of the adapters, and make a fusion wherever one of them sits.

        Raises:
            ConfigError: There are no adapters, or one is for another number of layers.
        """
        super().__init__()
        if not adapters:
            raise ConfigError("adapters is empty: give the adapters to fuse, by name.")
        for name, adapter in adapters.items():
            if len(adapter.layers) != backbone.num_layers:
                raise ConfigError(
                    f"adapter '{name}' has {len(adapter.layers)} layers and the model {backbone.num_layers}."
                )
        self.adapters = nn.ModuleDict({name: _frozen(adapter) for name, adapter in adapters.items()})
        self.layers = nn.ModuleList(
            FusionLayer({place: Fusion(backbone.hidden_size) for place in places})
            for places in _places(backbone, list(adapters.values()))
        )

    @classmethod
    def for_model(cls, model: MixinHost, **options: Any) -> Any:
        """The mixin for a model; for a model of parts, one for each.

        Args:
            model: The model.
            **options: `adapters`: by name, an adapter, for a model of parts what the adapter's `for_model` gave, or
                `{"class": ..., "options": ...}` for a new one.

        Returns:
            A mixin, or for a model of several parts a dict from part name to mixin; `add_mixin` takes both.

        Raises:
            ConfigError: Adapters that are none.
        """
        if not model.parts:
            return cls.for_config(model.config, **options)
        adapters = options.get("adapters", {})
        return {
            part: cls.for_config(each.config, adapters={name: _of_part(a, part) for name, a in adapters.items()})
            for part, each in model.parts.items()
        }

    @classmethod
    def for_config(cls, config: TransformerConfig, *, adapters: Any = (), **options: Any) -> Self:
        """The mixin for a backbone of these sizes."""
        if not isinstance(adapters, Mapping):
            raise ConfigError("adapters: give the adapters by name, or sat.fuse_adapters(model, names).")
        return cls(config, {name: _adapter(name, each, config) for name, each in adapters.items()}, **options)

    @property
    def saved_options(self) -> dict[str, Any]:
        """The classes and options of the adapters."""
        return {
            "adapters": {
                name: {"class": type(adapter).__name__, "options": adapter.saved_options}
                for name, adapter in self._adapters().items()
            }
        }

    def change(self, sublayer: Sublayer, given: Tensor, result: Tensor, layer_id: int) -> Tensor | None:
        """The weighted and projected sum of what the adapters would add."""
        found = [each.change(sublayer, given, result, layer_id) for each in self._adapters().values()]
        changes = [change for change in found if change is not None]
        if not changes:
            return None
        fused: Tensor = self.layers[layer_id](sublayer, result, changes)
        return fused

    def identity_penalty(self) -> Tensor:
        """The squared distance of all value projections from the identity, for the paper's regularisation."""
        weights = [module.value.weight for module in self.modules() if isinstance(module, Fusion)]
        distances = [(weight - torch.eye(len(weight), device=weight.device)).square().sum() for weight in weights]
        return torch.stack(distances).sum()

    def _adapters(self) -> dict[str, AdapterMixin | CompacterMixin]:
        return dict(self.adapters.items())  # type: ignore[arg-type]


def fuse_adapters(
    model: Model, adapters: Sequence[str], name: str = "adapter-fusion"
) -> dict[str, BaseMixin | dict[str, BaseMixin]]:
    """Put attention over several adapters of a model in their place.

    Args:
        model: The model; in a model of parts, each part's adapters are fused.
        adapters: The names of `AdapterMixin`s or `CompacterMixin`s.
        name: The name of the fusion.

    Returns:
        The adapters that were taken away, by name, as `add_mixin` takes them back.

    Raises:
        HookDefinitionError: There is no such mixin, it is no adapter, or is named twice, or the fusion's name is none;
            nothing was changed.
        HookConflictError: The fusion's name is taken; nothing was changed.
    """
    repeated = [each for index, each in enumerate(adapters) if each in adapters[:index]]
    if repeated:
        raise HookDefinitionError(f"'{repeated[0]}' is named twice: name each adapter once.")
    fused = {part: _adapters_of(plain, adapters) for part, plain in plain_models(model).items()}
    missing = [each for each in adapters if not any(each in found for found in fused.values())]
    if missing or not adapters:
        known = sorted({each for plain in plain_models(model).values() for each in _adapters_of(plain, plain.mixins)})
        wrong = f"'{missing[0]}' is no adapter of this model.{nearest(missing[0], known)}" if missing else "No name."
        raise HookDefinitionError(f"{wrong} Its adapters are: {', '.join(known) or 'none'}.")
    fusions: dict[str, BaseMixin] = {
        part: AdapterFusionMixin(plain_models(model)[part].config, found) for part, found in fused.items() if found
    }
    model.add_mixin(name, fusions if model.parts else fusions[""])
    removed: dict[str, BaseMixin | dict[str, BaseMixin]] = {}
    for each in adapters:
        parts: dict[str, BaseMixin] = {part: found[each] for part, found in fused.items() if each in found}
        removed[each] = parts if model.parts else parts[""]
        for part in parts:
            plain_models(model)[part].del_mixin(each)
    return removed


def _adapters_of(model: BaseModel, names: Any) -> dict[str, AdapterMixin | CompacterMixin]:
    mixins = {name: model.mixins[name] for name in names if name in model.mixins}
    return {name: mixin for name, mixin in mixins.items() if isinstance(mixin, AdapterMixin | CompacterMixin)}


def _adapter(name: str, given: Any, config: TransformerConfig) -> AdapterMixin | CompacterMixin:
    """An adapter as given, or a new one from what a saved fusion says of it."""
    match given:
        case AdapterMixin() | CompacterMixin():
            return given
        case {"class": str(kind), "options": dict(options)} if kind in KINDS:
            return KINDS[kind].for_config(config, **options)
    raise ConfigError(f"adapters: '{name}' is neither an adapter nor the class and the options of one.")


def _of_part(adapter: Any, part: str) -> Any:
    return adapter[part] if isinstance(adapter, Mapping) and part in adapter else adapter


def _places(backbone: TransformerConfig, adapters: Sequence[AdapterMixin | CompacterMixin]) -> list[list[Sublayer]]:
    """The sublayers of each layer where some adapter sits."""
    layers = [[adapter.layers[layer_id]._modules for adapter in adapters] for layer_id in range(backbone.num_layers)]
    return [[place for place in sublayers_of(backbone) if any(place in layer for layer in each)] for each in layers]


def _frozen(adapter: AdapterMixin | CompacterMixin) -> AdapterMixin | CompacterMixin:
    """A copy without dropout, whose parameters are buffers: neither `freeze_except` nor an optimizer finds them."""
    adapter = copy.deepcopy(adapter)
    for module in adapter.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
    return adapter
