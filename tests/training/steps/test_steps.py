"""The stock forward steps: what they count, and that padding and packing change nothing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.data.loading.collate import CausalCollator, PackedCollator, Padding
from swissarmy.testing import tiny_inputs, tiny_model
from swissarmy.training.steps import STEPS
from swissarmy.training.steps.labels import classification_step, image_classification_step, known_labels
from swissarmy.training.steps.tokens import blank_infilling_step, causal_lm_step, masked_lm_step, seq2seq_step

LENGTHS = (7, 3, 5)


def samples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 61, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "loss_mask": [False] + [True] * (len(row) - 1)} for row in rows]


def by_hand(model: Model) -> Tensor:
    """The sum of the losses of all next tokens, a row at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples():
        ids = torch.tensor([sample["input_ids"]])
        total = total + F.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:], reduction="sum")
    return total


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "swissarmy"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_next_tokens_are_counted_once_whatever_the_padding(family: str, side: Any) -> None:
    model = tiny_model(family).double()
    batch = CausalCollator(padding=Padding(pad_id=0, side=side))(samples())
    loss, count, metrics = causal_lm_step(batch, model)
    torch.testing.assert_close(loss, by_hand(model))
    assert int(count) == sum(LENGTHS) - len(LENGTHS)
    assert int(metrics["accuracy"][1]) == int(count)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_packed_documents_are_what_each_is_alone(family: str) -> None:
    model = tiny_model(family).double()
    row = {
        "input_ids": [value for each in samples() for value in each["input_ids"]],
        "loss_mask": [value for each in samples() for value in each["loss_mask"]],
        "document_ids": [number for number, length in enumerate(LENGTHS) for _ in range(length)],
        "position_ids": [place for length in LENGTHS for place in range(length)],
    }
    loss, count, _ = causal_lm_step(PackedCollator(length=18, pad_id=0)([row]), model)
    torch.testing.assert_close(loss, by_hand(model))
    assert int(count) == sum(LENGTHS) - len(LENGTHS)


def test_a_label_that_the_head_has_no_score_for_is_refused() -> None:
    model = tiny_model("gpt2")
    model.add_mixin("head", sat.ClassificationHeadMixin.for_model(model, num_labels=3))
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": torch.tensor([2, 3])}
    with pytest.raises(sat.HookCallError, match="there is a label 3, and the model has 3 classes, from 0 on"):
        classification_step(batch, model)
    assert known_labels(classification_step, model) == known_labels(image_classification_step, model) == 3
    assert known_labels(lambda batch, model: classification_step(batch, model), model) is None
    assert known_labels(classification_step, tiny_model("bert")) is None


def test_without_a_loss_mask_all_that_is_real_is_scored() -> None:
    model = tiny_model("gpt2").double()
    batch = CausalCollator(padding=Padding(pad_id=0))(samples())
    del batch["loss_mask"]
    torch.testing.assert_close(causal_lm_step(batch, model)[0], by_hand(model))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_hidden_tokens_are_predicted_from_both_sides(family: str) -> None:
    model = tiny_model(family).double()
    ids = tiny_inputs(model)["input_ids"]
    targets = torch.full_like(ids, -100)
    targets[:, 2:4] = ids[:, 2:4]
    hidden = ids.masked_fill(targets >= 0, 4)
    types = {"token_type_ids": torch.zeros_like(ids)}  # RoBERTa has none, and is not given them
    loss, count, metrics = masked_lm_step({"input_ids": hidden, "targets": targets, **types}, model)
    logits = model(hidden)[0]
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[:, 2:4].flatten(0, 1), ids[:, 2:4].flatten(), reduction="sum")
    )
    assert int(count) == 4
    assert int(metrics["accuracy"][0]) == int((logits.argmax(-1) == targets).sum())


def test_a_target_is_predicted_from_a_source() -> None:
    model = tiny_model("t5").double()
    inputs = tiny_inputs(model)
    labels = torch.randint(3, 61, inputs["decoder_input_ids"].shape)
    labels[0, 5:] = -100
    loss, count, _ = seq2seq_step({**inputs, "labels": labels}, model)
    logits = model(**inputs)[0]
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    assert int(count) == int((labels >= 0).sum())


def test_spans_see_the_text_that_they_were_cut_from() -> None:
    model = tiny_model("gpt2").double()
    ids = tiny_inputs(model)["input_ids"]
    targets, prefix = torch.full_like(ids, -100), torch.tensor([4, 6])
    targets[:, 6:8] = ids[:, 7:9]
    loss, count, _ = blank_infilling_step({"input_ids": ids, "targets": targets, "prefix_lengths": prefix}, model)
    logits = model(ids, attention_mask=sat.PrefixLM(prefix))[0]
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[:, 6:8].flatten(0, 1), ids[:, 7:9].flatten(), reduction="sum")
    )
    assert int(count) == 4


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_pictures_are_classified(family: str) -> None:
    model = tiny_model(family).double()
    pixels, labels = tiny_inputs(model)["pixel_values"].double(), torch.tensor([3, -100])
    loss, count, metrics = image_classification_step({"pixel_values": pixels, "labels": labels}, model)
    scores = model(pixel_values=pixels)[0]
    torch.testing.assert_close(loss, F.cross_entropy(scores[:1], labels[:1], reduction="sum"))
    assert int(count) == 1
    assert int(metrics["accuracy"][0]) == int(scores[0].argmax() == 3)


def test_texts_are_classified_and_rated() -> None:
    model = tiny_model("bert", architectures=["BertForSequenceClassification"], num_labels=3).double()
    batch = {"input_ids": tiny_inputs(model)["input_ids"], "labels": torch.tensor([2, 0])}
    scores = model(batch["input_ids"])[0]
    torch.testing.assert_close(
        classification_step(batch, model)[0], F.cross_entropy(scores, batch["labels"], reduction="sum")
    )
    model = tiny_model("bert", architectures=["BertForSequenceClassification"], num_labels=1).double()
    ratings = torch.tensor([0.5, 2.0])
    loss, count, _ = classification_step({**batch, "labels": ratings}, model)
    torch.testing.assert_close(loss, (model(batch["input_ids"])[0][:, 0] - ratings).square().sum())
    assert int(count) == 2


def test_a_batch_or_a_head_that_does_not_fit_is_named() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(sat.HookCallError, match="needs a batch with targets or labels; this one has input_ids"):
        masked_lm_step(tiny_inputs(model), model)
    with pytest.raises(sat.HookCallError, match=r"gives \[2, 9, 61\] for labels \[2\]"):
        classification_step({**tiny_inputs(model), "labels": torch.tensor([0, 1])}, model)


def test_every_objective_has_a_step() -> None:
    assert set(STEPS) == {
        "causal_lm", "masked_lm", "seq2seq", "span_corruption", "blank_infilling", "classification",
        "image_classification",
    }  # fmt: skip
