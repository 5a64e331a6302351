"""`sat migrate`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy
from swissarmy.testing import tiny_inputs, tiny_model
from tests.interop.sat_legacy import legacy


def old_gpt2(folder: Path, *, config: bool = True, ranks: int = 2) -> Path:
    state, arguments = legacy.gpt2(tiny_model("gpt2"))
    shares = legacy.split(legacy.pad_vocabulary(state), ranks)
    return legacy.write(folder, shares, arguments if config else None)


def same_logits(folder: Path) -> bool:
    model = tiny_model("gpt2")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        return torch.equal(swissarmy.load(folder)(**inputs)[0], model(**inputs)[0])


def test_a_checkpoint_is_migrated_and_what_was_done_is_said(sat: Any, tmp_path: Path) -> None:
    code, out, err = sat("migrate", old_gpt2(tmp_path / "old"), tmp_path / "new")
    assert (code, err) == (0, "")
    for part in (
        "gpt2, generation 2 of names, iteration 1000, 2 model-parallel files, merged",
        "61; 67 rows of padding were cut",
        "mixins.gpt2-final.lm_head.weight",
        "mixins.gpt2-attn.bias",
    ):
        assert part in out
    assert same_logits(tmp_path / "new")


def test_a_second_run_says_that_there_is_nothing_to_do(sat: Any, tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old")
    assert "nothing was changed" not in sat("migrate", old, tmp_path / "new")[1]
    code, out, _ = sat("migrate", old, tmp_path / "new")
    assert code == 0
    assert "holds this migration already: nothing was changed" in out


def test_what_was_done_as_json(sat: Any, tmp_path: Path) -> None:
    _, out, _ = sat("migrate", old_gpt2(tmp_path / "old"), tmp_path / "new", "--json", "--keep-padding")
    done = json.loads(out)
    assert done["family"] == "gpt2"
    assert done["vocabulary"] == [128, 128]
    assert done["done_before"] is False


def test_flags_stand_in_for_a_missing_config(sat: Any, tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old", config=False)
    code, _, err = sat("migrate", old, tmp_path / "new")
    assert code == 1
    assert "sat migrate: " in err
    assert "say --family, one of bert, roberta, gpt2" in err
    flags = ["--family", "gpt2", "--set", "num_attention_heads=4", "layernorm_epsilon=1e-5", "--vocab-size", "61"]
    assert sat("migrate", old, tmp_path / "new", *flags)[0] == 0
    assert same_logits(tmp_path / "new")


@pytest.mark.parametrize("name", ["arguments.json", "arguments.yaml"])
def test_old_arguments_come_from_a_file(sat: Any, tmp_path: Path, name: str) -> None:
    values = {"model_class": "GPT2Model", "num_attention_heads": 4, "vocab_size": 61}
    text = json.dumps(values) if name.endswith("json") else "".join(f"{k}: {v}\n" for k, v in values.items())
    (tmp_path / name).write_text(text)
    old = old_gpt2(tmp_path / "old", config=False)
    assert sat("migrate", old, tmp_path / "new", "--model-config", tmp_path / name)[0] == 0
    assert same_logits(tmp_path / "new")


@pytest.mark.parametrize("flag", ["--config", "--model-config"])
def test_the_config_may_be_the_model_config_itself(sat: Any, tmp_path: Path, flag: str) -> None:
    old = old_gpt2(tmp_path / "old")
    config = (old / "model_config.json").rename(tmp_path / "model_config.json")
    assert sat("migrate", old, tmp_path / "new", "--family", "gpt2", flag, config)[0] == 0
    assert same_logits(tmp_path / "new")


def test_a_slip_in_a_file_of_flags_is_no_model_config(sat: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"famly": "gpt2"}')
    code, _, err = sat("migrate", old_gpt2(tmp_path / "old"), tmp_path / "new", "--config", tmp_path / "run.json")
    assert code == 2
    assert "run.json:1: unknown key 'famly'. Did you mean 'family'?" in err


@pytest.mark.parametrize("as_file", [True, False])
def test_mixins_by_position_are_named_by_pairs_or_by_a_file(sat: Any, tmp_path: Path, as_file: bool) -> None:
    state, config = legacy.gpt2(tiny_model("gpt2"))
    state = legacy.first_generation(state, {"gpt2-final": 0, "gpt2-attn": 1})
    old = legacy.write(tmp_path / "old", [state], config)
    code, _, err = sat("migrate", old, tmp_path / "new")
    assert code == 1
    assert "say --map 0=NAME 1=NAME" in err
    (tmp_path / "map.yaml").write_text("0: gpt2-final\n1: gpt2-attn\n")
    given = [tmp_path / "map.yaml"] if as_file else ["0=gpt2-final", "1=gpt2-attn"]
    assert sat("migrate", old, tmp_path / "new", "--map", *given)[0] == 0
    assert same_logits(tmp_path / "new")


def test_kept_mixins_are_listed_with_how_to_load_them(sat: Any, tmp_path: Path) -> None:
    state, config = legacy.gpt2(tiny_model("gpt2"))
    state["mixins.adapter.down.weight"] = torch.zeros(3, 4)
    _, out, _ = sat("migrate", legacy.write(tmp_path / "old", [state], config), tmp_path / "new")
    assert "kept mixins.adapter" in out
    assert "12 parameters" in out
    assert 'mixins={"adapter": MyMixin(...), ...}' in out


def test_a_family_without_a_file_is_said_to_become_the_plain_backbone(sat: Any, tmp_path: Path) -> None:
    state, config = legacy.gpt2(tiny_model("gpt2"))
    old = legacy.write(tmp_path / "old", [state], config | {"model_class": "GLMModel"})
    _, out, _ = sat("migrate", old, tmp_path / "new")
    assert "the plain backbone: glm has no file here" in " ".join(out.split())
    assert "(positions is sat.LearnedPositionsMixin)" in out


def test_flags_may_come_from_a_yaml_file(sat: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("family: gpt2\nset: [num_attention_heads=4]\nvocab-size: 61\n")
    old = old_gpt2(tmp_path / "old", config=False)
    assert sat("migrate", old, tmp_path / "new", "--config", tmp_path / "run.yaml")[0] == 0
    assert same_logits(tmp_path / "new")


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--vocab-size", "0"], 2, "--vocab-size 0 must be at least 1"),
        (["--vocab-size", "9", "--keep-padding"], 2, "give one of them"),
        (["--set", "heads"], 2, "write NAME=VALUE"),
        (["--set", "num_atention_heads=4"], 2, "Did you mean 'num_attention_heads'?"),
        (["--set", "image_size=[1"], 2, "neither JSON nor YAML"),
        (["--split", "mixins.x"], 2, "write NAMES=rows or NAMES=columns"),
        (["--split", "mixins.mine.*=rows"], 1, "--split 'mixins.mine.*=...' is of no tensor"),
        (["--map", "a=b"], 1, "write INDEX=NAME"),
        (["--map", "nowhere.yaml"], 2, "nowhere.yaml: No such file"),
        (["--step", "7"], 1, "the steps that exist are: 1000"),
        (["--step", "../1000"], 1, "neither an iteration nor 'release'"),
    ],
)
def test_what_cannot_be_asked_for_is_said(sat: Any, tmp_path: Path, flags: list[str], code: int, says: str) -> None:
    found, _, err = sat("migrate", old_gpt2(tmp_path / "old"), tmp_path / "new", *flags)
    assert (found, says in err) == (code, True), err
    assert not (tmp_path / "new").exists()


def test_what_a_killed_run_left_is_mentioned(sat: Any, tmp_path: Path) -> None:
    (tmp_path / ".new.tmp-12-ab").mkdir()
    code, _, err = sat("migrate", old_gpt2(tmp_path / "old"), tmp_path / "new")
    assert code == 0
    assert ".new.tmp-12-ab was left by a run that was killed; it may be deleted." in err
