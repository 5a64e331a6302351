"""Evaluation: every sample once, in evaluation mode, with the same numbers however it is cut."""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.data.build import build_loaders
from swissarmy.data.config import DataConfig
from swissarmy.data.loading.loader import Loader
from swissarmy.training.evaluate import evaluate, perplexity
from swissarmy.training.steps import STEPS
from swissarmy.training.steps.distillation import distillation_step
from swissarmy.training.window import is_empty
from tests.training.tiny_runs import Diary, model_of, open_rows, run, step


def loader_of(rows: int = 11, batch_size: int = 4) -> Loader:
    config = DataConfig(valid_data=(f"rows:{rows}",), record_format="tokens")
    loaders = build_loaders(config, global_batch_size=batch_size, create_dataset=open_rows)
    assert loaders.valid is not None
    return loaders.valid


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 11, 16])
def test_the_number_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    model = model_of()
    expected, sums = (
        evaluate(model, loader_of(batch_size=5), step),
        evaluate(model, loader_of(batch_size=batch_size), step),
    )
    assert sums.mean_loss == pytest.approx(expected.mean_loss, rel=1e-13)
    assert (sums.count, sums.samples, sums.tokens) == (expected.count, 11, expected.count + 11)
    assert sums.mean_metrics == pytest.approx(expected.mean_metrics)


def test_it_is_the_sum_over_single_samples() -> None:
    model = model_of()
    with torch.no_grad():
        singles = [step(batch, model) for batch in loader_of(batch_size=1)]
    sums = evaluate(model, loader_of(), step)
    assert sums.loss == pytest.approx(sum(float(loss) for loss, *_ in singles), rel=1e-13)
    assert sums.count == sum(int(count) for _, count, _ in singles)


@dataclass
class Batch:
    """What a user may collate to."""

    rows: list[list[int]]


def test_batches_of_any_kind_are_evaluated() -> None:
    def collate(samples: Any) -> Batch:
        return Batch([sample["input_ids"].tolist() for sample in samples])

    config = DataConfig(valid_data=("rows:11",), record_format="tokens")
    loaders = build_loaders(config, global_batch_size=4, create_dataset=open_rows, collate=collate)
    sums = evaluate(model_of(), loaders.valid, lambda batch, model: (torch.tensor(3.0), len(batch.rows)))
    assert (sums.count, sums.loss) == (11, 9)


@pytest.mark.parametrize(
    ("batch", "empty"),
    [
        ([], True),
        ({"input_ids": torch.zeros(0, 4), "sample_ids": torch.zeros(0)}, True),
        ({"edges": torch.zeros(0, 2), "nodes": torch.zeros(3, 2)}, False),
        (Batch([]), False),
        ({"scale": torch.tensor(1.0)}, False),
    ],
)
def test_what_is_empty_has_no_rows(batch: Any, empty: bool) -> None:
    assert is_empty(batch) is empty


def test_so_many_batches_and_no_more() -> None:
    assert evaluate(model_of(), loader_of(), step, max_batches=2).samples == 8


def test_dropout_is_off_inside_and_on_again_afterwards() -> None:
    model = model_of(resid_pdrop=0.5)
    expected = evaluate(model, loader_of(), step).loss
    assert evaluate(model.train(), loader_of(), step).loss == expected
    assert model.training


def test_perplexity_is_of_losses_in_nats_per_token_only() -> None:
    sums = evaluate(model_of(), loader_of(), step)
    assert perplexity(step, sums) == pytest.approx(math.exp(sums.loss / sums.count))
    assert perplexity(partial(step), sums) == perplexity(step, sums)
    assert perplexity(lambda batch, model: step(batch, model), sums) is None
    assert perplexity(partial(distillation_step, temperature=3.0), sums) is None
    assert [name for name, each in STEPS.items() if perplexity(each, sums) is None] == [
        "classification",
        "image_classification",
    ]
    assert perplexity(step, replace(sums, loss=1e6)) == math.inf
    assert math.isnan(perplexity(step, replace(sums, loss=math.nan)) or 0)


def test_an_evaluation_that_nothing_counts_in_has_sums_of_zero() -> None:
    assert (sums := evaluate(model_of(), loader_of(), step, max_batches=0)).count == sums.loss == 0


def test_a_run_evaluates_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    diary, model = Diary(), model_of()
    settings: dict[str, Any] = {"valid_data": ("rows:11",), "test_data": ("rows:5",), "eval_interval": 2}
    result = run(tmp_path / "run", model=model, callbacks=[diary], train_iters=5, **settings)
    places = [f"{each.name} {each.step}" for each in diary.evaluations]
    assert places == ["valid 2", "valid 4", "valid 5", "test 5"]
    expected = evaluate(model, loader_of(11), step)
    assert result.evaluations["valid"].loss == pytest.approx(expected.mean_loss, rel=1e-13)
    assert result.evaluations["valid"].metrics["accuracy"] == pytest.approx(expected.mean_metrics["accuracy"])
    assert result.evaluations["test"].count == evaluate(model, loader_of(5), step).count


def test_without_an_interval_it_evaluates_at_the_end(tmp_path: Path) -> None:
    diary = Diary()
    run(tmp_path / "run", callbacks=[diary], split="80,20,0")
    assert [f"{each.name} {each.step}" for each in diary.evaluations] == ["valid 3"]


def test_a_run_may_evaluate_before_its_first_step(tmp_path: Path) -> None:
    diary, model = Diary(), model_of()
    expected = evaluate(model, loader_of(11), step).mean_loss
    settings: dict[str, Any] = {"valid_data": ("rows:11",), "eval_on_start": True}
    run(tmp_path / "run", model=model, callbacks=[diary], **settings, save_interval=1, train_iters=2)
    assert [f"{each.name} {each.step}" for each in diary.evaluations] == ["valid 0", "valid 2"]
    assert diary.evaluations[0].loss == pytest.approx(expected, rel=1e-13)
    resumed = Diary()
    run(tmp_path / "run", callbacks=[resumed], **settings, save_interval=1, train_iters=3, resume="auto")
    assert [each.step for each in resumed.evaluations] == [3]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [0, 2, 3]


AVERAGES: list[dict[str, Any]] = [{}, {"ema_decay": 0.9}, {"optimizer": "schedule_free"}]


@pytest.mark.parametrize("options", AVERAGES)
def test_evaluating_changes_nothing_in_the_run(options: dict[str, Any], tmp_path: Path) -> None:
    silent, watched = Diary(), Diary()
    options = {"lr": 1e-2, **options}
    evaluated: dict[str, Any] = {"valid_data": ("rows:9",), "eval_interval": 1}
    run(tmp_path / "silent", model=model_of(resid_pdrop=0.3), callbacks=[silent], **options)
    run(tmp_path / "watched", model=model_of(resid_pdrop=0.3), callbacks=[watched], **options, **evaluated)
    assert [report.loss for report in silent.reports] == [report.loss for report in watched.reports]


@pytest.mark.parametrize("options", AVERAGES)
def test_what_is_evaluated_is_what_is_saved_and_left_in_the_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of()
    result = run(tmp_path / "run", model=model, valid_data=("rows:11",), lr=1e-2, **options)
    for trained in (sat.load(tmp_path / "run" / "final"), model):
        loss = evaluate(trained, loader_of(), step).mean_loss
        assert result.evaluations["valid"].loss == pytest.approx(loss, rel=1e-12)
