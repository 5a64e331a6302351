"""Runs over several processes are the run of one process: losses, evaluations, checkpoints, and the model they leave.

The slice that `make test` runs is in float64 and one start of two processes; `make distributed` runs four, and what a
user types.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from swissarmy.testing import TINY_CONFIGS, run_distributed
from tests.distributed.runs import Outcome, Setting, differences, everything, outcome, outcomes

TOLERANCE = 1e-10
RESUMED = 2
"""Which of the settings goes on with a run that one process began."""
ON_TWO = [
    Setting({"shard": 2}, adapters=True),
    Setting({"tensor_parallel": 2}),
    Setting({"shard": 2}),
    Setting({"context_parallel": 2}),
]
ON_FOUR = [
    Setting({"shard": 2, "tensor_parallel": 2}),
    Setting({"shard": 2, "tensor_parallel": 2, "sequence_parallel": True}, adapters=True),
    Setting({"data": 2, "shard": 2, "accumulation": 2}),
    Setting({"context_parallel": 2, "shard": 2}, adapters=True),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Outcome]:
    """The runs of one process, by whether adapters alone train."""
    folder = tmp_path_factory.mktemp("alone")
    return {adapters: outcome(folder / str(adapters), Setting(adapters=adapters)) for adapters in (False, True)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, by rank."""
    folder = tmp_path_factory.mktemp("two")
    outcome(folder / f"2-{RESUMED}", Setting(), broken_off=True)
    return run_distributed(everything, 2, folder, ON_TWO, timeout=300.0)


def test_a_run_of_two_processes_is_that_of_one(two: list[dict[str, Any]], alone: dict[bool, Outcome]) -> None:
    for setting, run in zip(ON_TWO, two[0]["outcomes"], strict=True):
        assert max(differences(run, alone[setting.adapters])) < TOLERANCE, setting
        assert run.saved >= {
            name for name in alone[setting.adapters].saved if name.startswith(("model.", "optimizer."))
        }
    assert [len(run.losses) for run in two[0]["outcomes"]] == [4, 4, 2, 4]


def test_where_adapters_train_their_shards_alone_are_saved(two: list[dict[str, Any]]) -> None:
    weights = {name for name in two[0]["outcomes"][0].saved if name.startswith("model.")}
    assert weights
    assert all(name.startswith("model.mixins.lora.") for name in weights)


def test_every_rank_tells_the_same(two: list[dict[str, Any]]) -> None:
    for one, other in zip(two[0]["outcomes"], two[1]["outcomes"], strict=True):
        assert differences(one, other) == [0, 0, 0, 0]


def test_perplexity_of_a_shared_vocabulary(two: list[dict[str, Any]]) -> None:
    for alone, shared in two[0]["perplexities"]:
        assert shared == pytest.approx(alone, abs=TOLERANCE)


def test_ids_outside_a_shared_vocabulary_are_refused_as_in_one_process(two: list[dict[str, Any]]) -> None:
    shared, whole = two[1]["complaints"][:2], two[1]["complaints"][2:]
    assert shared == whole
    assert ["hold ids from 1 to 64" in shared[0], "hold ids from -1 to 1" in shared[1]] == [True, True]


def test_every_head_has_dropout_of_its_own(two: list[dict[str, Any]]) -> None:
    (kept, drawn_next), (kept_by_other, drawn_by_other) = (each["attended"] for each in two)
    assert torch.equal(kept, kept_by_other)
    assert torch.equal(drawn_next, drawn_by_other)
    assert len({head.numpy().tobytes() for head in kept}) == len(kept) == 4
    assert 0.4 < float(kept.float().mean()) < 0.6


def test_dropout_is_drawn_alike_when_activations_are_computed_again(two: list[dict[str, Any]]) -> None:
    first = two[0]["dropout"][0]
    for run in (*two[0]["dropout"], *two[1]["dropout"]):
        assert all(map(torch.equal, run, first))


@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_a_run_of_four_processes_is_that_of_one(alone: dict[bool, Outcome], tmp_path: Path) -> None:
    for setting, run in zip(ON_FOUR, run_distributed(outcomes, 4, tmp_path, ON_FOUR, timeout=1000.0)[0], strict=True):
        assert max(differences(run, alone[setting.adapters])) < TOLERANCE, setting


# As a user starts it


def trained(folder: Path, processes: int, *flags: object) -> dict[str, list[float]]:
    """The losses in metrics.jsonl of `sat train`, by kind of record."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "swissarmy"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "train", "--output", str(folder), *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "final" / "model.safetensors").exists()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = Counter(record["kind"] for record in records)
    return {kind: [each["loss"] for each in records if each["kind"] == kind] for kind in kinds if kind != "start"}


@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_torchrun_trains_as_one_process_does(tmp_path: Path) -> None:
    config, data = tmp_path / "config.json", tmp_path / "rows.jsonl"
    config.write_text(json.dumps({"model_type": "gpt2", **TINY_CONFIGS["gpt2"], "vocab_size": 64}))
    rows = [[(row * 7 + place * 5) % 64 for place in range(3 + row % 6)] for row in range(40)]
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    what = ["--model-config", config, "--train-data", data, "--valid-data", data, "--record-format", "tokens"]
    how = [
        "--global-batch-size",
        8,
        "--train-iters",
        4,
        "--eval-interval",
        2,
        "--save-interval",
        2,
        "--log-interval",
        1,
    ]
    flags = [*what, *how, "--lr", 1e-2, "--lr-decay-style", "constant", "--no-live"]
    expected = trained(tmp_path / "alone", 1, *flags)
    assert [len(losses) for losses in expected.values()] == [4, 2]
    for name, processes, more, tolerance in (
        ("data", 2, [], 1e-4),
        ("shard", 2, ["--shard", 2], 1e-4),
        ("bf16", 2, ["--shard", 2, "--precision", "bf16"], 5e-2),
        ("tensor", 2, ["--tensor-parallel", 2], 1e-4),
        ("context", 2, ["--context-parallel", 2], 1e-4),
        ("both", 4, ["--shard", 2, "--tensor-parallel", 2], 1e-4),
    ):
        found = trained(tmp_path / name, processes, *flags, *more)
        for kind, losses in expected.items():
            assert found[kind] == pytest.approx(losses, abs=tolerance), (name, kind)
    half = trained(tmp_path / "resumed", 2, *flags, "--tensor-parallel", 2, "--train-iters", 2)
    whole = trained(tmp_path / "resumed", 1, *flags, "--resume", "auto")
    assert [*half["step"], *whole["step"]][-2:] == pytest.approx(expected["step"][-2:], abs=1e-4)
