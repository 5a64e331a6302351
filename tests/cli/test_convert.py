"""`sat convert`: what was migrated, and all else that loads, as folders that `transformers` reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import swissarmy
from swissarmy.interop.safe_write import verify_manifest
from swissarmy.testing import TINY_CONFIGS, tiny_inputs, tiny_model
from tests.helpers import Scale
from tests.interop.sat_legacy import legacy

FAMILIES = sorted(set(TINY_CONFIGS) - {"swissarmy"})


def agree(folder: Path, model: Any, *, tolerance: float = 1e-4) -> None:
    """`transformers` finds the same logits in the folder."""
    theirs = getattr(transformers, model.source.config.architecture).from_pretrained(folder).float().eval()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, model(**inputs)[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted(sat: Any, tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    code, out, err = sat("convert", tmp_path / "model", tmp_path / "theirs")
    assert (code, err) == (0, "")
    assert model.source.config.architecture in out
    agree(tmp_path / "theirs", model)


def test_what_was_migrated_goes_on_to_hugging_face(sat: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", num_key_value_heads=4)
    state, config = legacy.llama(model)
    shares = legacy.split(legacy.pad_vocabulary(state), 4)
    assert sat("migrate", legacy.write(tmp_path / "old", shares, config), tmp_path / "new")[0] == 0
    assert sat("convert", tmp_path / "new", tmp_path / "theirs")[0] == 0
    agree(tmp_path / "theirs", model)
    assert not (tmp_path / "theirs" / "migration.json").exists()
    verify_manifest(tmp_path / "theirs")


def test_the_tokenizer_comes_along(sat: Any, tmp_path: Path, tiny: Path) -> None:
    code, out, _ = sat("convert", tiny, tmp_path / "theirs", "--json")
    assert code == 0
    done = json.loads(out)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(done["companions"])
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")("once upon a time")["input_ids"]
    assert ids == swissarmy.load_tokenizer(tiny).encode("once upon a time")


def test_another_precision_may_be_asked_for(sat: Any, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    _, out, _ = sat("convert", tmp_path / "model", tmp_path / "half", "--dtype", "bfloat16", "--json")
    assert json.loads(out)["dtype"] == "bfloat16"
    assert swissarmy.load(tmp_path / "half").dtype is torch.bfloat16


def test_mixins_beside_the_model_are_not_lost_in_silence(sat: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt2").add_mixin("scale", Scale())
    model.save_pretrained(tmp_path / "model")
    code, _, err = sat("convert", tmp_path / "model", tmp_path / "theirs")
    assert code == 1
    assert "holds mixins beside the model, which transformers cannot read: scale" in err
    code, out, _ = sat("convert", tmp_path / "model", tmp_path / "theirs", "--drop-mixins")
    assert code == 0
    assert "scale (1 parameters)" in out
    agree(tmp_path / "theirs", tiny_model("gpt2"))


def test_the_plain_backbone_has_no_place_there(sat: Any, tmp_path: Path) -> None:
    tiny_model("swissarmy").save_pretrained(tmp_path / "model")
    code, _, err = sat("convert", tmp_path / "model", tmp_path / "theirs")
    assert code == 1
    assert "which transformers does not have; sat.load reads it" in err
    assert not (tmp_path / "theirs").exists()


def test_a_folder_that_exists_is_not_written_over(sat: Any, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    code, _, err = sat("convert", tmp_path / "model", tmp_path / "theirs")
    assert code == 1
    assert "never written over in place" in err
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["notes.txt"]
