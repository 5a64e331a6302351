"""The step of distillation: its terms by hand, exact sums, and a student that learns."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swissarmy as sat
from swissarmy.testing import tiny_inputs, tiny_model
from swissarmy.training.steps.distillation import distillation_step
from tests.helpers import tiny_model as tiny_backbone


def pair_of(**options: Any) -> sat.DistillationModel:
    teacher = tiny_backbone(seed=1, num_layers=4, hidden_size=24)
    return sat.DistillationModel(teacher, tiny_backbone(), **{"layers": "even", **options})


def lm_batch(batch: int = 3, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scored = torch.rand(batch, length, generator=generator) < 0.6
    return {"input_ids": torch.randint(0, 13, (batch, length), generator=generator), "loss_mask": scored}


# What it computes


def test_its_terms_are_those_of_the_papers() -> None:
    model, batch = pair_of(), lm_batch()
    loss, count, metrics = distillation_step(
        batch, model, temperature=3.0, label_share=0.25, hidden_weight=0.5, hidden_loss="mse"
    )
    result = model(batch["input_ids"])
    soft = hard = hidden = torch.zeros(())
    places = [(row, place) for row in range(3) for place in range(1, 6) if batch["loss_mask"][row, place]]
    for row, place in places:
        ours, theirs = result.logits[row, place - 1], result.teacher_logits[row, place - 1]
        p, q = (theirs / 3).softmax(-1), (ours / 3).softmax(-1)
        soft = soft + 9 * (p * (p / q).log()).sum()
        hard = hard - ours.log_softmax(-1)[batch["input_ids"][row, place]]
        hidden = hidden + sum((a - b)[row, place - 1].square().mean() for a, b in result.hidden_states) / 2
    assert count == len(places)
    torch.testing.assert_close(loss, 0.75 * soft + 0.25 * hard + 0.5 * hidden)
    expected = {"soft_loss": soft, "label_loss": hard, "hidden_loss": hidden}
    for name, term in expected.items():
        torch.testing.assert_close(metrics[name], (term.detach(), count))


def test_hidden_states_can_be_compared_by_direction() -> None:
    model, batch = pair_of(), lm_batch()
    _, count, metrics = distillation_step(batch, model, hidden_loss="cosine")
    here = batch["loss_mask"][:, 1:]
    pairs = model(batch["input_ids"]).hidden_states
    expected = sum((1 - F.cosine_similarity(a, b, dim=-1))[:, :-1][here].sum() for a, b in pairs) / 2
    torch.testing.assert_close(metrics["hidden_loss"], (expected.detach(), count))


def test_a_student_that_is_its_teacher_has_only_labels_to_learn_from() -> None:
    model = sat.DistillationModel(tiny_backbone(), tiny_backbone(), layers="even")
    loss, count, metrics = distillation_step(lm_batch(), model)
    for name in ("soft_loss", "hidden_loss"):
        torch.testing.assert_close(metrics[name][0], torch.zeros((), dtype=torch.float64))
    assert metrics["agreement"] == (torch.tensor(count), count)
    torch.testing.assert_close(loss, 0.5 * metrics["label_loss"][0])


def test_without_pairs_of_layers_there_is_no_hidden_loss() -> None:
    model = pair_of(layers=None)
    loss, count, metrics = distillation_step(lm_batch(), model, label_share=0.0)
    assert metrics["hidden_loss"] == (torch.zeros(()), count)
    torch.testing.assert_close(loss, metrics["soft_loss"][0])


def test_rows_are_scored_by_their_labels_and_hidden_states_by_their_real_tokens() -> None:
    teacher, student = tiny_backbone(seed=1, causal=False), tiny_backbone(causal=False)
    for model in (teacher, student):
        model.add_mixin("head", sat.ClassificationHeadMixin.for_model(model, num_labels=3, pooling="first").double())
    model = sat.DistillationModel(teacher, student, layers={1: 1})
    batch = {"input_ids": lm_batch()["input_ids"], "labels": torch.tensor([2, -100, 0])}
    batch["padding_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1] * 6])
    _, _, metrics = distillation_step(batch, model)
    result = model(batch["input_ids"], padding_mask=batch["padding_mask"])
    ((ours, theirs),) = result.hidden_states
    distance = (ours - theirs).square().mean(-1)
    torch.testing.assert_close(metrics["hidden_loss"], ((distance[0, :4].mean() + distance[2].mean()).detach(), 2))
    hard = F.cross_entropy(result.logits, batch["labels"], reduction="sum")
    torch.testing.assert_close(metrics["label_loss"], (hard.detach(), 2))


@pytest.mark.parametrize("family", ["t5", "bert", "vit"])
def test_it_serves_encoder_decoders_encoders_and_images(family: str) -> None:
    model = sat.DistillationModel(tiny_model(family, seed=1), tiny_model(family), layers="even")
    inputs = tiny_inputs(model.student)
    logits = model.student(**inputs)[0]
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(0))
    loss, count, _ = distillation_step({**inputs, "labels": labels}, model)
    assert count == labels.numel()
    loss.backward()
    assert all(each.grad is None for each in model.teacher.parameters())
    assert all(each.grad is not None for name, each in model.named_parameters() if each.requires_grad), family


# Exact sums


def test_the_sum_over_a_batch_is_the_sum_over_its_rows() -> None:
    model, batch = pair_of(), lm_batch()
    loss, count, metrics = distillation_step(batch, model)
    rows = [distillation_step({key: each[i : i + 1] for key, each in batch.items()}, model) for i in range(3)]
    torch.testing.assert_close(sum(row[0] for row in rows), loss)
    assert sum(row[1] for row in rows) == count
    for name, (term, _) in metrics.items():
        torch.testing.assert_close(sum(row[2][name][0] for row in rows), term)


def test_packed_documents_do_not_see_each_other() -> None:
    model, batch = pair_of(), lm_batch(batch=2, length=4)
    batch["loss_mask"][:, 0] = False
    packed = {key: each.view(1, 8) for key, each in batch.items()}
    packed["document_ids"] = torch.tensor([[0] * 4 + [1] * 4])
    packed["sample_ids"] = torch.tensor([5])
    for together, apart in zip(distillation_step(packed, model)[:2], distillation_step(batch, model)[:2], strict=True):
        torch.testing.assert_close(together, apart)


def test_nothing_scored_is_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    model, batch = pair_of(), lm_batch()
    batch["loss_mask"][:] = False
    loss, count, _ = distillation_step(batch, model)
    assert (loss.item(), count) == (0.0, 0)
    loss.backward()
    assert not any(each.grad.any() for each in model.parameters() if each.grad is not None)


# Learning


def test_a_student_comes_closer_to_its_teacher() -> None:
    torch.manual_seed(0)
    model, batch = pair_of().train(), lm_batch(batch=4)
    before = {name: each.clone() for name, each in model.teacher.state_dict().items()}
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.01)
    history = []
    for _ in range(12):
        loss, count, metrics = distillation_step(batch, model, label_share=0.0)
        history.append({name: float(term) / count for name, (term, _) in metrics.items()})
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    assert history[-1]["soft_loss"] < 0.7 * history[0]["soft_loss"]
    assert history[-1]["hidden_loss"] < 0.9 * history[0]["hidden_loss"]
    assert all(torch.equal(each, before[name]) for name, each in model.teacher.state_dict().items())


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"label_share": 1.5}, "label_share=1.5 must be from 0 to 1"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 must not be negative"),
        ({"hidden_loss": "l1"}, "hidden_loss='l1' is neither 'mse' nor 'cosine'"),
    ],
)
def test_weights_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        partial(distillation_step, **options)(lm_batch(), pair_of())


def test_a_batch_that_says_not_what_is_scored_is_refused() -> None:
    ids = lm_batch()["input_ids"]
    with pytest.raises(sat.HookCallError, match="labels or targets or loss_mask; this one has input_ids"):
        distillation_step({"input_ids": ids}, pair_of())
    with pytest.raises(sat.HookCallError, match=r"labels are \[3\], and there are logits \[3, 6, 13\]"):
        distillation_step({"input_ids": ids, "labels": torch.zeros(3, dtype=torch.int64)}, pair_of())


def test_positions_count_from_where_the_model_wants_them() -> None:
    model = sat.DistillationModel(tiny_model("roberta", seed=1), tiny_model("roberta"))
    inputs = tiny_inputs(model.student)
    batch = {**inputs, "labels": inputs["input_ids"].clone()}
    counted = {**batch, "position_ids": torch.arange(9).expand(2, -1)}
    torch.testing.assert_close(distillation_step(counted, model)[0], distillation_step(batch, model)[0])


def test_targets_of_hidden_tokens_are_labels_by_another_name() -> None:
    model = sat.DistillationModel(tiny_model("bert", seed=1), tiny_model("bert"))
    inputs = tiny_inputs(model.student)
    labels = inputs["input_ids"].masked_fill(torch.arange(9) % 3 > 0, -100)
    loss, count, _ = distillation_step({**inputs, "targets": labels}, model)
    assert count == 6
    assert torch.equal(loss, distillation_step({**inputs, "labels": labels}, model)[0])
