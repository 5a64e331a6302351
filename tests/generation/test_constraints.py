"""Constraints: whatever the model and the strategy, what comes out matches, byte by byte."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

import swissarmy as sat
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.generation.token_bytes import token_bytes
from swissarmy.testing import tiny_model

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def byte_level() -> Tokenizer:
    """Like GPT-2's: characters outside ASCII are several tokens."""
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("y", "e"),
        ("ye", "s"),
        ("n", "o"),
        ("Ġ", "n"),
        ("Ġn", "o"),
        ("æ", "Ĺ"),
        ("{", '"'),
    ]
    names = ["<end>", "<turn>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    backend = Backend(models.BPE(vocab=_numbered(names), merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<turn>"])
    return Tokenizer(backend, special_tokens={"eos_token": "<end>"}, eos_token_ids=[1])


def sentencepiece(*, drops_space: bool) -> Tokenizer:
    """Like LLaMA 2's, or Gemma's, which keeps the first space: single bytes where a character has no token."""
    merges = [("▁", "y"), ("▁", "n"), ("n", "o"), ("y", "e")]
    names = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    names += [left + right for left, right in merges]
    model = models.BPE(vocab=_numbered(names), merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = Backend(model)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if drops_space else steps)
    return Tokenizer(backend, special_tokens={"eos_token": "<end>", "unk_token": "<unk>"})


def unigram() -> Tokenizer:
    """Like T5's: pieces with a space in front, no bytes."""
    names = ["<end>", "<unk>", "▁", "▁no", "▁yes", "may", *LETTERS]
    backend = Backend(models.Unigram([(name, -float(number)) for number, name in enumerate(names)], unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, special_tokens={"eos_token": "<end>", "unk_token": "<unk>"})


def _numbered(names: list[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "sentencepiece": lambda: sentencepiece(drops_space=False),
    "sentencepiece that drops the first space": lambda: sentencepiece(drops_space=True),
    "unigram": unigram,
}
STRATEGIES: dict[str, Callable[[], sat.Strategy]] = {
    "greedy": sat.GreedyStrategy,
    "sampling": lambda: sat.SamplingStrategy(temperature=3.0, seed=5),
    "top-k": lambda: sat.SamplingStrategy(top_k=2, seed=5),
    "beams": lambda: sat.BeamSearchStrategy(3, num_return_sequences=2),
    "groups": lambda: sat.BeamSearchStrategy(4, num_beam_groups=2, diversity_penalty=1.0),
    "contrastive": lambda: sat.ContrastiveStrategy(0.6, 4),
    "prompt lookup": sat.PromptLookupStrategy,
    "no repetition": lambda: sat.GreedyStrategy(repetition_penalty=1.3, presence_penalty=0.5),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 1, "maxItems": 2},
        "note": {"type": ["null", "boolean"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_valid(text: str) -> bool:
    """What `SCHEMA` says, by hand."""
    read = json.loads(text)
    return (
        isinstance(read, dict)
        and set(read) - {"note"} == {"name", "age", "tags"}
        and isinstance(read["name"], str)
        and len(read["name"]) <= 4
        and type(read["age"]) is int
        and 0 <= read["age"] <= 150
        and 1 <= len(read["tags"]) <= 2
        and set(read["tags"]) <= {"yes", "no"}
        and read.get("note") in (None, True, False)
    )


def model_for(tokenizer: Tokenizer, family: str = "llama") -> Any:
    """A tiny model whose vocabulary is larger than the tokenizer's, as those of real checkpoints are."""
    longest = {"gpt2": {"n_positions": 256}, "t5": {}}.get(family, {"max_position_embeddings": 256})
    return tiny_model(family, vocab_size=len(tokenizer) + 7, **longest)


@pytest.mark.parametrize("pattern", ["(yes|no)( maybe| naïve){0,3}", "[a-z]{1,5}( [0-9]{2})?", "[日本語é]{1,4}"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["byte-level", "sentencepiece", "sentencepiece that drops the first space"])
def test_every_text_matches_the_expression(name: str, strategy: str, pattern: str) -> None:
    tokenizer = TOKENIZERS[name]()
    texts = sat.generate(
        model_for(tokenizer),
        tokenizer,
        ["hello", "the names are"],
        max_new_tokens=40,
        strategy=STRATEGIES[strategy](),
        regex=pattern,
    )
    assert texts
    assert all(re.fullmatch(pattern, text) for text in texts), texts


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "t5"])
def test_every_text_is_json_of_the_schema(family: str, strategy: str) -> None:
    tokenizer = byte_level()
    model = model_for(tokenizer, family)
    made = sat.generate_with_logprobs(
        model, tokenizer, ["hello", "the"], max_new_tokens=120, strategy=STRATEGIES[strategy](), json_schema=SCHEMA
    )
    assert {each.finish_reason for each in made} == {"end"}
    assert all(is_valid(each.text) for each in made), [each.text for each in made]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_tokens_are_those_of_the_decoded_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    found = token_bytes(tokenizer)
    for text in ["yes no hello", "may be no"] + ([] if name == "unigram" else ["naïve 日本 ß", "ab\n\tc"]):
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(found.tokens[number] for number in ids)
        assert joined.removeprefix(b" " if found.drops_first_space else b"").decode() == tokenizer.decode(ids)
    assert all(found.tokens[number] == b"" for number in tokenizer.special_ids)
    assert found.drops_first_space == ("drops" in name or name == "unigram")


def test_a_unigram_model_answers_one_of_a_list() -> None:
    tokenizer = unigram()
    model = model_for(tokenizer, "t5")
    texts = sat.generate(model, tokenizer, ["hello", "no"], max_new_tokens=20, regex="yes|no|maybe")
    assert all(text in ("yes", "no", "maybe") for text in texts)


def test_streamed_pieces_are_the_text() -> None:
    tokenizer = byte_level()
    model = model_for(tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 40, "regex": "[é日]{3,6}"}
    pieces = list(sat.stream(model, tokenizer, "hello", **options))
    assert [("".join(pieces))] == sat.generate(model, tokenizer, "hello", **options)
    assert re.fullmatch("[é日]{3,6}", "".join(pieces))


def test_a_constrained_search_is_the_search_over_the_texts_that_match() -> None:
    tokenizer = byte_level()
    model = model_for(tokenizer).double()
    answers = ["yes", "no", "maybe", "true"]
    prompt = tokenizer.encode("hello")
    end = tokenizer.eos_token_ids[0]

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids, end]]))[0][0].log_softmax(dim=-1)
        return sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate([*ids, end]))

    def cuts(text: bytes) -> list[list[int]]:
        """Every way to cut a text into tokens."""
        if not text:
            return [[]]
        firsts = [number for number, each in enumerate(pieces) if each and text.startswith(each)]
        return [[first, *rest] for first in firsts for rest in cuts(text[len(pieces[first]) :])]

    pieces = token_bytes(tokenizer).tokens
    best = max((score(ids), answer) for answer in answers for ids in cuts(answer.encode()))
    constraint = sat.regex_constraint(tokenizer, "|".join(answers))
    beams = sat.BeamSearchStrategy(60, processors=[constraint], end_tokens=[end], num_return_sequences=1)
    (text,) = sat.generate(model, tokenizer, "hello", max_new_tokens=8, strategy=beams)
    assert beams.scores is not None
    assert (float(beams.scores[0]), text) == (pytest.approx(best[0]), best[1])


def test_an_end_token_comes_where_the_text_is_complete_and_nowhere_else() -> None:
    tokenizer = byte_level()
    processor = sat.regex_constraint(tokenizer, "no+").begin([0, 1])
    prompt = tokenizer.encode("hello")
    (n,), (o,), (no,) = (tokenizer.encode(text) for text in ("n", "o", "no"))
    logits = torch.zeros(3, len(tokenizer) + 7)

    def allowed(*rows: list[int]) -> list[set[int]]:
        tokens = torch.tensor([[*prompt, *row] for row in rows])
        return [set(torch.isfinite(row).nonzero().flatten().tolist()) for row in processor(logits[: len(rows)], tokens)]

    assert allowed([]) == [{n, no}]
    assert allowed([n], [no]) == [{o}, {o, 0, 1}]
    assert allowed([no, o], [no, o], [n, o]) == [{o, 0, 1}] * 3
    assert len(allowed([no, 0])[0]) == len(tokenizer) + 7


def test_rows_of_different_lengths_and_beams_follow_their_own_state() -> None:
    tokenizer = byte_level()
    model = model_for(tokenizer).double()
    prompts = ["hello world", "no", "the names are true, false"]
    for strategy in (sat.GreedyStrategy(), sat.SamplingStrategy(temperature=3.0, seed=2), sat.BeamSearchStrategy(3)):
        options: dict[str, Any] = {"max_new_tokens": 30, "regex": "([a-z]{2} ){1,4}"}
        together = sat.generate(model, tokenizer, prompts, strategy=strategy, **options)
        assert all(re.fullmatch(options["regex"], text) for text in together)
        if not isinstance(strategy, sat.SamplingStrategy):
            assert together == [
                sat.generate(model, tokenizer, each, strategy=strategy, **options)[0] for each in prompts
            ]


def test_guesses_that_do_not_come_true_leave_no_trace() -> None:
    tokenizer = byte_level()
    model = model_for(tokenizer).double()
    draft = tiny_model("llama", seed=9, vocab_size=len(tokenizer) + 7).double()
    plain = sat.SamplingStrategy(temperature=2.0, seed=4)
    options: dict[str, Any] = {"max_new_tokens": 30, "regex": "(ab|cd|ef| )+x"}
    expected = sat.generate(model, tokenizer, ["hello", "no"], strategy=plain, **options)
    for guessing in (sat.PromptLookupStrategy(plain), sat.SpeculativeStrategy(draft, plain, num_guesses=3)):
        assert sat.generate(model, tokenizer, ["hello", "no"], strategy=guessing, **options) == expected


def test_given_tokens_after_a_gap_belong_to_the_text() -> None:
    tokenizer = byte_level()
    model = model_for(tokenizer)
    x, y = tokenizer.encode("x")[0], tokenizer.encode("y")[0]
    constraint = sat.regex_constraint(tokenizer, "[ab][xz][ab]")
    strategy = sat.GreedyStrategy([0], processors=[constraint])
    row = [*tokenizer.encode("hello"), -1, x, -1, -1]
    tokens, _ = sat.fill_sequence(model, torch.tensor(row), strategy=strategy)
    assert re.fullmatch("[ab]x[ab]", tokenizer.decode(tokens[0, len(row) - 4 : -1]))
    assert int(tokens[0, -1]) == 0
    row[-3] = y
    with pytest.raises(sat.HookCallError, match="every token is ruled out in row 0"):
        sat.fill_sequence(model, torch.tensor(row), strategy=strategy)


def test_a_dead_end_is_an_error_and_not_a_wrong_text() -> None:
    tokenizer = unigram()
    for strategy in (sat.GreedyStrategy(), sat.BeamSearchStrategy(2)):
        with pytest.raises(sat.HookCallError, match=r"every token is ruled out|row 0 has 0 sequences"):
            sat.generate(model_for(tokenizer), tokenizer, "hello", regex="yes§", strategy=strategy, max_new_tokens=9)


def test_a_constraint_serves_many_runs_and_may_be_shared() -> None:
    tokenizer = byte_level()
    model = model_for(tokenizer)
    constraint = sat.json_schema_constraint(tokenizer, json.dumps(SCHEMA))
    strategy = sat.SamplingStrategy(seed=3, processors=[constraint])
    first = sat.generate(model, tokenizer, ["hello", "no"], strategy=strategy, max_new_tokens=120)
    assert all(map(is_valid, first))
    assert sat.generate(model, tokenizer, ["hello", "no"], strategy=strategy, max_new_tokens=120) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "regex='('"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "a", "json_schema": {}}, "two constraints"),
        ({"json_schema": {"type": "foo"}}, "Invalid type: foo"),
        ({"json_schema": {"not": {"type": "string"}}}, "not"),
        ({"json_schema": "{"}, "json_schema: no JSON"),
        ({"json_schema": "[]"}, "is no object"),
        ({"json_schema": {"enum": {1}}}, "json_schema: no JSON"),
    ],
)
def test_what_cannot_be_followed_is_named(options: dict[str, Any], message: str) -> None:
    tokenizer = byte_level()
    with pytest.raises(sat.ConfigError) as error:
        sat.generate(model_for(tokenizer), tokenizer, "hello", **options)
    assert message in str(error.value)


def test_what_has_no_end_or_no_bytes_is_refused() -> None:
    tokenizer = byte_level()
    strategy = sat.GreedyStrategy(processors=[sat.regex_constraint(tokenizer, "a+")])
    with pytest.raises(sat.HookCallError, match="give end_tokens"):
        sat.fill_sequence(model_for(tokenizer), torch.tensor([5, -1]), strategy=strategy)
    with pytest.raises(sat.TokenizerError, match=r"use sat\.load_tokenizer"):
        sat.regex_constraint(object(), "a")
    words = Backend(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(sat.TokenizerError, match="WordPiece"):
        sat.regex_constraint(Tokenizer(words), "a")


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(sat.MissingExtraError, match=r'pip install "swissarmy\[constrained\]"'):
        sat.regex_constraint(byte_level(), "a")
