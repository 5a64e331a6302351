"""`sat info`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import swissarmy as sat_library
from swissarmy.interop.safetensors_folder import SafetensorsSource


def test_info_says_what_the_checkpoint_is(sat: Any, tiny: Path) -> None:
    code, out, err = sat("info", tiny)
    assert (code, err) == (0, "")
    total = sum(parameter.numel() for parameter in sat_library.load(tiny).parameters())
    for text in ("GPT2LMHeadModel, family gpt2", "yes, every tensor", f"{total:,}", "eos <|end|> (0)", "float32 100%"):
        assert text in out
    assert "mixins.positions (LearnedPositionsMixin)" in out
    assert "positions (replaces the default)" in out


def test_info_prints_one_json_object(sat: Any, tiny: Path) -> None:
    code, out, _ = sat("info", tiny, "--json")
    facts = json.loads(out)
    model = sat_library.load(tiny)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert code == 0
    assert (facts["family"], facts["architecture"], facts["fits"]) == ("gpt2", "GPT2LMHeadModel", True)
    assert facts["parameters"]["total"] == sum(facts["parameters"]["by_part"].values()) == total
    assert facts["bytes"] == {"float32": 4 * total, "bfloat16": 2 * total, "as_stored": 4 * total}
    assert facts["max_sequence_length"] == {"": 32}
    assert facts["mixins"] == [{"name": "mixins.positions", "class": "LearnedPositionsMixin", "parameters": 32 * 16}]
    assert facts["tokenizer"]["special_tokens"]["eos_token"] == {"token": "<|end|>", "id": 0}
    assert facts["hooks"] == model.explain()


def test_info_reads_no_tensor(sat: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: SafetensorsSource, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsSource, "read", read)
    assert sat("info", tiny)[0] == 0


def test_info_of_a_checkpoint_that_does_not_fit_reports_every_problem(sat: Any, tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.wpe.weight"] = torch.zeros(31, 16)
    tensors["transformer.extra"] = torch.zeros(1)
    save_file(tensors, broken / "model.safetensors")
    code, out, err = sat("info", broken)
    assert code == 1
    assert "no, 3 problems: see below" in out
    for text in ("transformer.ln_f.bias", "transformer.wpe.weight: have [31, 16], want [32, 16]", "transformer.extra"):
        assert text in err
    code, out, _ = sat("info", broken, "--json")
    assert code == 1
    assert json.loads(out)["fits"] is False
    assert len(json.loads(out)["problems"]) == 4


def test_info_shows_mixins_that_were_stored_beside_the_model(sat: Any, tiny: Path, tmp_path: Path) -> None:
    model = sat_library.load(tiny)
    model.add_mixin("prefix", sat_library.PrefixTuningMixin.for_model(model, prefix_len=3))
    count = sum(parameter.numel() for parameter in model.get_mixin("prefix").parameters())  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "tuned")
    code, out, _ = sat("info", tmp_path / "tuned", "--json")
    assert code == 0
    assert json.loads(out)["mixins_stored_beside"] == {"prefix": count}
    assert json.loads(out)["tokenizer"]["problem"].startswith("there is no tokenizer")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ('{"model_type": "gtp2"}', "model_type 'gtp2' is not supported. Did you mean 'gpt2'?"),
        ('{"model_type": "gpt2", "n_layr": 2}', "unknown field 'n_layr'. Did you mean 'n_layer'?"),
        ('{"model_type": ', "config.json:1: not valid JSON"),
    ],
)
def test_info_of_a_config_that_is_not_understood_names_the_field(
    sat: Any, tiny: Path, tmp_path: Path, config: str, problem: str
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(config)
    code, out, err = sat("info", tmp_path / "model")
    assert (code, out) == (1, "")
    assert problem in err


def test_info_of_a_folder_that_is_not_there_names_it_and_the_nearest(sat: Any, tiny: Path) -> None:
    code, _, err = sat("info", str(tiny) + "x")
    assert code == 1
    assert f"{tiny}x: there is no such file or folder" in err
    assert f"Did you mean '{tiny.name}'?" in err


def test_info_of_a_truncated_file_names_it(sat: Any, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    code, _, err = sat("info", tmp_path / "model")
    assert code == 1
    assert "model.safetensors is truncated" in err


def test_info_of_gguf_counts_what_is_stored(sat: Any, gemma_gguf: Path) -> None:
    code, out, _ = sat("info", gemma_gguf, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["family"], facts["parameters"]["total"]) == ("gemma3_text", 268_098_176)
    assert facts["bytes"]["as_stored"] < gemma_gguf.stat().st_size < facts["bytes"]["bfloat16"]
    assert facts["tokenizer"]["tokens"] == 262_144
