"""`sat models`."""

import json
from typing import Any

import swissarmy


def test_models_lists_every_family_with_its_heads_and_presets(sat: Any) -> None:
    code, out, err = sat("models")
    assert (code, err) == (0, "")
    for name in swissarmy.list_models():
        assert name in out
    assert "GPT2ForTokenClassification" in out
    assert "gpt2-xl\N{NO-BREAK SPACE}(1.56\N{NO-BREAK SPACE}B)" in out


def test_models_prints_json(sat: Any) -> None:
    code, out, _ = sat("models", "--json")
    families = {family["name"]: family for family in json.loads(out)}
    assert code == 0
    assert list(families) == swissarmy.list_models()
    assert families["gpt2"]["presets"]["gpt2"] == 124_439_808
    assert families["gpt2"]["architectures"][0] == "GPT2LMHeadModel"
    assert families["gpt2"]["description"].startswith("GPT-2 (Radford et al. 2019)")
