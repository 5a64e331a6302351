"""Freezing by name where parameters are shared, and the table of what trains."""

from torch import nn

import swissarmy as sat
from swissarmy.backbone.parameters import trainable_summary
from swissarmy.testing import tiny_model


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
