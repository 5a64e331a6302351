"""`sat eval`."""

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks as manager
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance

import swissarmy
from swissarmy.generation.harness import HarnessModel

TASKS = Path(__file__).parents[2] / "examples" / "tasks"
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


def test_eval_measures_reduced_weights(sat: Any, tiny: Path, text: Path) -> None:
    code, out, _ = sat("eval", tiny, "--perplexity", text, "--json", "--quantize", "int4")
    ids = torch.tensor(swissarmy.load_tokenizer(tiny).encode(TEXT))
    want = swissarmy.evaluate_perplexity(swissarmy.load(tiny, quantize="int4"), ids, stride=16)
    assert (code, json.loads(out)["nats_per_token"]) == (0, pytest.approx(want.nll))
    assert want.nll != swissarmy.evaluate_perplexity(swissarmy.load(tiny), ids, stride=16).nll


@pytest.mark.parametrize("flags", [["--perplexity", "TEXT"], ["--tasks", "tiny_capitals", "--include-path", TASKS]])
def test_of_the_processes_that_a_launcher_starts_the_first_measures(
    sat: Any, tiny: Path, text: Path, flags: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", tiny, *(text if flag == "TEXT" else flag for flag in flags), "--json"]
    monkeypatch.setenv("RANK", "1")
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        code, out, err = sat(*command)
        assert (code, out) == (0, "")
        assert "leaves that to rank 0" in err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, out, _ = sat(*command)
    assert (code, json.loads(out)["path"]) == (0, str(tiny))


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


# Tasks of lm-evaluation-harness


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(method: Any, *requests: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = method([Instance("loglikelihood", {}, request, 0) for request in requests])
    return found


def expected(harness: HarnessModel) -> dict[str, dict[str, float]]:
    """The metrics of the tasks, from scores and answers, with none of the harness's own bookkeeping."""
    right = right_by_length = exact = 0
    for row in rows("capitals"):
        pairs = [(f"The capital of {row['country']} is", f" {choice}") for choice in row["choices"]]
        scores = [score for score, _ in asked(harness.loglikelihood, *pairs)]
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right += scores.index(max(scores)) == row["answer"]
        right_by_length += by_length.index(max(by_length)) == row["answer"]
    for row in rows("counting"):
        (text,) = asked(harness.generate_until, (row["series"], {"until": [",", "\n"], "max_gen_toks": 8}))
        exact += text.strip() == row["next"]
    texts = [row["text"] for row in rows("sentences")]
    nll = -sum(asked(harness.loglikelihood_rolling, *((text,) for text in texts)))
    num_bytes = sum(len(text.encode()) for text in texts)
    num_words = sum(len(text.split()) for text in texts)
    return {
        "tiny_capitals": {"acc": right / len(rows("capitals")), "acc_norm": right_by_length / len(rows("capitals"))},
        "tiny_counting": {"exact_match,stripped": exact / len(rows("counting"))},
        "tiny_sentences": {
            "word_perplexity": math.exp(nll / num_words),
            "byte_perplexity": math.exp(nll / num_bytes),
            "bits_per_byte": nll / num_bytes / math.log(2),
        },
    }


def values(facts: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        name: {metric: each["value"] for metric, each in task["metrics"].items()}
        for name, task in facts["tasks"].items()
        if task["metrics"]
    }


def test_tasks_of_every_kind_measure_what_the_library_measures(sat: Any, tiny: Path) -> None:
    code, out, err = sat("eval", tiny, "--tasks", "tiny_*", "--include-path", TASKS, "--json", "--batch-size", 5)
    assert code == 0
    facts = json.loads(out)
    want = expected(HarnessModel(swissarmy.load(tiny), swissarmy.load_tokenizer(tiny)))
    assert set(values(facts)) == set(want)
    for name, metrics in values(facts).items():
        assert metrics == pytest.approx(want[name], rel=1e-5), name
    assert facts["tasks"]["tiny_capitals"]["samples"] == 10
    assert facts["tasks"]["tiny_capitals"]["metrics"]["acc"]["stderr"] > 0
    assert f"{facts['truncated']} requests were too long" in err


def test_tasks_print_a_table_and_write_a_report(sat: Any, tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = ["--include-path", TASKS, "--limit", 2, "--num-fewshot", 1, "--output", report]
    code, out, _ = sat("eval", tiny, "--tasks", "tiny_capitals,tiny_sentences", *flags)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["task", "metric", "value", "±", "stderr", "samples", "shots"]
    assert [line[:2] for line in lines[1:3]] == [["tiny_capitals", "acc"], ["tiny_capitals", "acc_norm"]]
    assert {tuple(line[-2:]) for line in lines[1:3]} == {("2", "1")}
    written = json.loads(report.read_text(encoding="utf-8"))
    prompts = [sample["arguments"][0][0] for sample in written["samples"]["tiny_capitals"]]
    assert all(prompt.count("The capital of") == 2 for prompt in prompts)
    code, _, err = sat("eval", tiny, "--tasks", "tiny_capitals", *flags)
    assert (code, "exists already" in err) == (2, True)


def test_tasks_in_a_conversation(sat: Any, tiny: Path, tmp_path: Path) -> None:
    folder, report = tmp_path / "model", tmp_path / "report.json"
    shutil.copytree(tiny, folder)
    flags = ["--include-path", TASKS, "--limit", 1, "--apply-chat-template", "--output", report]
    code, _, err = sat("eval", folder, "--tasks", "tiny_capitals", *flags)
    assert code == 1
    assert "has no chat template" in err
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    assert sat("eval", folder, "--tasks", "tiny_capitals", *flags)[0] == 0
    (sample,) = json.loads(report.read_text(encoding="utf-8"))["samples"]["tiny_capitals"]
    assert sample["arguments"][0][0] == "[user] The capital of France is"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--tasks", "tiny_capitls", "--include-path", "TASKS"], ["'tiny_capitls'", "'tiny_capitals'"]),
        (["--tasks", "tiny", "--include-path", "nowhere"], ["--include-path nowhere"]),
        (["--tasks", "tiny", "--include-path", "TASKS", "--output", "nowhere/r.json"], ["no folder nowhere"]),
        (["--tasks", "tiny", "--limit", "0", "--batch-size", "0"], ["--limit 0", "--batch-size 0"]),
        (["--tasks", "tiny", "--stride", "5"], ["--stride goes with --perplexity"]),
        (["--tasks", "tiny", "--perplexity", "TEXT"], ["one of them"]),
        (["--perplexity", "TEXT", "--output", "r.json"], ["--output goes with --tasks"]),
    ],
)
def test_eval_refuses_tasks_that_cannot_be(
    sat: Any, tiny: Path, text: Path, flags: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the names of the harness's own tasks, without the time that it takes to read them all
    monkeypatch.setattr(manager, "TaskManager", partial(manager.TaskManager, include_defaults=False))
    code, out, err = sat("eval", tiny, *({"TEXT": text, "TASKS": TASKS}.get(flag, flag) for flag in flags))
    assert (code, out) == (2, "")
    for name in names:
        assert name in err


def test_tasks_without_the_extra_name_the_cure(sat: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = sat("eval", tiny, "--tasks", "hellaswag")
    assert code == 1
    assert 'pip install "swissarmy[eval]"' in err


def test_gemma_does_the_tasks_as_the_reference(sat: Any, gemma_gguf: Path) -> None:
    """Measured with the harness's `HFLM` on the same dequantised weights: lm_eval 0.4.13, transformers 5.23."""
    code, out, _ = sat("eval", gemma_gguf, "--tasks", "tiny", "--include-path", TASKS, "--json")
    assert code == 0
    measured = values(json.loads(out))
    assert measured["tiny_capitals"] == {"acc": 1.0, "acc_norm": 0.7}
    assert measured["tiny_counting"] == {"exact_match,stripped": 1.0}
    assert measured["tiny_sentences"]["bits_per_byte"] == pytest.approx(1.6378680676342718, rel=1e-5)
