"""ViT and DeiT beside parity: published sizes, other image sizes at load, what goes wrong, and training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import BaseModel
from swissarmy.models._family import build_model

TINY = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}


def tiny(**changes: Any) -> BaseModel:
    torch.manual_seed(0)
    model = build_model(TINY | changes).eval()
    assert isinstance(model, BaseModel)
    return model


def image(height: int, width: int, *, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["vit", "deit"])
@pytest.mark.parametrize(
    ("stored", "wanted"), [(16, 24), (16, 8), (16, (12, 20)), ((8, 12), 16), ((8, 12), (12, 8)), ((8, 32), 16)]
)
def test_positions_stretched_at_load_equal_positions_stretched_in_each_call(
    family: str, stored: Any, wanted: Any, tmp_path: Path
) -> None:
    model = tiny(model_type=family, image_size=stored)
    model.save_pretrained(tmp_path / "model")
    stretched = sat.load(tmp_path / "model", overrides={"image_size": wanted})
    height, width = (wanted, wanted) if isinstance(wanted, int) else wanted
    pixels = image(height, width)
    assert stretched.mixins["positions"].table.shape == (height * width // 16, 16)
    torch.testing.assert_close(stretched(pixel_values=pixels)[0], model(pixel_values=pixels)[0], rtol=0, atol=0)
    stretched.save_pretrained(tmp_path / "stretched")
    again = sat.load(tmp_path / "stretched")
    torch.testing.assert_close(again(pixel_values=pixels)[0], model(pixel_values=pixels)[0], rtol=0, atol=0)


def test_positions_of_another_shape_are_refused_unless_the_config_says_where_they_come_from(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    _edit(tmp_path, lambda name, tensor: tensor[:, :-1] if name.endswith("position_embeddings") else tensor)
    for overrides in ({}, {"image_size": 24}):
        with pytest.raises(sat.CheckpointError, match=r"position_embeddings: have \[1, 16, 16\]"):
            sat.load(tmp_path, overrides=overrides)


def test_another_patch_size_at_load_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(sat.CheckpointError, match=r"projection.weight: have \[16, 3, 4, 4\], want \[16, 3, 8, 8\]"):
        sat.load(tmp_path, overrides={"patch_size": 8})


def test_a_pooler_and_a_mask_token_are_no_obstacle_to_a_classifier(tmp_path: Path) -> None:
    base = tiny(architectures=["ViTModel"])
    base.save_pretrained(tmp_path)
    model = sat.load(
        tmp_path,
        overrides={"architectures": ["ViTForImageClassification"], "num_labels": 3},
        allow_missing=["mixins.head.*"],
    )
    pixels = image(16, 16)
    assert model(pixel_values=pixels)[0].shape == (2, 3)
    assert torch.equal(model.transformer.layers[0].mlp.up.weight, base.transformer.layers[0].mlp.up.weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "pixel_values"),
        ({"pixel_values": torch.zeros(3, 16, 16)}, r"pixel_values of shape \[3, 16, 16\]"),
        ({"pixel_values": torch.zeros(1, 1, 16, 16)}, "pixel_values of 1 x 16 x 16: this model takes 3 channels"),
        (
            {"pixel_values": torch.zeros(1, 3, 16, 18)},
            "pixel_values of 3 x 16 x 18: .* divisible by its patch of 4 x 4",
        ),
        ({"pixel_value": torch.zeros(1, 3, 16, 16)}, "Did you mean 'pixel_values'"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long)}, "pixel_values"),
    ],
)
def test_a_wrong_call_names_what_is_wrong(call: Mapping[str, Tensor], message: str) -> None:
    with pytest.raises(sat.HookCallError, match=message):
        tiny()(**call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "image_size=18 is not divisible by patch_size=4"),
        ({"image_size": [16, 16, 16]}, r"image_size=\(16, 16, 16\) must be a positive number, or a height and a width"),
        ({"patch_size": 0}, "patch_size=0 must be"),
        ({"pooler_act": "tahn"}, "pooler_act='tahn' is unknown. Did you mean 'tanh'"),
        ({"hidden_act": "gelus"}, "activation='gelus' is unknown. Did you mean 'gelu'"),
        ({"architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling' is not supported"),
        ({"qkv_biases": False}, "unknown field 'qkv_biases'. Did you mean 'qkv_bias'"),
    ],
)
def test_a_wrong_configuration_names_what_is_wrong(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        tiny(**changes)


def test_positions_without_patches_say_what_is_missing() -> None:
    config = sat.TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=9, max_sequence_length=8
    )
    model = sat.BaseModel(config, {"positions": sat.InterpolatedPositionsMixin(8, (2, 2))})
    with pytest.raises(sat.HookCallError, match="PatchEmbeddingMixin"):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("field", ["embedding_dropout", "attention_dropout", "hidden_dropout", "drop_path"])
def test_dropout_and_drop_path_act_in_training_and_only_there(field: str) -> None:
    config = tiny().config.replace(**{field: 0.5})
    torch.manual_seed(0)
    model = sat.BaseModel(
        config,
        {
            "patches": sat.PatchEmbeddingMixin(16, (4, 4)),
            "positions": sat.InterpolatedPositionsMixin(16, (4, 4)),
            "head": sat.ClassificationHeadMixin(16, 5),
        },
    )
    pixels = image(16, 16, batch=8)
    first, second = (model.train()(pixel_values=pixels)[0] for _ in range(2))
    assert not torch.equal(first, second)
    first.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    first, second = (model.eval()(pixel_values=pixels)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_dropout_of_the_configuration_acts_in_training() -> None:
    model = tiny(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train()
    pixels = image(16, 16)
    assert not torch.equal(model(pixel_values=pixels)[0], model(pixel_values=pixels)[0])


def test_resized_positions_give_what_stretching_in_each_call_gives() -> None:
    model = tiny()
    pixels = image(24, 12)
    expected = model(pixel_values=pixels)[0]
    model.get_mixin("positions").resize((6, 3))
    assert torch.equal(model(pixel_values=pixels)[0], expected)


def test_pixels_of_another_precision_are_converted() -> None:
    model = tiny()
    pixels = image(16, 16)
    assert torch.equal(model(pixel_values=pixels.double())[0], model(pixel_values=pixels)[0])
    assert model.bfloat16()(pixel_values=pixels)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_stretch_in_half_precision_too(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    model = sat.load(tmp_path, dtype=dtype, overrides={"image_size": 24})
    stretched = model.mixins["positions"].table
    assert stretched.dtype == dtype
    per_call = sat.load(tmp_path, dtype=dtype)
    pixels = image(24, 24)
    assert torch.equal(model(pixel_values=pixels)[0], per_call(pixel_values=pixels)[0])


def _edit(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
