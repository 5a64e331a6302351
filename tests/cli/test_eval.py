"""`sat eval`."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import swissarmy

TEXT = "once upon a time there was a tiny model, and caf\u00e9s. " * 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_eval_measures_what_the_library_measures(sat: Any, tiny: Path, text: Path) -> None:
    """The text is longer than the model's 32 positions."""
    model, tokenizer = swissarmy.load(tiny), swissarmy.load_tokenizer(tiny)
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 64
    for flags, stride in ([], 16), (["--stride", 5], 5):
        code, out, err = sat("eval", tiny, "--perplexity", text, "--json", *flags)
        facts = json.loads(out)
        want = swissarmy.evaluate_perplexity(model, torch.tensor(ids), stride=stride)
        assert (code, err, facts["stride"]) == (0, "", stride)
        assert (facts["perplexity"], facts["nats_per_token"], facts["tokens"]) == pytest.approx(want)
        first = len(tokenizer.decode(ids[:1]).encode())
        assert facts["bytes"] == len(TEXT.encode()) - first
        assert facts["bits_per_byte"] == pytest.approx(want.nll * want.tokens / math.log(2) / facts["bytes"])


def test_eval_prints_a_table(sat: Any, tiny: Path, text: Path) -> None:
    code, out, err = sat("eval", tiny, "--perplexity", text, "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    for name in ("perplexity", "nats per token", "bits per byte", "tokens", "seconds"):
        assert name in out


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--perplexity", "nowhere.txt"], ["--perplexity nowhere.txt", "No such file"]),
        ([], ["--perplexity"]),
        (["--perplexity", "TEXT", "--stride", "0"], ["--stride 0"]),
        (["--perplexity", "TEXT", "--stride", "32"], ["--stride 32", "below 32"]),
        (["--perplexity", "EMPTY"], ["0 tokens"]),
        (["--perplexity", "LATIN"], ["not valid UTF-8 at byte 3"]),
    ],
)
def test_eval_refuses_what_cannot_be(
    sat: Any, tiny: Path, text: Path, tmp_path: Path, flags: list[str], names: list[str]
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    files = {"TEXT": text, "EMPTY": tmp_path / "empty.txt", "LATIN": tmp_path / "latin.txt"}
    code, out, err = sat("eval", tiny, *(files.get(flag, flag) for flag in flags))
    assert (code, out) == (2, "")
    for name in names:
        assert name in err


def test_eval_refuses_a_model_that_answers_a_source(sat: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=270, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    shutil.copy(tiny / "tokenizer.json", tmp_path / "t5")
    code, _, err = sat("eval", tmp_path / "t5", "--perplexity", text)
    assert code == 1
    assert "answers a source text" in err
