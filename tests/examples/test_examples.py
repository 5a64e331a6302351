"""Each example runs at a tiny size; their numbers are those of real runs, in `examples/README.md`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from swissarmy.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def last_line_of(name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """The numbers that a script tells."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--smoke", "--output", folder / "run", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_gpt_is_pretrained_from_a_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    sizes = ("--train-iters", "2", "--eval-interval", "2", "--eval-iters", "1", "--batch-size", "2", "--no-live")
    assert main(["train", "--config", "examples/pretrain_gpt.yaml", "--output", str(tmp_path / "run"), *sizes]) == 0
    capsys.readouterr()
    flags = ("--prompt", "And Jesus said", "--max-new-tokens", "5")
    assert main(["generate", str(tmp_path / "run" / "final"), *flags]) == 0
    assert len(capsys.readouterr().out.rstrip("\n")) <= 5


def test_every_character_of_the_text_has_a_token() -> None:
    vocabulary = json.loads((EXAMPLES / "gpt" / "tokenizer.json").read_text())["model"]["vocab"]
    text = (EXAMPLES / "data" / "kjv_gospels_and_acts.txt").read_text()
    assert set(text) < set(vocabulary)
    assert json.loads((EXAMPLES / "gpt" / "config.json").read_text())["vocab_size"] == len(vocabulary)


def test_verses_are_classified(tmp_path: Path) -> None:
    numbers = last_line_of("classify_verses", tmp_path)
    assert (numbers["steps"], numbers["held_out"]) == (2, 7)
    assert 0 < numbers["bag_of_words"] < 1


def test_digits_are_told_apart(tmp_path: Path) -> None:
    numbers = last_line_of("vit_digits", tmp_path)
    assert (numbers["steps"], numbers["held_out"]) == (4, 359)


def test_t5_fills_gaps(tmp_path: Path) -> None:
    numbers = last_line_of("t5_span_corruption", tmp_path)
    assert numbers["steps"] == 3
    assert 5 < numbers["unigram_loss"] < 6 < numbers["loss"]


def test_gemma_is_tuned_on_weights_of_four_bits(tmp_path: Path, gemma_gguf: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / gemma_gguf.name).symlink_to(gemma_gguf)
    numbers = last_line_of("gemma_lora", tmp_path, "--way", "qlora")
    assert (numbers["way"], numbers["steps"]) == ("qlora", 1)
    assert numbers["perplexity_before"] > 1


def test_the_readme_names_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    scripts = {each.name for each in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml"))}
    assert {name for name in scripts if name not in readme} == set()
    assert yaml.safe_load((EXAMPLES / "pretrain_gpt.yaml").read_text())["output"] == "runs/gpt"
