"""DeiT: two first tokens, one classifier or two, and what varies in ViT."""

from typing import Any

from transformers import DeiTConfig

from tests.parity.cases.vit import image_case
from tests.parity.reference import Case


def case(
    name: str,
    *other_sizes: tuple[int, int],
    architecture: str = "DeiTForImageClassificationWithTeacher",
    **changes: Any,
) -> Case:
    return image_case(DeiTConfig, architecture, name, other_sizes, 2, changes)


CASES = [
    case("plain, larger, smaller and oblong images", (24, 24), (8, 8), (12, 20), (8, 32)),
    case("no bias for queries, keys and values, large epsilon", qkv_bias=False, layer_norm_eps=1e-2),
    case("oblong images and patches, one channel", image_size=[12, 16], patch_size=[4, 2], num_channels=1),
    case("three heads, five labels", (20, 16), num_attention_heads=3, num_labels=5, hidden_act="silu"),
    case("classification", (12, 12), architecture="DeiTForImageClassification", num_labels=3),
    case("base", (20, 24), architecture="DeiTModel"),
    case("other pooler", architecture="DeiTModel", pooler_output_size=20, pooler_act="gelu"),
]
