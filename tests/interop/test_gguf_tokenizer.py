"""The tokenizer inside GGUF files: the real one of Gemma 3, and small ones written here."""

import io
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from swissarmy.core.errors import TokenizerError
from swissarmy.data.tokenizer import TextStream, Tokenizer
from swissarmy.interop.gguf_tokenizer import load_gguf_tokenizer, merges_from_scores
from swissarmy.interop.tokenizer import load_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gemma3_270m_prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def gemma(gemma_gguf: Path) -> Tokenizer:
    return load_tokenizer(gemma_gguf)


def test_gemma_gives_the_ids_of_the_reference(gemma: Tokenizer) -> None:
    for prompt in GOLDEN["prompts"]:
        assert gemma.encode(prompt["text"]) == prompt["ids"]
        assert gemma.decode(prompt["ids"]) == prompt["text"]
        assert gemma.decode(prompt["output_ids"]) == prompt["output_text"]
    long = GOLDEN["long"]
    assert gemma.encode(long["text"])[: len(long["ids"])] == long["ids"]
    assert gemma.decode(gemma.encode(long["text"])) == long["text"]


def test_gemma_streams_the_reference_text(gemma: Tokenizer) -> None:
    for prompt in [*GOLDEN["prompts"], GOLDEN["long"]]:
        stream = TextStream(gemma)
        ids = gemma.encode(prompt["text"])
        assert "".join([*map(stream.put, ids), stream.end()]) == prompt["text"]


def test_gemma_has_its_special_tokens(gemma: Tokenizer) -> None:
    assert len(gemma) == gemma.vocab_size == 262144
    assert gemma.special_tokens == {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    assert (gemma.pad_token_id, gemma.eos_token_id, gemma.bos_token_id, gemma.unk_token_id) == (0, 1, 2, 3)
    assert gemma.eos_token_ids == (1, gemma.token_to_id("<end_of_turn>"))
    turn = gemma.encode("<start_of_turn>user\nHi<end_of_turn>")
    assert gemma.decode(turn) == "user\nHi"
    assert gemma.decode(turn, skip_special_tokens=False) == "<bos><start_of_turn>user\nHi<end_of_turn>"
    assert gemma.encode("x\n\n<b>", add_special_tokens=False)[1:] == [108, gemma.token_to_id("<b>")]


@given(text=st.text(max_size=40))
def test_gemma_round_trips_any_text(gemma: Tokenizer, text: str) -> None:
    ids = gemma.encode(text)
    stream = TextStream(gemma)
    pieces = [*map(stream.put, ids), stream.end()]
    assert "".join(pieces) == gemma.decode(ids)
    if "▁" not in text:
        assert gemma.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_gemma_can_be_saved_and_loaded(gemma: Tokenizer, tmp_path: Path) -> None:
    gemma.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for prompt in GOLDEN["prompts"]:
        assert again.encode(prompt["text"]) == prompt["ids"]
    assert again.eos_token_ids == gemma.eos_token_ids


def test_merges_follow_the_scores_and_a_longer_left_part_goes_first() -> None:
    scores = {"a": -10.0, "b": -11.0, "c": -12.0, "bc": -2.0, "ab": -1.0, "abc": -3.0}
    assert merges_from_scores(scores) == [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]


def write_gguf(path: Path, fields: dict[str, Any]) -> Path:
    """A GGUF file with a tokenizer and one small tensor; keys without `tokenizer.ggml.`."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in fields.items():
        name = key if "." in key else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_fields(**changes: Any) -> dict[str, Any]:
    pieces = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)]
    pieces += [(f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)]
    pieces += [("▁a", 1, -1.0), ("ab", 1, -2.0), ("▁ab", 1, -3.0), ("  ", 4, 0.0), ("<|eot_id|>", 3, 0.0)]
    pieces += [(letter, 1, -100.0) for letter in "▁ab"]
    tokens, types, scores = map(list, zip(*pieces, strict=True))
    return {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, **changes}


def test_a_llama_file_has_byte_fallback_and_a_space_before_the_text(tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "x.gguf", llama_fields()))
    tokens = [tokenizer.id_to_token(number) for number in tokenizer.encode("ab aé")]
    assert tokens == ["<s>", "▁ab", "▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab aé")) == "ab aé"
    assert tokenizer.eos_token_ids == (2, tokenizer.token_to_id("<|eot_id|>"))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_the_fields_of_the_file_are_honoured(tmp_path: Path) -> None:
    fields = llama_fields(add_space_prefix=False, add_bos_token=False, add_eos_token=True, padding_token_id=0)
    fields["tokenizer.chat_template"] = "{{ bos_token }}!"
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "x.gguf", fields))
    tokens = [tokenizer.id_to_token(number) for number in tokenizer.encode("ab  a")]
    assert tokens == ["ab", "  ", "a", "</s>"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"
    assert tokenizer.apply_chat_template([]) == "<s>!"
    assert tokenizer.pad_token_id == 0
    assert tokenizer("a", text_pair="b").token_type_ids.tolist() == [[0, 0, 1, 1]]


def test_merges_from_scores_give_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    text = GOLDEN["long"]["text"]
    serialised = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text.split("\n") if line.strip()] * 3),
        model_writer=serialised,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<x>"],
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=serialised.getvalue())
    ids = range(theirs.vocab_size())
    kinds = {theirs.unk_id(): 2, theirs.piece_to_id("<x>"): 4}
    types = [3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else kinds.get(i, 1) for i in ids]
    fields = {
        "model": "llama",
        "tokens": [theirs.id_to_piece(i) for i in ids],
        "token_type": types,
        "scores": [theirs.get_score(i) for i in ids],
        "add_bos_token": False,
    }
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "x.gguf", fields))
    for start in range(0, len(text) - 100, 50):
        piece = text[start : start + 100] + "  é你<x>"
        assert tokenizer.encode(piece) == theirs.encode(piece)
        assert tokenizer.decode(tokenizer.encode(piece)) == piece


def gpt2_fields(**changes: Any) -> dict[str, Any]:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox, 1234 1234 and 12345 the\n\n fox's quick"] * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(merge) for merge in model["merges"]]
    types = [1] * len(tokens)
    return {
        "model": "gpt2",
        "tokens": [*tokens, "<|im_end|>", "<think>"],
        "token_type": [*types, 3, 4],
        "merges": merges,
        "eos_token_id": len(tokens),
        "bos_token_id": len(tokens),
        **changes,
    }


TEXT = "The quick brown FOX's 123456\n\n  e\u0301 <think>x<|im_end|>"


@pytest.mark.parametrize(
    ("pre", "numbers", "begins"),
    [
        ("gpt-2", ["123456"], False),
        ("default", ["123456"], False),
        ("llama-bpe", ["123", "456"], True),
        ("glm4", ["123", "456"], False),
        ("qwen2", list("123456"), False),
        ("smollm", list("123456"), False),
    ],
)
def test_words_are_cut_as_the_file_says(tmp_path: Path, pre: str, numbers: list[str], begins: bool) -> None:
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "x.gguf", gpt2_fields(pre=pre)))
    words = [word for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("x123456")]
    assert words == ["x", *numbers]
    ids = tokenizer.encode(TEXT)
    assert (ids[0] == tokenizer.bos_token_id) is begins
    plain = tokenizer.decode(ids, skip_special_tokens=False).removeprefix("<|im_end|>")
    assert plain == (TEXT.replace("e\u0301", "é") if pre == "qwen2" else TEXT)
    assert tokenizer.token_to_id("<think>") in ids


def test_a_qwen2_file_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    fields = gpt2_fields(pre="qwen2")
    vocab = {token: number for number, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    theirs = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", unk_token=None, pad_token=None)
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "x.gguf", fields))
    for text in (TEXT.split("<")[0], "it's 12\r\n  you'LL", "مرحبا 👩‍👩‍👧"):
        assert tokenizer.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "bert", "tokens": ["a"]}, "kind 'bert' is not read; llama .* and gpt2"),
        (gpt2_fields(pre="qwen-2"), "'qwen-2', is not known.* Did you mean 'qwen2'"),
        (gpt2_fields(merges=["ab"]), "merge 1 is 'ab'"),
        (gpt2_fields(merges=["t zz"]), "'zz' is not in the vocabulary"),
        (gpt2_fields(eos_token_id=10**6), "eos_token_id is 1000000, and there are"),
        (gpt2_fields(eos_token_id="x"), "eos_token_id is 'x', not of type int"),
        (llama_fields(scores=[0.5]), "1 scores for 267 tokens, and no merges"),
        (llama_fields(token_type=[1]), "1 token types for 267 tokens"),
        ({"model": "gpt2", "tokens": ["a", "a"], "merges": ["a a"]}, "some tokens are there twice"),
        ({"general.x": 1}, "no tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_says_why(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_gguf_tokenizer(write_gguf(tmp_path / "x.gguf", fields))


def test_a_folder_with_one_gguf_file_is_read_from_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", llama_fields())
    assert len(load_tokenizer(tmp_path)) == 267
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(TokenizerError, match=r"x\.gguf"):
        load_tokenizer(tmp_path)
