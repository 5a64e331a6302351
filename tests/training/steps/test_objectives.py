"""Objectives and steps together: from a file to a loss of exactly what was hidden, on models of each kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.data.build import build_loaders
from swissarmy.data.config import DataConfig
from swissarmy.data.objectives.collator import objective_collator
from swissarmy.data.objectives.options import Objective, ObjectiveOptions
from swissarmy.testing import tiny_model
from swissarmy.training.steps import STEPS
from swissarmy.training.steps.inputs import model_inputs
from tests.data.objectives.tiny_vocabularies import FIRST, sentences, text

TOKENIZER = sentences()
VOCABULARY = FIRST + 40


def batch_of(objective: Objective, folder: Path, options: ObjectiveOptions | None = None, **settings: Any) -> Any:
    path = folder / "texts.jsonl"
    rows = [{"input_ids": text(10 + 3 * number, number).tolist()} for number in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(train_data=(str(path),), **settings)
    collate = objective_collator(objective, config, TOKENIZER, options)
    train = build_loaders(config, TOKENIZER, global_batch_size=4, num_steps=1, collate=collate).train
    return next(iter(train or ()))


def loss_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    """Of the tokens that were hidden alone."""
    scored = targets != -100
    return -logits.log_softmax(-1)[scored].gather(1, targets[scored][:, None]).sum()


CASES: list[tuple[Objective, str, dict[str, Any]]] = [
    ("masked_lm", "bert", {}),
    ("masked_lm", "roberta", {}),
    ("masked_lm", "bert", {"packing": True, "sequence_length": 40}),
    ("span_corruption", "t5", {}),
    ("blank_infilling", "llama", {"sequence_length": 40}),
]


@pytest.mark.parametrize(("objective", "family", "settings"), CASES)
def test_the_loss_is_of_what_was_hidden(
    objective: Objective, family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    batch = batch_of(objective, tmp_path, **settings)
    model = tiny_model(family, vocab_size=VOCABULARY)
    targets = batch["labels" if objective == "span_corruption" else "targets"]
    loss, count, metrics = STEPS[objective](batch, model)  # type: ignore[misc]
    assert int(count) == int((targets != -100).sum()) > 0
    logits = model(**model_inputs(batch, model))[0]
    torch.testing.assert_close(loss, loss_by_hand(logits, targets))
    assert set(metrics) == {"accuracy"}


@torch.no_grad()
def test_a_span_is_not_seen_before_it_is_predicted_and_the_text_before_it_is(tmp_path: Path) -> None:
    batch = batch_of("blank_infilling", tmp_path, ObjectiveOptions(infilling_long=1.0))
    model = tiny_model("llama", vocab_size=VOCABULARY)
    prefix, length = int(batch["prefix_lengths"][0]), int(batch["padding_mask"][0].sum())

    def loss(changed: int, targets: Tensor) -> float:
        ids = batch["input_ids"].clone()
        ids[0, changed] = FIRST + (ids[0, changed] - FIRST + 1) % 40
        return float(STEPS["blank_infilling"]({**batch, "input_ids": ids, "targets": targets}, model)[0])

    places = torch.arange(batch["targets"].shape[1])
    before_last = torch.where((places < length - 1) & (places >= prefix), batch["targets"], -100)[:1]
    targets = torch.cat([before_last, torch.full_like(batch["targets"][1:], -100)])
    last, unchanged = (
        loss(length - 1, targets),
        float(STEPS["blank_infilling"]({**batch, "targets": targets}, model)[0]),
    )
    assert last == pytest.approx(unchanged, abs=1e-5)
    assert loss(prefix - 2, targets) != pytest.approx(unchanged, abs=1e-2)
    context = targets.clone().fill_(-100)
    context[0, 0] = FIRST
    seen = float(STEPS["blank_infilling"]({**batch, "targets": context}, model)[0])
    assert loss(prefix - 2, context) != pytest.approx(seen, abs=1e-4), "the first token sees the whole context"
    assert loss(prefix + 1, context) == pytest.approx(seen, abs=1e-5)


class BlockPositions(BaseMixin):
    """GLM's second position, as a user writes it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(64, hidden_size)

    @non_conflict
    def position_embedding_forward(
        self, position_ids: Tensor, *, old_impl: Hook, block_position_ids: Tensor, **kw_args: Any
    ) -> Any:
        return old_impl(position_ids, **kw_args) + self.table(block_position_ids)


def test_block_positions_reach_a_mixin_that_reads_them(tmp_path: Path) -> None:
    batch = batch_of("blank_infilling", tmp_path, ObjectiveOptions(infilling_block_positions=True))
    model: Model = tiny_model("gpt2", vocab_size=VOCABULARY)
    model.add_mixin("block", BlockPositions(32))
    loss, *_ = STEPS["blank_infilling"](batch, model)
    loss.backward()
    table = model.get_mixin("block").get_parameter("table.weight")
    used = set(batch["block_position_ids"].flatten().tolist())
    assert table.grad is not None
    assert set(table.grad.abs().sum(dim=1).nonzero().flatten().tolist()) == used
