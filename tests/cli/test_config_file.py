"""The strict reader of config files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from swissarmy.cli.arguments import parse_over
from swissarmy.cli.config_file import read_config, read_values
from swissarmy.core.config import Config
from swissarmy.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optimizer(Config):
    steps: int
    lr: float = 1e-3

    def problems(self) -> Any:
        if self.lr <= 0:
            yield f"lr={self.lr} must be above 0"


@dataclass(frozen=True, kw_only=True)
class Run(Config):
    path: str
    optimizer: Optimizer
    warmup: Optimizer = field(default_factory=lambda: Optimizer(steps=3))
    second: Optimizer | None = None
    weights: tuple[float, ...] = ()
    mode: Literal["a", "b"] = "a"
    out: Path | None = None
    table: dict[str, int] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    stages: tuple[Optimizer, ...] = ()


START = "path: x\noptimizer: {steps: 5}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return write


def test_values_become_what_the_dataclass_declares(write: Any) -> None:
    run = read_config(
        write(
            "path: x\noptimizer: {lr: 1e-4, steps: 5}\nwarmup: {lr: 2}\nweights: [2, 1E0, .5]\nout: here\n"
            "table: {a-b: 1}\nanything: {a: 1e-4, b: no, c: [1, null]}\nstages: [{steps: 1}, {steps: 2}]\n"
        ),
        Run,
    )
    assert run == Run(
        path="x",
        optimizer=Optimizer(steps=5, lr=0.0001),
        warmup=Optimizer(steps=3, lr=2.0),
        weights=(2.0, 1.0, 0.5),
        out=Path("here"),
        table={"a-b": 1},
        anything={"a": 0.0001, "b": "no", "c": [1, None]},
        stages=(Optimizer(steps=1), Optimizer(steps=2)),
    )
    assert all(isinstance(weight, float) for weight in run.weights)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("pth: 1", ":3: unknown key 'pth'. Did you mean 'path'?"),
        ("path: y", ":3: duplicate key 'path', given before on line 1"),
        ("warmup: {lrr: 1}", ":3: unknown key 'warmup.lrr'. Did you mean 'lr'?"),
        ("warmup: {lr: fast}", ":3: warmup.lr: expected a number, not 'fast'"),
        ("warmup: {steps: 1e4}", ":3: warmup.steps: expected a whole number, not '1e4'"),
        ("warmup: {steps: true}", ":3: warmup.steps: expected a whole number, not true or false ('true')"),
        ("second: {lr: 1}", ":3: 'second.steps' is missing"),
        ("weights: 3", ":3: weights: expected a list (each a number), not '3'"),
        ("weights:\n- 1\n- b", ":5: weights[1]: expected a number, not 'b'"),
        ("mode: c", ":3: mode: expected one of a, b, not 'c'"),
        ("out: 1e-4", ":3: out: expected a path, not '1e-4'; in quotes it is text: '1e-4'"),
        ("table: {a: 1, a: 2}", ":3: duplicate key 'table.a', given before on line 3"),
        ("stages: [{lr: -1, steps: 1}]", ":3: stages[0]: Optimizer: lr=-1.0 must be above 0"),
        ("anything: {a: !!python/object/apply:os.system [ls]}", ":3: not valid YAML: tags (!!python/object/apply:os"),
        ("anything: {a: !!python/name:os.system x}", ":3: not valid YAML: tags (!!python/name:os.system)"),
        ("warmup: {steps: !!int abc}", ":3: not valid YAML: tags (!!int)"),
        ("out: &a x\nmode: *a", ":4: not valid YAML: aliases (*a) are not read"),
        ("<<: {a: 1}", ":3: unknown key '<<'"),
        ("3: x", ":3: '3' is no key: a key is text"),
        ("mode: [", "not valid YAML"),
        ("---\nmode: a", ":3: not valid YAML"),
    ],
)
def test_a_problem_names_the_line_and_the_thing_at_fault(write: Any, text: str, problem: str) -> None:
    path = write(START + text)
    with pytest.raises(ConfigError) as caught:
        read_config(path, Run)
    assert str(caught.value).startswith(str(path))
    assert problem in str(caught.value)


def test_all_problems_are_in_one_report_in_the_order_of_lines(write: Any) -> None:
    path = write("pth: x\noptimizer: {lr: fast}\nmode: c\n")
    with pytest.raises(ConfigError) as caught:
        read_config(path, Run)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 5 problems"
    assert [int(line.split(":")[1]) for line in lines[1:]] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("text", ["- 1", "x", "3"])
def test_a_file_that_is_no_mapping_is_refused(write: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml:1: the file must be a mapping"):
        read_config(write(text), Run)


@pytest.mark.parametrize("data", [b"path: \xff", b"path: \0", b"[" * 5000])
def test_damaged_files_are_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_config(tmp_path / "run.yaml", Run)


def test_an_empty_file_lacks_what_has_no_default(write: Any) -> None:
    assert read_values(write(""), Run) == {}
    with pytest.raises(ConfigError, match="'path' is missing"):
        read_config(write("# nothing\n"), Run)


def test_flags_win_over_the_file_and_fill_what_it_leaves_out(write: Any) -> None:
    values = read_values(write("optimizer: {lr: 1e-4}\nweights: [3, 4]\nwarmup: {lr: 7}\n"), Run)
    flags = ["--path", "p", "--optimizer.steps", "4", "--warmup.steps", "9", "--weights", "1"]
    run = parse_over(Run, values, flags, prog="run")
    assert run == Run(
        path="p", optimizer=Optimizer(steps=4, lr=1e-4), warmup=Optimizer(steps=9, lr=7.0), weights=(1.0,)
    )
    assert (type(run), type(run.optimizer)) == (Run, Optimizer)
