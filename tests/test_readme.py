"""Every block of the README runs: Python as one program, `sat` in a shell, `make` targets by name.

So do those of the pages in `docs`, each from top to bottom; commands that need a real model are parsed only.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.cli.arguments import parse
from swissarmy.cli.command import Command
from swissarmy.cli.main import find_command, main
from swissarmy.interop.peft import METHODS
from swissarmy.models._family import build_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks_of(text: str) -> list[tuple[str, str]]:
    """The language and the text of each."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


BLOCKS = blocks_of(README)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_there_are_only_blocks_that_these_tests_run() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text"}


def test_python_blocks_run_in_order_and_print_what_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    for expected in blocks("text"):
        assert expected in printed


def test_shell_blocks_run(tmp_path: Path, gemma_gguf: Path) -> None:
    (tmp_path / "gemma.gguf").symlink_to(gemma_gguf)
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    targets = [line.removeprefix("make ") for line in lines if line.startswith("make ")]
    commands = [line for line in lines if line.startswith("sat ")]
    assert len(targets) + len(commands) == len(lines)
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    program = Path(sys.executable).parent / "sat"
    for command in commands:
        result = subprocess.run(
            f"{program} {command.removeprefix('sat ')}",
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()


def run_command(line: str) -> None:
    """Run `sat ...`, which says in a comment if it ends with another exit code than 0."""
    command, _, comment = line.partition("#")
    assert main(shlex.split(command)[1:]) == ("exit code 1" in comment)


def parse_command(line: str) -> None:
    """Check the options of `sat ...` alone: what it does takes a real model and its time."""
    program, name, *arguments = shlex.split(line)
    command = find_command(name)
    assert program == "sat"
    assert isinstance(command, Command)
    parse(name, command, arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's compiler's
@pytest.mark.parametrize(
    ("page", "treat"),
    [
        ("data.md", run_command),
        ("generation.md", parse_command),
        ("fine_tuning.md", parse_command),
        ("training.md", parse_command),
        ("write_a_mixin.md", parse_command),
    ],
)
def test_a_page_runs_from_top_to_bottom(
    page: str,
    treat: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gemma_gguf: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "gemma.gguf").symlink_to(gemma_gguf)
    names: dict[str, object] = {}
    printed = ""
    for language, block in blocks_of((ROOT / "docs" / page).read_text(encoding="utf-8")):
        if language == "text":
            assert block.removesuffix("\n") in printed
            continue
        if language == "python":
            exec(compile(block, page, "exec"), names)
        else:
            assert language == "sh"
            for line in block.splitlines():
                treat(line)
        printed = re.sub(r" +$", "", capsys.readouterr().out, flags=re.MULTILINE)


def test_the_methods_of_the_fine_tuning_page_are_what_it_says() -> None:
    page = (ROOT / "docs" / "fine_tuning.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| ([\d,]+) \| (yes)? ?\| (?:`(\w+)`)? ?\|$", page, flags=re.MULTILINE)
    assert len(rows) == 13
    peft = {method.kind.__name__: name for name, method in METHODS.items()}
    for name, trained, merges, exchanged in rows:
        kind: type[Any] = getattr(sat, name)
        with torch.device("meta"):
            mixin = kind.for_model(build_model({"model_type": "gpt2"}))
        assert sum(parameter.numel() for parameter in mixin.parameters()) == int(trained.replace(",", "")), name
        assert issubclass(kind, sat.MergeableMixin) == bool(merges), name
        assert peft.get(name, "") == exchanged
