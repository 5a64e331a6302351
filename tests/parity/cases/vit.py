"""ViT: image and patch sizes, square or not, channels, biases, activation, epsilon; images of other sizes; heads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, ViTConfig

from tests.parity.reference import Case, Inputs

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 16,
    "patch_size": 4,
}


def images(*other_sizes: tuple[int, int], first_tokens: int) -> Callable[[Any], list[Inputs]]:
    """Calls on images of the configured size, with some tokens hidden, and on images of other sizes."""

    def inputs(config: Any) -> list[Inputs]:
        generator = torch.Generator().manual_seed(1)
        (height, width), (rows, columns) = (
            (size, size) if isinstance(size, int) else size for size in (config.image_size, config.patch_size)
        )

        def image(height: int, width: int) -> torch.Tensor:
            return torch.randn(2, config.num_channels, height, width, generator=generator)

        plain = {"pixel_values": image(height, width)}
        tokens = first_tokens + (height // rows) * (width // columns)
        seen = torch.rand(2, tokens, generator=generator) < 0.7
        calls = [
            Inputs("plain", plain, plain),
            Inputs("hidden tokens", {**plain, "attention_mask": seen.long()}, {**plain, "padding_mask": seen}),
        ]
        for size in other_sizes:
            other = {"pixel_values": image(*size)}
            calls.append(Inputs(f"image of {size}", {**other, "interpolate_pos_encoding": True}, other))
        return calls

    return inputs


def image_case(
    config_class: type[PretrainedConfig],
    architecture: str,
    name: str,
    other_sizes: Sequence[tuple[int, int]],
    first_tokens: int,
    changes: dict[str, Any],
) -> Case:
    """A tiny image encoder in which no parameter is zero."""

    def make() -> PreTrainedModel:
        model: PreTrainedModel = getattr(transformers, architecture)(config_class(**SIZES | changes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model

    return Case(f"{architecture}: {name}", make, images(*other_sizes, first_tokens=first_tokens), normed=False)


def case(
    name: str, *other_sizes: tuple[int, int], architecture: str = "ViTForImageClassification", **changes: Any
) -> Case:
    return image_case(ViTConfig, architecture, name, other_sizes, 1, changes)


CASES = [
    case("plain, larger, smaller and oblong images", (24, 24), (8, 8), (12, 20), (8, 32)),
    case("no bias for queries, keys and values, large epsilon", (20, 16), qkv_bias=False, layer_norm_eps=1e-2),
    case("oblong images", image_size=[12, 20]),
    case("oblong images and patches", image_size=[12, 16], patch_size=[4, 2]),
    case("one channel, relu, patches of 3", (3, 21), num_channels=1, hidden_act="relu", image_size=9, patch_size=3),
    case("two heads of 18, five labels", hidden_size=36, num_attention_heads=2, num_labels=5),
    case("one patch", (8, 12), image_size=4, hidden_act="gelu_new"),
    case("base", (20, 24), architecture="ViTModel"),
    case("other pooler", architecture="ViTModel", pooler_output_size=20, pooler_act="relu"),
]
