"""`HarnessModel`: as the harness's own `HFLM` on the same weights, and as full forward passes written out."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import swissarmy as sat
from swissarmy.generation import continuations
from swissarmy.generation.harness import HarnessModel
from swissarmy.testing import tiny_model

TEXT = "once upon a time there was a tiny model that could count, and it lived in a small machine."
CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
QUESTIONS = [
    ("once upon a time there", " was a tiny model"),
    ("once upon a time there", " was"),
    ("once upon a time there", " machine."),
    ("", "once upon"),
    ("a small machine. ", "count"),
    ("x" * 60, " could count"),
    ("<s>once", " upon"),
]


def saved_tokenizer(folder: Path, *, begins: bool) -> None:
    """Byte-level; with a token at the beginning of each text, or with an end token alone."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    roles = {"eos_token": "<|end|>"}
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        roles["bos_token"] = "<s>"
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    wrapped.chat_template = CHAT
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with 48 positions, as `transformers` writes it."""
    folder = tmp_path_factory.mktemp(request.param)
    saved_tokenizer(folder, begins=request.param == "llama")
    torch.manual_seed(0)
    begin = int(request.param == "llama")
    sizes = {"vocab_size": 290, "eos_token_id": 0, "bos_token_id": begin, "initializer_range": 0.3}
    if request.param == "gpt2":
        config: Any = transformers.GPT2Config(n_positions=48, n_embd=32, n_layer=2, n_head=4, **sizes)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=48,
            **sizes,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def own(folder: Path, **options: Any) -> HarnessModel:
    return HarnessModel(sat.load(folder, dtype=torch.float64), sat.load_tokenizer(folder), **options)


def reference(folder: Path, *, batch_size: int = 3) -> HFLM:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # its cache mixes up requests whose tokens are the same and whose continuations begin in different places
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu", logits_cache=False)


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


def test_likelihoods_are_those_of_the_reference(folder: Path) -> None:
    requests = instances("loglikelihood", QUESTIONS)
    want = reference(folder).loglikelihood(requests, disable_tqdm=True)
    for batch_size in (1, 3, 20):
        harness = own(folder, batch_size=batch_size)
        got = harness.loglikelihood(requests)
        for (logprob, is_greedy), (wanted, greedy) in zip(got, want, strict=True):
            assert logprob == pytest.approx(wanted, rel=1e-9)
            assert is_greedy == greedy
        assert harness.num_truncated == 1


def test_likelihoods_are_those_of_full_forward_passes(folder: Path) -> None:
    model, harness = sat.load(folder, dtype=torch.float64), own(folder)
    for question, answer in QUESTIONS:
        context = question.rstrip()
        continuation = question[len(context) :] + answer  # a space between them belongs to what follows
        ids = harness.tok_encode(context) or [harness.prefix_token_id]
        both = harness.tok_encode(context + continuation)
        text = both if both[: len(ids)] == ids else [*ids, *both]
        start = max(len(text) - 49, 0)
        with torch.no_grad():
            logits = model(torch.tensor([text[start:-1]]))[0][0]
        targets = torch.tensor(text[start + 1 :])
        first = len(ids) - start - 1
        own_logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[first:]
        ((logprob, is_greedy),) = harness.loglikelihood(instances("loglikelihood", [(question, answer)]))
        assert logprob == pytest.approx(float(own_logprobs.sum()), rel=1e-9)
        assert is_greedy == bool((logits.argmax(-1) == targets)[first:].all())


def test_long_texts_are_scored_in_the_windows_of_the_reference(folder: Path) -> None:
    texts = [TEXT, "tiny", TEXT * 3, "<s>once"]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    want = reference(folder).loglikelihood_rolling(requests, disable_tqdm=True)
    assert own(folder).loglikelihood_rolling(requests) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("settings", [{"until": [" a", "\n"], "max_gen_toks": 9}, {"until": [], "max_gen_toks": 6}])
def test_answers_are_those_of_the_reference(folder: Path, settings: dict[str, Any]) -> None:
    requests = instances("generate_until", [(context or "once", settings) for context, _ in QUESTIONS])
    # a row alone: the reference pads with a token that its model sees
    want = reference(folder, batch_size=1).generate_until(requests, disable_tqdm=True)
    assert len(set(want)) > 3
    for batch_size in (1, 4):
        harness = own(folder, batch_size=batch_size)
        assert harness.generate_until(requests) == want
        assert harness.num_truncated == 1


def test_conversations_are_rendered_as_by_the_reference(folder: Path) -> None:
    mine, other = own(folder), reference(folder)
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " it is"}]
    for history, add_generation_prompt in ((said[:1], True), (said, False)):
        text = mine.apply_chat_template(history, add_generation_prompt)
        assert text == other.apply_chat_template(history, add_generation_prompt)
        assert mine.tok_encode(text) == other.tok_encode(text)
    assert mine.chat_template(True) == CHAT
    other_template = mine.tokenizer.with_chat_template("{{ messages[0]['content'] }}")
    assert mine.tokenizer_name != HarnessModel(mine.model, other_template).tokenizer_name


def test_an_answer_without_a_question_and_one_that_is_drawn(folder: Path) -> None:
    settings = {"until": ["\n"], "max_gen_toks": 5, "do_sample": True, "temperature": 1.5, "repetition_penalty": 1.2}
    requests = instances("generate_until", [(context, settings) for context, _ in QUESTIONS])
    drawn = own(folder).generate_until(requests)
    assert drawn == own(folder, batch_size=2).generate_until(requests)
    assert drawn != own(folder, seed=100).generate_until(requests)


def test_choices_share_the_reading_of_their_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = continuations.scores_of_targets

    def counted(decoder: Any, tokens: torch.Tensor, *args: Any, **kw_args: Any) -> Any:
        read.append(tokens.numel())
        return real(decoder, tokens, *args, **kw_args)

    monkeypatch.setattr(continuations, "scores_of_targets", counted)
    question = "once upon a time there was a tiny model"
    harness = own(folder)
    harness.loglikelihood(instances("loglikelihood", [(question, answer) for answer in (" a", " b", " c", " d")]))
    assert sum(read) < 1.7 * len(harness.tok_encode(question))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, sat.ConfigError, "batch_size=0"),
        ({"max_length": 49}, sat.ConfigError, "max_length=49 must be at least 1 and at most 48"),
        ({"max_new_tokens": 0}, sat.ConfigError, "max_new_tokens=0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    folder: Path, options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        own(folder, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"until": [], "top_kk": 3}, "'top_kk'.*Did you mean 'top_k'"),
        ({"until": [], "max_gen_toks": 48}, "asks for 48 new tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        own(folder).generate_until(instances("generate_until", [("once", settings)]))


def test_a_continuation_longer_than_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(sat.HookCallError, match="the model reads 48"):
        own(folder).loglikelihood(instances("loglikelihood", [("once", "x" * 60)]))


@pytest.mark.parametrize(("family", "message"), [("t5", "answers a source"), ("bert", "from both sides")])
def test_models_that_continue_no_text_are_refused(family: str, message: str, folder: Path) -> None:
    with pytest.raises(sat.HookCallError, match=message):
        HarnessModel(tiny_model(family), sat.load_tokenizer(folder))


def test_without_the_extra_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "swissarmy.generation.harness")
    with pytest.raises(sat.MissingExtraError, match=r'pip install "swissarmy\[eval\]"'):
        importlib.import_module("swissarmy.generation.harness")
