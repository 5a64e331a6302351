"""The plain backbone, as a family: what `BaseModel(config)` is saved as and loaded from."""

from dataclasses import dataclass, field
from typing import Any, final

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel
from swissarmy.core.weight_map import WeightMap, same
from swissarmy.models._family import Family, FamilyConfig


@final
@dataclass(frozen=True, kw_only=True)
class PlainConfig(FamilyConfig):
    """`config.json` of a plain backbone."""

    backbone: dict[str, Any] = field(default_factory=dict)
    """The fields of `TransformerConfig`."""


def build(config: PlainConfig) -> BaseModel:
    """The backbone without any mixin."""
    return BaseModel(TransformerConfig.from_dict(config.backbone))


def weights(config: PlainConfig) -> WeightMap:
    """Every parameter under its own name."""
    return WeightMap(rules=(same("transformer.{rest}", "transformer.{rest}"),))


FAMILY = Family(config=PlainConfig, architectures=("BaseModel",), build=build, weights=weights, presets={})
