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


def losses_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
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
    assert torch.isfinite(loss)
    loss.backward()
    assert set(metrics) == {"accuracy"}


def test_a_span_is_not_seen_before_it_is_predicted(tmp_path: Path) -> None:
    batch = batch_of("blank_infilling", tmp_path, ObjectiveOptions(infilling_long=1.0))
    model = tiny_model("llama", vocab_size=VOCABULARY)
    loss = float(STEPS["blank_infilling"](batch, model)[0])
    row, prefix = 0, int(batch["prefix_lengths"][0])
    length = int(batch["padding_mask"][0].sum())
    last = batch["input_ids"].clone()
    last[row, length - 1] = FIRST + (last[row, length - 1] - FIRST + 1) % 40
    only = torch.full_like(batch["targets"], -100)
    only[row, : length - 1] = batch["targets"][row, : length - 1]
    before = STEPS["blank_infilling"]({**batch, "targets": only}, model)[0]
    after = STEPS["blank_infilling"]({**batch, "targets": only, "input_ids": last}, model)[0]
    assert float(before) == pytest.approx(float(after), abs=1e-5)
    first = batch["input_ids"].clone()
    first[row, prefix - 2] = FIRST + (first[row, prefix - 2] - FIRST + 1) % 40
    assert float(STEPS["blank_infilling"]({**batch, "input_ids": first}, model)[0]) != pytest.approx(loss, abs=1e-5)


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
