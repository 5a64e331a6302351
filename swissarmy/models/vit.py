"""ViT (Dosovitskiy et al. 2021): an image as a sequence of patches, after a class token."""

from dataclasses import dataclass
from typing import ClassVar, final

from swissarmy.models._family import Family, Preset
from swissarmy.models._vision import VisionConfig, build, weights


@final
@dataclass(frozen=True, kw_only=True)
class ViTConfig(VisionConfig):
    """`config.json` of ViT."""

    first_tokens: ClassVar = ("cls_token",)


FAMILY = Family(
    config=ViTConfig,
    architectures=("ViTForImageClassification", "ViTModel"),
    build=build,
    weights=weights,
    presets={
        "vit-base-patch16-224": Preset(config={"num_labels": 1000}, parameters=86_567_656),
        "vit-large-patch16-224": Preset(
            config={
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
                "num_labels": 1000,
            },
            parameters=304_326_632,
        ),
    },
)
