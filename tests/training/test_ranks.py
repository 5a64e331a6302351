"""Runs on two processes: the numbers of one, skips on all, and disagreements found at the start."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swissarmy.core.errors import ConfigError
from swissarmy.data.build import build_loaders
from swissarmy.data.config import DataConfig
from swissarmy.data.prepare import CreateDataset
from swissarmy.testing import run_distributed
from swissarmy.training.callbacks.base import Callback, Run, StepReport
from swissarmy.training.evaluate import evaluate
from swissarmy.training.parallel.mesh import ParallelOptions
from swissarmy.training.ranks import Ranks, joined_ranks
from swissarmy.training.train import train
from tests.training.tiny_runs import (
    Diary,
    Rows,
    config_for,
    largest_difference,
    model_of,
    open_rows,
    run,
    signalled,
    step,
    with_nan_in,
)

SETTINGS: dict[str, Any] = {"valid_data": ("rows:11",), "test_data": ("rows:1",), "eval_batch_size": 4}


def outcome(folder: Path, **options: Any) -> dict[str, Any]:
    """What a run came to, in plain values."""
    model, diary = options.pop("model", None) or model_of(), Diary()
    callbacks = [diary, *options.pop("callbacks", ())]
    result = run(folder, model=model, callbacks=callbacks, **{**SETTINGS, **options})
    weights = {name: _whole(each.detach()) for name, each in model.named_parameters()}
    return {
        "weights": weights,
        "losses": [report.loss for report in diary.reports],
        "norms": [report.grad_norm for report in diary.reports],
        "counts": [(report.count, report.tokens, report.samples) for report in diary.reports],
        "metrics": [report.metrics["accuracy"] for report in diary.reports],
        "evaluations": [(each.name, each.loss, each.count, each.metrics["perplexity"]) for each in diary.evaluations],
        "skipped": [
            (skip.step, skip.reason, [len(rank.bad_gradients) > 0 for rank in skip.ranks]) for skip in diary.skips
        ],
        "entries": diary.entries,
        "signal": result.signal,
    }


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def refused(action: Callable[[], object]) -> str:
    try:
        action()
    except ConfigError as error:
        return str(error)
    return "it was not refused"


class SignalItself(Callback):
    """Sends SIGTERM to this process in the second step, if it is the second rank."""

    def on_step(self, run: Run, report: StepReport) -> None:
        if report.step == 2 and run.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def on_two_ranks(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    broken = with_nan_in({2}) if rank == 1 else step

    def with_metrics(*names: str, later: tuple[str, ...] = ()) -> Callable[..., Any]:
        calls = 0

        def measured(batch: dict[str, Tensor], model: Any) -> Any:
            nonlocal calls
            calls += 1
            loss, count, _ = step(batch, model)
            return loss, count, {name: (len(name), 1) for name in (later if later and calls == 2 else names)}

        return measured

    def metrics_of(forward_step: Callable[..., Any]) -> Any:
        diary = Diary()
        run(folder / "metrics", forward_step=forward_step, callbacks=[diary], train_iters=1)
        return diary.reports[0].metrics

    def refused_metrics(name: str, forward_step: Callable[..., Any]) -> str:
        return refused(lambda: run(folder / name, forward_step=forward_step))

    def start(create_dataset: CreateDataset) -> None:
        train(model_of(), step, create_dataset, config_for(folder / "refused"))

    def here_and_not_there(path: str, config: Any) -> Any:
        if rank == 0:
            return open_rows(path, config)
        raise ConfigError(f"{path} is not here")

    return {
        "equal": outcome(folder / "equal"),
        "sharded": outcome(folder / "sharded", shard=2),
        "accumulated": outcome(folder / "accumulated", accumulation=2),
        "averaged": outcome(folder / "averaged", shard=2, ema_decay=0.5, eval_interval=1, lr=1e-2),
        "averaged_copies": outcome(folder / "averaged_copies", ema_decay=0.5, eval_interval=1, lr=1e-2),
        "other_start": outcome(folder / "other_start", model=model_of(seed=rank)),
        "nan": outcome(folder / "nan", forward_step=broken),
        "terminated": outcome(folder / "terminated", callbacks=[SignalItself()], train_iters=9),
        "evaluation_ended": outcome(
            folder / "evaluation_ended",
            eval_interval=1,
            forward_step=signalled(signal.SIGTERM, call=4, evaluating=True) if rank == 1 else step,
        ),
        "metrics": metrics_of(with_metrics(*(("a", "bb") if rank == 0 else ("bb", "a")))),
        "other_metrics": refused_metrics("other", with_metrics(*(("a", "bb") if rank == 0 else ("a",)))),
        "later_metrics": refused_metrics("later", with_metrics("a", later=("bb",) if rank == 1 else ())),
        "config": refused(lambda: run(folder / "config", lr=1e-3 * (1 + rank))),
        "data": refused(lambda: start(lambda path, config: open_rows("rows:40", config) if rank == 0 else Rows(39))),
        "model": refused(lambda: run(folder / "model", model=model_of(n_embd=32 + 32 * rank))),
        "failing": refused(lambda: start(here_and_not_there)),
        "sizes": refused(lambda: run(folder / "sizes", shard=3)),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return run_distributed(on_two_ranks, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("equal", {}),
        ("sharded", {}),
        ("accumulated", {}),
        ("other_start", {}),
        ("averaged", {"ema_decay": 0.5, "eval_interval": 1, "lr": 1e-2}),
        ("averaged_copies", {"ema_decay": 0.5, "eval_interval": 1, "lr": 1e-2}),
    ],
)
def test_two_ranks_compute_what_one_does(
    both: list[dict[str, Any]], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    alone = outcome(tmp_path / "alone", **options)
    for each in (rank[name] for rank in both):
        assert largest_difference(each["weights"], alone["weights"]) < 1e-12
        for numbers in ("losses", "norms", "metrics"):
            assert each[numbers] == pytest.approx(alone[numbers], rel=1e-12)
        assert each["counts"] == alone["counts"]
        for (*place, loss, count, ppl), (*expected, true_loss, true_count, true_ppl) in zip(
            each["evaluations"], alone["evaluations"], strict=True
        ):
            assert (place, count) == (expected, true_count)
            assert (loss, ppl) == pytest.approx((true_loss, true_ppl), rel=1e-12)


def test_nan_on_one_rank_skips_the_step_on_both(both: list[dict[str, Any]]) -> None:
    for each in (rank["nan"] for rank in both):
        assert each["entries"] == "start/step 1/skip 2/step 2/step 3/valid 3/test 3/end".split("/")
        assert [(step, reason) for step, reason, _ in each["skipped"]] == [(2, "the loss is nan")]
        assert all(bool(torch.isfinite(weight).all()) for weight in each["weights"].values())
    assert largest_difference(both[0]["nan"]["weights"], both[1]["nan"]["weights"]) == 0


def test_metrics_are_added_up_by_name(both: list[dict[str, Any]]) -> None:
    assert [each["metrics"] for each in both] == [{"a": 1, "bb": 2}] * 2


def test_metrics_that_not_all_ranks_have_are_refused_on_all(both: list[dict[str, Any]]) -> None:
    expected = "the metrics that forward_step gives: metric 'bb' is 'given' on rank 0 and absent on rank 1"
    assert [each["other_metrics"] for each in both] == [f"the ranks do not agree on {expected}"] * 2
    own = "forward_step gave the metrics ['bb'], and before ['a']: give all always"
    assert both[1]["later_metrics"].startswith(own)
    assert both[0]["later_metrics"].startswith(f"other ranks failed: rank 1: ConfigError: {own}")


def test_a_signal_to_one_rank_ends_both_after_the_same_step(both: list[dict[str, Any]]) -> None:
    for each in (rank["terminated"] for rank in both):
        assert each["signal"] == signal.SIGTERM
        assert each["entries"] == ["start", "step 1", "step 2", "step 3", "save 3", "end"]


def test_a_signal_to_one_rank_ends_an_evaluation_on_both(both: list[dict[str, Any]]) -> None:
    """Of three batches each; the fourth is the first after the second step."""
    for each in (rank["evaluation_ended"] for rank in both):
        assert each["signal"] == signal.SIGTERM
        assert each["entries"] == ["start", "step 1", "valid 1", "step 2", "save 2", "end"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config", "the ranks do not agree on the config: lr is 0.001 on rank 0 and 0.002 on rank 1"),
        ("data", "the ranks do not agree on the data: source 1 is "),
        ("model", "the ranks do not agree on the model and the code: the model is "),
        ("sizes", "the parallel plan: shard=3"),
    ],
)
def test_disagreements_are_found_at_the_start_on_every_rank(
    both: list[dict[str, Any]], name: str, message: str
) -> None:
    assert all(rank[name].startswith(message) for rank in both)


def test_what_fails_on_one_rank_is_said_on_all(both: list[dict[str, Any]]) -> None:
    assert "rows:40 is not here" in both[1]["failing"]
    assert both[0]["failing"].startswith("other ranks failed: rank 1: ConfigError:")


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_ranks_evaluate_adds_up_to_what_one_does(world_size: int) -> None:
    """Each rank's share in turn, in this process."""

    def share(rank: int, world_size: int) -> Any:
        config = DataConfig(valid_data=("rows:11",), record_format="tokens")
        loaders = build_loaders(config, global_batch_size=4, rank=rank, world_size=world_size, create_dataset=open_rows)
        assert loaders.valid is not None
        return evaluate(model, loaders.valid, step)

    model = model_of()
    whole, shares = share(0, 1), [share(rank, world_size) for rank in range(world_size)]
    assert sum(each.loss for each in shares) == pytest.approx(whole.loss, rel=1e-12)
    assert sum(each.count for each in shares) == whole.count
    assert sum(each.samples for each in shares) == 11


def test_a_process_alone_needs_no_group() -> None:
    with joined_ranks(ParallelOptions()) as ranks:
        assert (ranks.rank, ranks.world_size, ranks.mesh, ranks.is_first) == (0, 1, None, True)
        assert ranks.gather("x") == ["x"]
        assert ranks.on_first(lambda: 3) == ranks.together(lambda: 3) == 3


def test_an_error_of_the_first_rank_is_raised() -> None:
    def fail() -> None:
        raise ConfigError("no")

    for call in (Ranks().on_first, Ranks().together):
        with pytest.raises(ConfigError, match=r"^no$"):
            call(fail)
