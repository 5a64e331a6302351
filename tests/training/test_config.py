"""`TrainConfig`: one flat place, every problem in one report, and sizes of which two give the third."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from swissarmy.cli.config_file import read_config
from swissarmy.core.errors import ConfigError
from swissarmy.data.config import DataConfig
from swissarmy.training.config import BatchSizes, TrainConfig


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"output": "run", "train_data": ("a.txt",), "train_iters": 3, "batch_size": 2, **changes})


def test_it_is_a_data_config_with_one_seed() -> None:
    made = config(seed=7)
    assert isinstance(made, DataConfig)
    assert [field.name for field in dataclasses.fields(made)].count("seed") == 1
    assert next(iter(made.to_dict())) == "output"


def test_all_problems_of_all_groups_are_in_one_report() -> None:
    with pytest.raises(ConfigError) as caught:
        config(
            output="",
            epochs=2.0,
            batch_size=0,
            lr=-1.0,
            warmup=-1.0,
            shard=0,
            save_interval=0,
            eval_interval=0,
            log_interval=0,
            max_skipped=0,
            sequence_length=0,
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "TrainConfig: 11 problems"
    names = "output epochs batch_size lr warmup shard save_interval eval_interval log_interval max_skipped".split()
    for name in [*names, "sequence_length"]:
        assert sum(name in line for line in lines[1:]) == 1, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_iters": None}, "give either train_iters or epochs"),
        ({"epochs": float("inf"), "train_iters": None}, "epochs=inf must be a number above 0"),
        ({"batch_size": None}, "give batch_size"),
        ({"train_data": ()}, "there is no data"),
        ({"train_data": (), "valid_data": ("a.txt",)}, "train_data is empty"),
        ({"early_stopping": 3}, "early_stopping needs an eval_interval"),
        ({"lr": "3e-4"}, "lr='3e-4' is not float"),
        ({"precision": "fp8"}, "precision='fp8' is not one of 'fp32', 'bf16', 'fp16' or None"),
        ({"lr": math.inf}, "lr=inf must be a positive number"),
        ({"eps": math.inf}, "eps=inf must be a positive number"),
        ({"weight_decay": math.nan}, "weight_decay=nan must be a number"),
        ({"distributed_timeout": math.nan}, "distributed_timeout=nan must be a number of seconds"),
    ],
)
def test_what_makes_no_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ({"batch_size": 2}, 3, (6, 1)),
        ({"batch_size": 2, "accumulation": 4}, 3, (24, 4)),
        ({"batch_size": 2, "global_batch_size": 24}, 3, (24, 4)),
        ({"batch_size": 2, "global_batch_size": 24, "accumulation": 4}, 3, (24, 4)),
        ({"batch_size": None, "global_batch_size": 24}, 3, (24, 1)),
        ({"batch_size": None, "global_batch_size": 24, "accumulation": 2}, 3, (24, 2)),
    ],
)
def test_two_sizes_give_the_third(sizes: dict[str, Any], ranks: int, expected: tuple[int, int]) -> None:
    assert config(**sizes).batch_sizes(ranks) == BatchSizes(*expected)


@pytest.mark.parametrize(
    ("sizes", "cure"),
    [({"global_batch_size": 25}, "give 24"), ({"global_batch_size": 24, "accumulation": 3}, "give 18")],
)
def test_sizes_that_contradict_each_other_are_refused(sizes: dict[str, Any], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        config(batch_size=2, **sizes).batch_sizes(3)


def test_a_file_with_problems_gets_one_report_with_lines(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "output: run\ntrain_data: [a.txt]\nlr: 1e-4\nbatch-size: 2\nlearning_rate: 3\noutput: other\nshuffle: maybe\n"
        "optimizer: adam\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_config(file, TrainConfig)
    report = str(caught.value)
    assert report.startswith(f"{file}: 4 problems")
    assert f"{file}:5: unknown key 'learning_rate'" in report
    assert f"{file}:6: duplicate key 'output', given before on line 1" in report
    assert f"{file}:7: shuffle: expected true or false, not 'maybe'" in report
    assert f"{file}:8: optimizer: expected one of adamw, muon, " in report


def test_values_that_contradict_each_other_are_said_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output: run\ntrain_data: [a.txt]\nlr: 1e-4\ntrain_iters: 0\n")
    with pytest.raises(ConfigError, match=r"run.yaml: TrainConfig: 2 problems(.|\n)*train_iters=0(.|\n)*batch_size"):
        read_config(file, TrainConfig)
