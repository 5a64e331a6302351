"""Freezing by name where parameters are shared, and the table of what trains."""

import pytest
from torch import nn

import swissarmy as sat
from swissarmy.backbone.parameters import expanded, trainable_summary
from swissarmy.testing import tiny_model
from tests.helpers import tiny_model as tiny_backbone


def live(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_shared_parameter_trains_by_any_of_its_names() -> None:
    model = tiny_model("t5")
    shared = "parts.decoder.transformer.word_embeddings.weight"  # the encoder's, under the decoder's name
    model.freeze_except(shared)
    live = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert live == ["parts.encoder.transformer.word_embeddings.weight"]
    assert model.get_parameter(shared).requires_grad


def test_a_pattern_without_a_part_means_every_part() -> None:
    model = tiny_model("t5")
    model.add_mixin("lora", sat.LoRAMixin.for_model(model))
    model.freeze_except("mixins.lora")
    live = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert live == {"encoder", "decoder"}
    model.freeze_except("parts.decoder.mixins.lora")
    live = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert live == {"decoder"}


def test_the_summary_has_a_row_for_each_mixin_of_each_part_and_its_columns_align() -> None:
    model = tiny_model("t5")
    model.add_mixin("a-mixin-with-a-rather-long-name", sat.LoRAMixin.for_model(model, r=2))
    summary = model.freeze_except("mixins.a-mixin-with-a-rather-long-name").trainable_summary()
    rows = {name: (count, live) for name, count, live in summary.by_module}
    encoder, decoder = (rows[f"parts.{part}.mixins.a-mixin-with-a-rather-long-name"] for part in ("encoder", "decoder"))
    assert encoder == (2 * 2 * 2 * (32 + 32), 2 * 2 * 2 * (32 + 32))  # 2 layers, q and v, A and B of rank 2
    assert decoder == (2 * encoder[0], 2 * encoder[0])  # cross-attention too
    assert summary.trainable == encoder[1] + decoder[1]
    assert summary.total == sum(count for count, _ in rows.values()) == sum(p.numel() for p in model.parameters())
    head, *table = str(summary).splitlines()
    assert (
        head == f"{summary.trainable:,} of {summary.total:,} parameters train ({summary.trainable / summary.total:.2%})"
    )
    assert len({len(line) for line in table}) == 1


def test_a_summary_of_nothing_prints() -> None:

    assert str(trainable_summary(nn.Identity())).startswith("0 of 0 parameters train (0.00%)")


def test_layers_are_named_by_ranges() -> None:
    model = tiny_backbone(num_layers=12)
    model.freeze_except("layers.{8..11}")
    assert {name.split(".")[2] for name in live(model)} == {"8", "9", "10", "11"}
    model.freeze_except("layers.{3,5}.attention", "transformer.layers.{10..11}.{mlp,mlp_residual}", "final_norm")
    assert {tuple(name.split(".")[2:4]) for name in live(model) if "layers" in name} == {
        *((layer, "attention") for layer in ("3", "5")),
        *((layer, part) for layer in ("10", "11") for part in ("mlp", "mlp_residual")),
    }


def test_freeze_takes_away_and_gives_nothing() -> None:
    model = tiny_backbone(num_layers=3)
    everything = live(model)
    model.freeze("word_embeddings", "layers.{0..1}")
    frozen = ("transformer.word_embeddings.", "transformer.layers.0.", "transformer.layers.1.")
    assert live(model) == {name for name in everything if not name.startswith(frozen)} != everything
    model.freeze_except("final_norm").freeze("layers.2")
    assert live(model) == {"transformer.final_norm.weight", "transformer.final_norm.bias"}


def test_freezing_a_shared_parameter_by_any_name_freezes_it_in_every_part() -> None:
    model = tiny_model("t5").freeze("parts.decoder.transformer.word_embeddings")
    assert "parts.encoder.transformer.word_embeddings.weight" not in live(model)
    model = tiny_model("t5").freeze("layers.0.attention")
    frozen = {name for name, _ in model.named_parameters()} - live(model)
    assert {name.split(".")[1] for name in frozen} == {"encoder", "decoder"}


@pytest.mark.parametrize(
    ("pattern", "patterns"),
    [
        ("layers.3", ["layers.3"]),
        ("layers.{8..10}.mlp", ["layers.8.mlp", "layers.9.mlp", "layers.10.mlp"]),
        ("{a,b}.{0..1}", ["a.0", "a.1", "b.0", "b.1"]),
        ("{3..2}", []),
    ],
)
def test_braces_stand_for_several_patterns(pattern: str, patterns: list[str]) -> None:
    assert expanded(pattern) == patterns


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.{0..2}", r"'layers.2', of 'layers.\{0..2\}', matches no parameter. Did you mean 'layers.[01]'"),
        ("layers.{1..0}", "is a range of nothing"),
        ("word_embedding", "Did you mean 'word_embeddings'"),
    ],
)
def test_a_pattern_that_matches_nothing_changes_nothing(pattern: str, message: str) -> None:
    for method in (sat.BaseModel.freeze, sat.BaseModel.freeze_except):
        model = tiny_backbone()
        with pytest.raises(sat.ConfigError, match=message):
            method(model, "final_norm", pattern)
        assert all(parameter.requires_grad for parameter in model.parameters())
