"""DeiT (Touvron et al. 2021): ViT with a second first token, which was taught by another network."""

from dataclasses import dataclass
from typing import ClassVar, final

from swissarmy.models._family import Family, Preset
from swissarmy.models._vision import VisionConfig, build, weights


@final
@dataclass(frozen=True, kw_only=True)
class DeiTConfig(VisionConfig):
    """`config.json` of DeiT."""

    first_tokens: ClassVar = ("cls_token", "distillation_token")


FAMILY = Family(
    config=DeiTConfig,
    architectures=("DeiTForImageClassificationWithTeacher", "DeiTForImageClassification", "DeiTModel"),
    build=build,
    weights=weights,
    presets={
        "deit-base-distilled-patch16-224": Preset(config={"num_labels": 1000}, parameters=87_338_192),
        "deit-tiny-distilled-patch16-224": Preset(
            config={"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 1000},
            parameters=5_910_800,
        ),
    },
)
