"""Packing does not leak: a document in a packed row gives the logits that it gives alone, in every family.

A packed batch comes with `document_ids` and `position_ids` that restart; whoever calls the model makes the mask,
`natural mask & Documents(document_ids)`, and adds `model.first_position` (RoBERTa's positions begin at 2). Distances
between tokens of one document are what they were, so relative biases and windows need nothing more.
"""

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import BaseModel
from swissarmy.data.loading.collate import PackedCollator
from swissarmy.data.samples.encoders import TokensEncoder
from swissarmy.data.samples.examples import Examples
from swissarmy.data.samples.packing import Packed
from swissarmy.testing import TINY_CONFIGS, tiny_model
from swissarmy.testing.contract import mixed
from tests.contracts.rows import ROWS, singles
from tests.data.tiny_data import Records

VISION = {"vit", "deit"}
"""There is no text to pack: a picture is a row of its own."""
ENCODER_DECODERS = {"t5"}
FAMILIES = sorted(set(TINY_CONFIGS) - VISION - ENCODER_DECODERS)
PROMPTS = ("P-tuning", "prompt tuning")
"""A prompt that reads all documents is an error: tests/mixins/test_prompt_tuning.py."""
PAIRS = [
    (family, row)
    for family, row in singles()
    if family in FAMILIES and not (row in PROMPTS and family in ("bert", "roberta"))
]

LENGTHS = [7, 3, 12, 5, 2, 9, 1]
ROW = 14


def packed_batch() -> dict[str, Tensor]:
    """Three rows of documents, of which one is not full."""
    generator = torch.Generator().manual_seed(0)
    records = [{"input_ids": torch.randint(3, 61, (length,), generator=generator).tolist()} for length in LENGTHS]
    rows = list(Packed(Examples(Records(records), TokensEncoder()), ROW))
    batch = PackedCollator(length=ROW, pad_id=0)(rows)
    assert len(rows) < len(LENGTHS)
    assert (batch["document_ids"] == -1).any()
    return batch


def natural(model: BaseModel) -> sat.Mask:
    return sat.Causal() if model.config.causal else sat.Full()


def packed_logits(model: BaseModel, batch: dict[str, Tensor], mask: sat.Mask) -> Tensor:
    logits: Tensor = model(batch["input_ids"], batch["position_ids"] + model.first_position, mask)[0]
    return logits


def assert_alone_is_the_same(model: BaseModel, batch: dict[str, Tensor], logits: Tensor) -> None:
    for row, numbers in enumerate(batch["document_ids"]):
        for number in range(int(numbers.max()) + 1):
            here = numbers == number
            alone: Tensor = model(batch["input_ids"][row, here][None])[0][0]
            torch.testing.assert_close(logits[row, here], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_in_a_row_is_what_it_is_alone(family: str) -> None:
    model, batch = tiny_model(family).double(), packed_batch()
    mask = natural(model) & sat.Documents(batch["document_ids"])
    assert_alone_is_the_same(model, batch, packed_logits(model, batch, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_mask_it_would_leak(family: str) -> None:
    model, batch = tiny_model(family).double(), packed_batch()
    with pytest.raises(AssertionError):
        assert_alone_is_the_same(model, batch, packed_logits(model, batch, natural(model)))


@pytest.mark.parametrize(("family", "row"), PAIRS)
def test_no_mixin_makes_it_leak(family: str, row: str) -> None:
    model, batch = mixed(family, [ROWS[row]])[0], packed_batch()
    assert isinstance(model, BaseModel)
    mask = natural(model) & sat.Documents(batch["document_ids"])
    assert_alone_is_the_same(model, batch, packed_logits(model, batch, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_in_one_document_changes_no_other(family: str) -> None:
    model, batch = tiny_model(family).double(), packed_batch()
    mask = natural(model) & sat.Documents(batch["document_ids"])
    changed = batch["document_ids"] == 0
    other = {**batch, "input_ids": torch.where(changed, (batch["input_ids"] + 1) % 61, batch["input_ids"])}
    before, after = packed_logits(model, batch, mask), packed_logits(model, other, mask)
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("family", sorted(ENCODER_DECODERS))
def test_pairs_of_packed_sequences_do_not_leak_through_either_attention(family: str) -> None:
    model = tiny_model(family).double()
    generator = torch.Generator().manual_seed(0)
    pairs = [
        tuple(torch.randint(3, 61, (1, length), generator=generator) for length in lengths)
        for lengths in ((7, 3), (4, 5), (1, 2))
    ]
    sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    source_ids, target_ids = (
        torch.cat([torch.full_like(row, number) for number, row in enumerate(rows)], dim=1)
        for rows in (sources, targets)
    )
    together = model(
        torch.cat(sources, dim=1),
        decoder_input_ids=torch.cat(targets, dim=1),
        attention_mask=sat.Full() & sat.Documents(source_ids),
        decoder_attention_mask=sat.Causal() & sat.Documents(target_ids),
        cross_attention_mask=sat.Dense((target_ids[:, :, None] == source_ids[:, None, :])[:, None]),
    )[0]
    alone = torch.cat([model(source, decoder_input_ids=target)[0] for source, target in pairs], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
