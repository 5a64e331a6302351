"""What ViT and the image models that followed it share: their configuration, the build, and the weight map."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel
from swissarmy.core.errors import nearest
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import WeightMap, joined, reshaped, same, unsqueezed
from swissarmy.mixins.heads import ClassificationHeadMixin, PoolerMixin
from swissarmy.mixins.patch_embedding import InterpolatedPositionsMixin, PatchEmbeddingMixin, interpolate
from swissarmy.models._family import FamilyConfig, with_parts
from swissarmy.nn.activations import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class VisionConfig(FamilyConfig):
    """`config.json` of an image encoder; sizes are of a square, or (height, width)."""

    ignored = frozenset({"encoder_stride"})
    first_tokens: ClassVar[tuple[str, ...]]
    """What their checkpoints call the tokens in front of the patches."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"

    @property
    def grid(self) -> tuple[int, int]:
        """How many rows and columns of patches an image has."""
        return grid_of(self.image_size, self.patch_size)

    def problems(self) -> Iterator[str]:
        """Sizes that are no (height, width), or images that are no whole number of patches."""
        yield from super().problems()
        sizes = {name: getattr(self, name) for name in ("image_size", "patch_size")}
        wrong = {name: size for name, size in sizes.items() if len(_pair(size)) != 2 or min(_pair(size)) < 1}
        for name, size in wrong.items():
            yield f"{name}={size} must be a positive number, or a height and a width"
        if not wrong and any(a % b for a, b in zip(*map(_pair, sizes.values()), strict=True)):
            yield f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}"
        if self.pooler_act not in ACTIVATIONS:
            yield f"pooler_act='{self.pooler_act}' is unknown.{nearest(self.pooler_act, ACTIVATIONS)}"


def grid_of(image_size: int | tuple[int, ...], patch_size: int | tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of patches."""
    (height, width), (rows, columns) = _pair(image_size), _pair(patch_size)
    return height // rows, width // columns


def build(config: VisionConfig) -> BaseModel:
    """A backbone that sees everything at once, patches, positions, and the head of the architecture."""
    first, (rows, columns) = len(config.first_tokens), config.grid
    height, width = _pair(config.patch_size)
    backbone = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=0,
        max_sequence_length=first + rows * columns,
        activation=config.hidden_act,
        query_key_value_bias=config.qkv_bias,
        norm_epsilon=config.layer_norm_eps,
        causal=False,
        embedding_dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        hidden_dropout=config.hidden_dropout_prob,
        initializer_range=config.initializer_range,
        scale_residual_init=False,
    )
    mixins = {
        "patches": PatchEmbeddingMixin(
            config.hidden_size, (height, width), channels=config.num_channels, num_first_tokens=first
        ),
        "positions": InterpolatedPositionsMixin(config.hidden_size, config.grid, num_first_tokens=first),
        "head": _head(config),
    }
    return with_parts(backbone, mixins)


def _head(config: VisionConfig) -> BaseMixin:
    match config.architecture.partition("For")[2]:
        case "ImageClassification":
            return ClassificationHeadMixin(config.hidden_size, config.num_labels)
        case "ImageClassificationWithTeacher":
            return ClassificationHeadMixin(config.hidden_size, config.num_labels, pooling="first_two")
        case _:
            return PoolerMixin(config.hidden_size, activation=config.pooler_act, output_size=config.pooler_output_size)


def weights(config: VisionConfig) -> WeightMap:
    """Their first tokens are tensors of their own; their positions are one, the first tokens' in front."""
    prefix = f"{config.model_type}."
    base = prefix if "For" in config.architecture else ""
    theirs, ours = f"{base}encoder.layer.{{i}}", "transformer.layers.{i}"
    embeddings, positions = f"{base}embeddings", "mixins.positions"
    rows, columns = config.grid
    table = joined(
        f"{embeddings}.position_embeddings",
        (f"{positions}.first", f"{positions}.table"),
        sizes=(len(config.first_tokens), rows * columns),
    )
    classifier = "cls_classifier" if config.architecture.endswith("WithTeacher") else "classifier"
    return WeightMap(
        prefix=prefix,
        modules={
            f"{theirs}.{stored}": f"{base}layers.{{i}}.{running}"
            for stored, running in {
                "attention.attention.query": "attention.q_proj",
                "attention.attention.key": "attention.k_proj",
                "attention.attention.value": "attention.v_proj",
                "attention.output.dense": "attention.o_proj",
                "intermediate.dense": "mlp.fc1",
                "output.dense": "mlp.fc2",
                "layernorm_before": "layernorm_before",
                "layernorm_after": "layernorm_after",
            }.items()
        },
        rules=(
            *(
                reshaped(
                    f"{embeddings}.{token}",
                    f"mixins.patches.first_tokens.{index}",
                    theirs_shape=(1, 1, -1),
                    ours_shape=(-1,),
                )
                for index, token in enumerate(config.first_tokens)
            ),
            same(f"{embeddings}.patch_embeddings.projection.{{p}}", "mixins.patches.projection.{p}"),
            replace(unsqueezed(table), fit=_stretch(config)),
            same(f"{theirs}.layernorm_before.{{p}}", f"{ours}.attention_residual.input_norm.{{p}}"),
            *(
                same(f"{theirs}.attention.attention.{name}.{{p}}", f"{ours}.attention.{name}.{{p}}")
                for name in ("query", "key", "value")
            ),
            same(f"{theirs}.attention.output.dense.{{p}}", f"{ours}.attention.output.{{p}}"),
            same(f"{theirs}.layernorm_after.{{p}}", f"{ours}.mlp_residual.input_norm.{{p}}"),
            same(f"{theirs}.intermediate.dense.{{p}}", f"{ours}.mlp.up.{{p}}"),
            same(f"{theirs}.output.dense.{{p}}", f"{ours}.mlp.down.{{p}}"),
            same(f"{base}layernorm.{{p}}", "transformer.final_norm.{p}"),
            same(f"{base}pooler.dense.{{p}}", "mixins.head.dense.{p}"),
            same(f"{classifier}.{{p}}", "mixins.head.classifier.{p}"),
            same("distillation_classifier.{p}", "mixins.head.second.{p}"),
        ),
        ignored=(f"{embeddings}.mask_token", f"{base}pooler.dense.{{p}}"),
    )


def _stretch(config: VisionConfig) -> Callable[[Tensor, Mapping[str, Any]], Tensor]:
    """Positions `[1, first tokens + patches, h]` of a checkpoint for images of another size, on this grid."""
    first = len(config.first_tokens)

    def fit(tensor: Tensor, stored: Mapping[str, Any]) -> Tensor:
        sizes = (stored.get(name, getattr(VisionConfig, name)) for name in ("image_size", "patch_size"))
        rows, columns = grid_of(*sizes)
        if tensor.dim() != 3 or tensor.shape[1] != first + rows * columns:
            return tensor
        table = interpolate(tensor[0, first:], (rows, columns), config.grid)
        return torch.cat((tensor[0, :first], table))[None]

    return fit


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)
