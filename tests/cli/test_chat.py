"""`sat chat`."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import swissarmy
from swissarmy.generation.chat import Chat

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + ':' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put lines on standard input, which is no terminal."""

    def say(*lines: str) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    return say


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch, says: Any) -> Any:
    """Type lines at a terminal; the last one is the end of the input."""

    def type_lines(*lines: str) -> None:
        says()
        waiting: Iterator[str] = iter(lines)

        def read(prompt: str) -> str:
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", read)

    return type_lines


def expected(folder: Path, *lines: str, system: str | None = None, **options: Any) -> str:
    tokenizer = swissarmy.load_tokenizer(folder).with_chat_template(TEMPLATE)
    chat = Chat(swissarmy.load(folder), tokenizer, system=system, **options)
    return "".join("".join(chat.reply(line)) + "\n" for line in lines)


def test_each_line_of_standard_input_is_answered(sat: Any, tiny: Path, template: Path, says: Any) -> None:
    says("once", "", "upon\r")
    flags = ["chat", tiny, "--template", template, "--max-new-tokens", 4]
    assert sat(*flags) == (0, expected(tiny, "once", "upon", max_new_tokens=4), "")
    says("once", "/reset", "upon", "/system be", "a", "/quit", "never asked")
    want = expected(tiny, "once", max_new_tokens=4) + expected(tiny, "upon", max_new_tokens=4)
    code, out, err = sat(*flags)
    assert (code, err) == (0, "")
    assert out.startswith(want)
    assert out.count("\n") >= 3


def test_chat_takes_a_system_prompt_and_sampling_flags(sat: Any, tiny: Path, template: Path, says: Any) -> None:
    says("once")
    strategy = swissarmy.SamplingStrategy(temperature=2.0, seed=3)
    want = expected(tiny, "once", system="be", max_new_tokens=4, strategy=strategy)
    flags = ["--system", "be", "--seed", 3, "--temperature", 2.0, "--max-new-tokens", 4]
    assert sat("chat", tiny, "--template", template, *flags) == (0, want, "")


def test_chat_takes_reduced_weights(sat: Any, tiny: Path, template: Path, says: Any) -> None:
    says("once")
    chat = Chat(
        swissarmy.load(tiny, quantize="int4"),
        swissarmy.load_tokenizer(tiny).with_chat_template(TEMPLATE),
        max_new_tokens=4,
    )
    want = "".join(chat.reply("once")) + "\n"
    assert sat("chat", tiny, "--template", template, "--quantize", "int4", "--max-new-tokens", 4) == (0, want, "")


def test_a_template_that_comes_with_the_checkpoint_is_used(sat: Any, tiny: Path, tmp_path: Path, says: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    says("once")
    assert sat("chat", folder, "--max-new-tokens", 4) == (0, expected(tiny, "once", max_new_tokens=4), "")


def test_a_base_model_is_refused_with_the_cure(sat: Any, tiny: Path, says: Any) -> None:
    says("once")
    code, out, err = sat("chat", tiny)
    assert (code, out) == (1, "")
    assert "no chat template" in err
    assert "--template FILE" in err


def test_a_model_that_answers_single_texts_is_refused(sat: Any, tiny: Path, tmp_path: Path, says: Any) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=270, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    shutil.copy(tiny / "tokenizer.json", tmp_path / "t5")
    says("once")
    code, _, err = sat("chat", tmp_path / "t5")
    assert code == 1
    assert "sat generate" in err


def test_at_a_terminal_mistakes_and_interrupts_end_only_the_reply(
    sat: Any, tiny: Path, template: Path, types: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(chat: Chat, text: str) -> Iterator[str]:
        yield f"<{text}"
        if text == "long":
            raise KeyboardInterrupt
        yield ">"

    types("long", "/rest", "a" * 40, "hello")
    monkeypatch.setattr(Chat, "reply", reply)
    code, out, err = sat("chat", tiny, "--template", template)
    assert code == 0
    assert out.splitlines() == ["<long", f"<{'a' * 40}>", "<hello>", ""]
    assert "Did you mean '/reset'?" in err
    assert "Ctrl-C interrupts" in err


def test_at_a_terminal_a_full_conversation_can_be_reset(sat: Any, tiny: Path, template: Path, types: Any) -> None:
    types("a time " * 40, "/reset", "once")
    code, out, err = sat("chat", tiny, "--template", template, "--max-new-tokens", 4)
    assert (code, out) == (0, expected(tiny, "once", max_new_tokens=4) + "\n")
    assert "/reset" in err


@pytest.mark.parametrize(
    ("lines", "flags", "code", "message"),
    [
        (["/rest"], [], 2, "Did you mean '/reset'?"),
        (["a time " * 40], [], 1, "the model's maximum is 32"),
        ([], ["--max-new-tokens", "0"], 2, "--max-new-tokens 0"),
        ([], ["--template", "nowhere.jinja"], 2, "nowhere.jinja: No such file"),
        ([], ["--temperature", "0"], 2, "--temperature 0.0"),
    ],
)
def test_in_a_pipe_mistakes_end_the_run(
    sat: Any, tiny: Path, template: Path, says: Any, lines: list[str], flags: list[str], code: int, message: str
) -> None:
    says(*lines)
    got, _, err = sat("chat", tiny, "--template", template, *flags)
    assert got == code
    assert message in err
