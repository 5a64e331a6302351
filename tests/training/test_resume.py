"""Runs that are broken off and go on, through `train` itself."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from swissarmy.core.errors import CheckpointError
from swissarmy.data.loading.loader import FingerprintError
from swissarmy.mixins.lora import LoRAMixin
from swissarmy.mixins.reduced_weights import reduce_weights
from swissarmy.nn.reduced_linear import Kind
from swissarmy.testing import run_distributed, tiny_model
from swissarmy.training.callbacks.base import Callback, Run, StepReport
from swissarmy.training.train import TrainResult
from tests.training.resumable_runs import STEPS, in_a_child, killed_run, outcome, random_run
from tests.training.survives import sweep
from tests.training.tiny_runs import Diary, largest_difference, model_of, run, signalled, step


class At(Callback):
    """Does something after a step."""

    def __init__(self, number: int, action: Callable[[Run], object]) -> None:
        self.number, self.action = number, action

    def on_step(self, run: Run, report: StepReport) -> None:
        if report.step == self.number:
            self.action(run)


def sent(number: int) -> Callable[[Any, Any], Any]:
    """A forward step that gets a signal in the third step, between two micro-batches."""
    return signalled(number, call=5)


# N + N steps are 2 N steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody breaks off."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    random_run(folder)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_stopped_ends_with_the_same_bits(workers: int, whole: Path, tmp_path: Path) -> None:
    random_run(tmp_path / "run", callbacks=[At(3, lambda run: run.stop("enough"))], num_workers=workers)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "3\n"
    result = random_run(tmp_path / "run", num_workers=2 - workers)
    assert result.step == STEPS
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_the_run_ends_with_the_same_bits(
    number: signal.Signals, whole: Path, tmp_path: Path
) -> None:
    result = random_run(tmp_path / "run", forward_step=sent(number), save_interval=None)
    assert (result.step, result.signal) == (3, number)
    assert not (tmp_path / "run" / "final").exists()
    random_run(tmp_path / "run", resume="must")
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bits(adapters: bool, tmp_path: Path) -> None:
    lines = list(sweep(tmp_path, 2 if adapters else 3, seed=1, adapters=adapters))
    assert all(line.endswith("the same bits") for line in lines)


def test_a_run_that_is_killed_with_workers_leaves_no_lock(whole: Path, tmp_path: Path) -> None:
    assert in_a_child(killed_run, tmp_path / "run", 300, {"num_workers": 2}) == -signal.SIGKILL
    random_run(tmp_path / "run", num_workers=2)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_finished_run_that_is_resumed_changes_nothing(whole: Path) -> None:
    before = outcome(whole)
    result = random_run(whole)
    assert (result.step, outcome(whole)) == (STEPS, before)


# What was due when the signal came


EVALUATED: dict[str, Any] = {"valid_data": ("rows:5",), "test_data": ("rows:3",), "eval_interval": 1}


def entries_of(folder: Path, **options: Any) -> tuple[list[str], TrainResult]:
    """What a run that may be broken off evaluates, and how it ends."""
    diary = Diary()
    result = random_run(folder, callbacks=[diary], **EVALUATED, **options)
    return [each for each in diary.entries if each.startswith(("valid", "test"))], result


def evaluations_in(folder: Path) -> list[tuple[int, str, float]]:
    """What the metrics of a run have of them."""
    records = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [(each["step"], each["name"], each["loss"]) for each in records if each["kind"] == "evaluation"]


@pytest.mark.parametrize("length", [3, 5])
def test_what_was_to_be_evaluated_when_a_signal_came_is_made_up_for(length: int, tmp_path: Path) -> None:
    expected, whole = entries_of(tmp_path / "whole", train_iters=length)
    before, broken = entries_of(tmp_path / "run", train_iters=length, forward_step=sent(signal.SIGTERM))
    after, resumed = entries_of(tmp_path / "run", train_iters=length)
    assert broken.step == 3
    assert before + after == expected
    assert [each.loss for each in resumed.evaluations.values()] == [each.loss for each in whole.evaluations.values()]
    assert resumed.loss == whole.loss
    again, finished = entries_of(tmp_path / "run", train_iters=length)
    assert again == (after if length == 3 else [])  # the third step was saved before it was evaluated
    assert finished.loss == resumed.loss
    assert evaluations_in(tmp_path / "run") == evaluations_in(tmp_path / "whole")


@pytest.mark.parametrize(("call", "at"), [(1, 0), (3, 1), (4, 2), (5, 2), (8, 3)])
def test_a_signal_ends_an_evaluation_and_what_is_left_of_it_is_made_up_for(call: int, at: int, tmp_path: Path) -> None:
    """Two batches at the start, two after each step, and one of the test data."""
    settings: dict[str, Any] = {"train_iters": 3, "eval_on_start": True, "eval_batch_size": 3}
    expected, whole = entries_of(tmp_path / "whole", **settings)
    forward_step = signalled(signal.SIGTERM, call=call, evaluating=True)
    before, broken = entries_of(tmp_path / "run", forward_step=forward_step, **settings)
    assert (broken.step, broken.signal) == (at, signal.SIGTERM)
    assert not (tmp_path / "run" / "final").exists()
    after, resumed = entries_of(tmp_path / "run", **settings)
    assert before + after == expected
    assert resumed.loss == whole.loss
    assert evaluations_in(tmp_path / "run") == evaluations_in(tmp_path / "whole")


def test_a_run_that_was_to_stop_early_when_a_signal_came_stops_where_it_would_have(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"early_stopping": 2, "lr": 10.0, "clip_grad_norm": None, "ema_decay": None}
    expected, whole = entries_of(tmp_path / "whole", **settings)
    assert (whole.step, whole.stop_reason and whole.stop_reason[:13]) == (3, "2 evaluations")
    before, broken = entries_of(tmp_path / "run", **settings, forward_step=sent(signal.SIGTERM))
    assert (broken.step, broken.signal) == (3, signal.SIGTERM)
    after, resumed = entries_of(tmp_path / "run", **settings)
    assert before + after == expected
    assert (resumed.step, resumed.stop_reason) == (whole.step, whole.stop_reason)


def test_a_run_that_stopped_early_goes_on_only_with_more_patience(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr": 10.0, "clip_grad_norm": None, "ema_decay": None}
    _, stopped = entries_of(tmp_path / "run", early_stopping=2, **settings)
    assert stopped.step == 3
    again, same = entries_of(tmp_path / "run", early_stopping=2, **settings)
    assert (again, same.step, same.stop_reason) == ([], 3, stopped.stop_reason)
    _, more = entries_of(tmp_path / "run", early_stopping=3, **settings)
    assert more.step > 3


# What changed meanwhile


def test_another_learning_rate_and_length_are_taken_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_run(tmp_path / "run", train_iters=2)
    with caplog.at_level(logging.WARNING):
        result = random_run(tmp_path / "run", train_iters=4, lr=5e-3)
    assert result.step == 4
    assert "lr was 0.01 and is 0.005" in caplog.text
    assert "train_iters was 2 and is 4" in caplog.text


def test_other_data_is_refused_unless_it_is_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_run(tmp_path / "run", train_iters=2)
    with pytest.raises(FingerprintError, match=r"the data is not that of the checkpoint at step 2(.|\n)*allow-data"):
        random_run(tmp_path / "run", train_data=("rows:40", "rows:24"))
    random_run(tmp_path / "run", train_data=("rows:40", "rows:24"), allow_data_change=True)
    assert "resuming at step 2 although the data changed" in caplog.text


def test_another_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", train_iters=2, save_interval=2)
    with pytest.raises(CheckpointError, match="of another model or optimizer; nothing was loaded"):
        run(tmp_path / "run", model=model_of(n_embd=64), train_iters=4, resume="auto")


def test_what_does_not_fit_is_told_with_the_settings_that_changed(tmp_path: Path) -> None:
    run(tmp_path / "run", train_iters=2, save_interval=2)
    with pytest.raises(CheckpointError) as refused:
        run(tmp_path / "run", optimizer="muon", train_iters=4, resume="auto")
    changes = "optimizer was 'adamw' and is 'muon'; save_interval was 2 and is None; train_iters was 2 and is 4"
    assert refused.value.__notes__ == [f"Since then other settings: {changes}."]
    with pytest.raises(FingerprintError) as other_data:
        run(tmp_path / "run", train_iters=2, save_interval=2, seed=1, resume="auto")
    assert other_data.value.__notes__ == ["Since then other settings: seed was 0 and is 1."]


@pytest.mark.parametrize("kind", ["fp16", "int8", "int4"])
def test_reduced_weights_of_another_model_are_refused(kind: Kind, tmp_path: Path) -> None:
    def resumed(scale: float, steps: int) -> TrainResult:
        model = tiny_model("gpt2")
        with torch.no_grad():
            model.transformer.layers[1].mlp.up.weight *= scale
        reduce_weights(model, kind)
        torch.manual_seed(0)
        model.add_mixin("lora", LoRAMixin.for_model(model, r=2))
        model.freeze_except("mixins.lora")
        return run(tmp_path / "run", model=model, train_iters=steps, save_interval=1, resume="auto")

    resumed(1.0, 1)
    with pytest.raises(
        CheckpointError, match=r"the weights that do not train.*\n  - mixins.*mlp_up.held.*other values"
    ):
        resumed(1.1, 2)
    assert resumed(1.0, 2).step == 2


def test_a_run_that_failed_without_a_checkpoint_begins_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(run: Run) -> None:
        raise RuntimeError("a cable")

    with pytest.raises(RuntimeError, match="a cable"):
        run(tmp_path / "run", callbacks=[At(2, fail)])
    assert run(tmp_path / "run", resume="auto").step == 3
    assert "holds a run without a checkpoint to resume from: it begins anew" in caplog.text


def test_there_must_be_something_to_resume_where_there_must(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no step to resume from"):
        run(tmp_path / "run", resume="must")


# Other numbers of ranks


class Order(Callback):
    """Which rows each step saw on this rank; the first token of a row is its number."""

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}
        self._rows: list[int] = []

    def step(self, batch: dict[str, Tensor], model: Any) -> Any:
        self._rows += batch["input_ids"][:, 0].tolist()
        return step(batch, model)

    def on_step(self, run: Run, report: StepReport) -> None:
        self.seen[report.step], self._rows = self._rows, []


def run_to(folder: Path, end: int) -> tuple[dict[int, list[int]], dict[str, Tensor]]:
    """Go on to a step; the rows of each step, and the weights."""
    order, model = Order(), model_of()
    run(
        folder,
        model=model,
        forward_step=order.step,
        callbacks=[order, At(end, lambda run: run.stop("enough"))],
        train_iters=8,
        save_interval=100,
        resume="auto",
    )
    return order.seen, {name: each.detach().clone() for name, each in model.named_parameters()}


def ranks_to(rank: int, world_size: int, folder: str, end: int) -> tuple[dict[int, list[int]], dict[str, Tensor]]:
    seen, weights = run_to(Path(folder), end)
    return seen, {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in weights.items()}


def test_other_numbers_of_ranks_go_on_with_the_same_samples(tmp_path: Path) -> None:
    expected, weights = run_to(tmp_path / "one", 8)
    seen = {number: list[int]() for number in expected}
    for world_size, end in ((4, 2), (2, 4), (1, 6), (2, 8)):
        folder = str(tmp_path / "many")
        ranks = run_distributed(ranks_to, world_size, folder, end) if world_size > 1 else [ranks_to(0, 1, folder, end)]
        for each, _ in ranks:
            for number, rows in each.items():
                seen[number] += rows
    assert {number: sorted(rows) for number, rows in seen.items()} == {
        number: sorted(rows) for number, rows in expected.items()
    }
    assert largest_difference(ranks[0][1], weights) < 1e-12


# Launched by torchrun

RESTARTED = """
import os, signal, sys
from pathlib import Path
from tests.training.tiny_runs import run, step
calls = 0
def dying(batch, model):
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(batch, model)
result = run(Path(sys.argv[1]), forward_step=dying, train_iters=5, save_interval=2, save_async=False, resume="auto")
Path(f"{sys.argv[0]}.{os.environ['RANK']}").write_text(f"step {result.step} after {calls} calls")
"""


def test_a_rank_that_dies_ends_all_and_the_restart_resumes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RESTARTED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--max-restarts", "1", str(tmp_path / "script.py"), str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    result = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        assert (tmp_path / f"script.py.{rank}").read_text() == "step 5 after 3 calls"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 5
    run(tmp_path / "straight", train_iters=5)
    ends = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "straight")]
    assert largest_difference(*ends) < 1e-12
