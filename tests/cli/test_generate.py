"""`sat generate`."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers

import swissarmy
from swissarmy.cli.loading import Quantize
from swissarmy.nn.reduced_linear import Kind


def expected(folder: Path, *prompts: str, **options: Any) -> list[str]:
    model, tokenizer = swissarmy.load(folder), swissarmy.load_tokenizer(folder)
    return swissarmy.generate(model, tokenizer, list(prompts), **options)


def test_generate_streams_what_the_library_generates(sat: Any, tiny: Path) -> None:
    code, out, err = sat("generate", tiny, "--prompt", "once upon", "--max-new-tokens", 8)
    assert (code, err) == (0, "")
    assert out == expected(tiny, "once upon", max_new_tokens=8)[0] + "\n"
    assert sat("generate", tiny, "--prompt", "once upon", "--max-new-tokens", 8, "--no-stream")[1] == out


def test_generate_prints_each_of_several_prompts(sat: Any, tiny: Path) -> None:
    texts = expected(tiny, "once", "a tiny model", max_new_tokens=4)
    want = f"> once\n{texts[0]}\n\n> a tiny model\n{texts[1]}\n"
    for prompts in (["--prompt", "once", "--prompt", "a tiny model"], ["--prompt", "once", "a tiny model"]):
        assert sat("generate", tiny, *prompts, "--max-new-tokens", 4) == (0, want, "")


def test_generate_prints_one_json_object_for_each_prompt(sat: Any, tiny: Path) -> None:
    _, out, _ = sat("generate", "--prompt", "once", "--prompt=a", tiny, "--max-new-tokens", 4, "--json")
    texts = expected(tiny, "once", "a", max_new_tokens=4)
    made = [json.loads(line) for line in out.splitlines()]
    assert [(each["prompt"], each["text"]) for each in made] == [("once", texts[0]), ("a", texts[1])]
    assert [list(each) for each in made] == [["prompt", "text", "finish_reason", "tokens"]] * 2
    want = swissarmy.generate_with_logprobs(
        swissarmy.load(tiny), swissarmy.load_tokenizer(tiny), ["once", "a"], max_new_tokens=4
    )
    for each, generation in zip(made, want, strict=True):
        assert each["finish_reason"] == generation.finish_reason
        assert [token["id"] for token in each["tokens"]] == generation.tokens
        assert [token["logprob"] for token in each["tokens"]] == pytest.approx(generation.logprobs)


def test_generate_in_batches_is_generate_at_once(sat: Any, tiny: Path) -> None:
    options = ["generate", tiny, "--prompt", "once", "a tiny", "model", "--seed", 3, "--max-new-tokens", 6]
    assert sat(*options, "--batch-size", 2) == sat(*options)
    assert sat(*options, "--batch-size", 1, "--no-progress") == sat(*options)


@pytest.mark.parametrize(
    ("flags", "strategy"),
    [
        (["--num-beams", "3"], lambda: swissarmy.BeamSearchStrategy(3)),
        (["--penalty-alpha", "0.6"], lambda: swissarmy.ContrastiveStrategy(0.6, 4)),
        (["--penalty-alpha", "0.3", "--top-k", "7"], lambda: swissarmy.ContrastiveStrategy(0.3, 7)),
    ],
)
def test_generate_searches(sat: Any, tiny: Path, flags: list[str], strategy: Any) -> None:
    texts = expected(tiny, "once", "a tiny model", max_new_tokens=6, strategy=strategy())
    options = ["generate", tiny, "--max-new-tokens", 6, *flags]
    assert sat(*options, "--prompt", "once") == (0, texts[0] + "\n", "")
    assert sat(*options, "--prompt", "once", "a tiny model")[1] == f"> once\n{texts[0]}\n\n> a tiny model\n{texts[1]}\n"


@pytest.mark.parametrize("more", [[], ["--no-stream"], ["--num-beams", "2"], ["--temperature", "3", "--seed", "1"]])
def test_generate_keeps_to_an_expression_or_a_schema(sat: Any, tiny: Path, tmp_path: Path, more: list[str]) -> None:
    options = ["generate", tiny, "--prompt", "once", "--max-new-tokens", 20, *more]
    code, out, err = sat(*options, "--regex", "(time|tiny)( é)?")
    assert (code, err) == (0, "")
    assert re.fullmatch("(time|tiny)( é)?\n", out)
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "properties": {"a": {"enum": [1, "é"]}}, "required": ["a"]}'
    )
    _, out, _ = sat(*options, "--json-schema", tmp_path / "schema.json", "--json")
    made = json.loads(out)
    assert made["finish_reason"] == "end"
    assert json.loads(made["text"])["a"] in (1, "é")


def test_generate_says_what_is_wrong_with_a_schema(sat: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "foo"}')
    flags = ["--prompt", "once", "--max-new-tokens", 8, "--json-schema", tmp_path / "schema.json"]
    code, out, err = sat("generate", tiny, *flags)
    assert (code, out) == (2, "")
    assert "schema.json" in err
    assert "Invalid type: foo" in err


def test_generate_without_the_library_for_constraints_says_what_to_install(
    sat: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    code, _, err = sat("generate", tiny, "--prompt", "once", "--max-new-tokens", 8, "--regex", "a+")
    assert code == 1
    assert 'pip install "swissarmy[constrained]"' in err


def test_generate_shows_a_bar_on_a_terminal_and_nothing_of_it_on_standard_output(
    sat: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["generate", tiny, "--prompt", "once", "a", "tiny", "--max-new-tokens", 8]
    plain = sat(*options)
    assert plain[2] == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    for more in ([], ["--batch-size", "1"], ["--json"]):
        _, out, err = sat(*options, *more)
        assert "generating" in err
        assert more == ["--json"] or out == plain[1]
        assert "generating" not in sat(*options, *more, "--no-progress")[2]


def test_generate_stops_at_a_text(sat: Any, tiny: Path) -> None:
    (text,) = expected(tiny, "once", max_new_tokens=12)
    flags = ["generate", tiny, "--prompt", "once", "--max-new-tokens", 12, "--stop", "never seen", "--stop", text[2:4]]
    want = text[: text.index(text[2:4])] + "\n"
    for stream in ("--stream", "--no-stream"):
        assert sat(*flags, stream) == (0, want, "")
    assert json.loads(sat(*flags, "--json")[1])["finish_reason"] == "stop"
    assert sat(*flags[:6], "--max-time", 100)[1] == text + "\n"


def test_generate_with_a_seed_repeats_itself_and_differs_from_greedy(sat: Any, tiny: Path) -> None:
    options = ["generate", tiny, "--prompt", "once", "--max-new-tokens", 12]
    first, second = (sat(*options, "--seed", 3, "--temperature", 2.0)[1] for _ in range(2))
    strategy = swissarmy.SamplingStrategy(temperature=2.0, seed=3)
    assert first == second == expected(tiny, "once", max_new_tokens=12, strategy=strategy)[0] + "\n"
    assert first != sat(*options)[1]


def test_generate_reads_standard_input_and_a_file(
    sat: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("upon a\ntime\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"once\n")))
    _, out, _ = sat("generate", tiny, "--prompt", "-", "--prompt-file", file, "--json", "--max-new-tokens", 2)
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["once", "upon a\ntime"]


def test_generate_takes_a_dtype(sat: Any, tiny: Path) -> None:
    assert sat("generate", tiny, "--prompt", "once", "--dtype", "bfloat16", "--max-new-tokens", 2)[0] == 0


@pytest.mark.parametrize("kind", get_args(Kind))
def test_generate_takes_reduced_weights(sat: Any, tiny: Path, kind: Kind) -> None:
    model, tokenizer = swissarmy.load(tiny, quantize=kind), swissarmy.load_tokenizer(tiny)
    (made,) = swissarmy.generate_with_logprobs(model, tokenizer, ["once"], max_new_tokens=6)
    code, out, err = sat("generate", tiny, "--prompt", "once", "--max-new-tokens", 6, "--quantize", kind, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["text"] == made.text
    assert [token["logprob"] for token in facts["tokens"]] == pytest.approx(made.logprobs)
    assert get_args(Quantize) == get_args(Kind)


def test_a_kind_of_weights_that_does_not_exist_is_refused_before_anything_is_loaded(sat: Any) -> None:
    for command in ("generate", "chat", "eval"):
        code, out, err = sat(command, "nowhere", "--quantize", "in8")
        assert (code, out) == (2, "")
        for name in ("--quantize", "in8", "int8"):
            assert name in err


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--prompt", "a", "--temperature", "0"], ["--temperature 0.0 must be above 0"]),
        (["--prompt", "a", "--temperature", "nan", "--top-k", "0"], ["--temperature nan", "--top-k 0"]),
        (["--prompt", "a", "--top-p", "1.5"], ["--top-p 1.5"]),
        (["--prompt", "a", "--max-new-tokens", "0"], ["--max-new-tokens 0"]),
        (["--prompt", "a", "--max-new-tokens", "many"], ["--max-new-tokens", "many"]),
        (["--prompt", "a", "--dtype", "float8"], ["float8", "bfloat16"]),
        (["--prompt", "-", "--prompt", "-"], ["--prompt -"]),
        (["--prompt", "a", "--stop", ""], ["--stop"]),
        (["--prompt", "a", "--max-time", "0"], ["--max-time 0"]),
        (["--prompt", "a", "--batch-size", "0"], ["--batch-size 0"]),
        (
            ["--prompt", "a", "--num-beams", "0", "--penalty-alpha", "2"],
            ["--num-beams 0", "--penalty-alpha 2.0", "two"],
        ),
        (["--prompt", "a", "--num-beams", "2", "--top-k", "3"], ["--top-k: a search draws nothing"]),
        (["--prompt", "a", "--penalty-alpha", "0.6", "--seed", "3"], ["--seed: a search draws nothing"]),
        (["--prompt", "a", "--regex", "a", "--json-schema", "b"], ["--regex and --json-schema"]),
        (["--prompt", "a", "--regex", "(", "--max-new-tokens", "9"], ["--regex: regex='('", "unclosed"]),
        (["--prompt", "a", "--json-schema", "none.json", "--max-new-tokens", "9"], ["none.json", "No such file"]),
        (["--prompt", ""], ["prompt 1 is empty"]),
        (["--promt", "a"], ["--promt", "--prompt"]),
        (["--prompt-file", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        ([], ["there is no prompt", "--prompt"]),
    ],
)
def test_generate_refuses_flags_that_cannot_be(sat: Any, tiny: Path, flags: list[str], names: list[str]) -> None:
    code, out, err = sat("generate", tiny, *flags)
    assert (code, out) == (2, "")
    for name in names:
        assert name in err


def test_generate_refuses_a_prompt_file_that_is_not_utf8(sat: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, _, err = sat("generate", tiny, "--prompt-file", tmp_path / "latin.txt")
    assert code == 2
    assert "latin.txt: not valid UTF-8 at byte 3" in err


def test_generate_refuses_a_prompt_longer_than_the_model(sat: Any, tiny: Path) -> None:
    code, _, err = sat("generate", tiny, "--prompt", "a time " * 40)
    assert code == 1
    assert "prompt 1 ('a time a time" in err
    assert "the model's maximum is 32" in err


def test_generate_says_how_many_new_tokens_fit(sat: Any, tiny: Path) -> None:
    code, _, err = sat("generate", tiny, "--prompt", "once")
    assert code == 1
    room = int(err.rsplit("--max-new-tokens ", 1)[1].rstrip(".\n"))
    assert sat("generate", tiny, "--prompt", "once", "--max-new-tokens", room)[0] == 0
    assert sat("generate", tiny, "--prompt", "once", "--max-new-tokens", room + 1)[0] == 1


def test_generate_refuses_a_model_without_a_language_model_head(sat: Any, tiny: Path, tmp_path: Path) -> None:
    transformers.GPT2Model.from_pretrained(tiny).save_pretrained(tmp_path / "base")
    shutil.copy(tiny / "tokenizer.json", tmp_path / "base")
    code, _, err = sat("generate", tmp_path / "base", "--prompt", "once", "--max-new-tokens", 2)
    assert code == 1
    assert "GPT2Model does not generate text" in err


def test_info_and_generate_take_a_model_of_parts(sat: Any, tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=270, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    shutil.copy(tiny / "tokenizer.json", tmp_path / "t5")
    code, out, _ = sat("info", tmp_path / "t5", "--json")
    facts = json.loads(out)
    assert (code, list(facts["sizes"])) == (0, ["encoder", "decoder"])
    assert facts["parameters"]["by_part"]["parts.decoder.transformer.layers"] > 0
    code, out, err = sat("generate", tmp_path / "t5", "--prompt", "once upon", "--max-new-tokens", 4)
    assert (code, err) == (0, "")
    assert out == expected(tmp_path / "t5", "once upon", max_new_tokens=4)[0] + "\n"


def test_generate_without_a_gpu_says_so(sat: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = sat("generate", tiny, "--prompt", "once", "--device", "cuda", "--max-new-tokens", 2)
    assert code == 1
    assert "--device cuda" in err


def test_generate_takes_a_config_file_and_flags_win(sat: Any, tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"path: {tiny}\nprompt: [once]\nmax-new-tokens: 3\njson: true\n")
    (text,) = expected(tiny, "once", max_new_tokens=3)
    code, out, err = sat("generate", "--config", config)
    assert (code, json.loads(out)["text"], err) == (0, text, "")
    _, out, _ = sat("generate", f"--config={config}", "--no-json", "--max-new-tokens", 5, "--prompt", "a")
    assert out == expected(tiny, "a", max_new_tokens=5)[0] + "\n"


def test_generate_reports_every_problem_of_a_config_file(sat: Any, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("prompt: [once]\nmax_new_token: 3\ntop_k: 1.5\njson: yes\ntop_k: 3\n")
    code, out, err = sat("generate", "x", "--config", config)
    assert (code, out) == (2, "")
    assert f"{config}:2: unknown key 'max_new_token'. Did you mean 'max_new_tokens'?" in err
    assert f"{config}:3: top_k: expected a whole number, not '1.5'" in err
    assert f"{config}:4: json: expected true or false, not 'yes'" in err
    assert f"{config}:5: duplicate key 'top_k', given before on line 3" in err


def test_a_config_file_that_is_not_there_is_named(sat: Any) -> None:
    code, _, err = sat("generate", "x", "--config", "nowhere.yaml")
    assert code == 2
    assert "nowhere.yaml: No such file" in err
