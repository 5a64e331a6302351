"""The tokenizer, its streams and its chat templates, on tiny vocabularies trained here."""

import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from swissarmy.core.errors import TokenizerError
from swissarmy.data.tokenizer import TextStream, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Caching keys and values makes decoding linear in length; it's 2024, isn't it?",
    "Größe, naïve café, 你好世界, שלום, مرحبا, 👩‍👩‍👧 and 🏳️‍🌈.",
] * 3
ODD_TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "nul \0 inside",
    "e\u0301 combining, \u1100\u1161\u11a8 jamo",
    "שלום עולם مرحبا",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "\ufffd is a character too\ufffd",
    "line\nbreaks\r\n\ttabs\u2028\u0085",
]
CHAT = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message.role == 'skip' %}{% continue %}{% endif %}\n"
    "<{{ message.role }}>{{ message.content | trim }}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson }}{% endif %}\n"
    "{% if add_generation_prompt %}<assistant>{% generation %}{% endgeneration %}{% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return backend


def word_piece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Llama 2's kind: spaces as ▁, one before the text, unknown characters as byte tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", *"abcdefghé", "▁a", "ab", "▁ab", "\ufffd"]:
        vocab[token] = len(vocab)
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return backend


GPT = {"bos_token": "<s>", "eos_token": "</s>"}
BERT = {
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
LLAMA = {**GPT, "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def gpt() -> Tokenizer:
    return Tokenizer(byte_level(), special_tokens=GPT, chat_template=CHAT)


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return Tokenizer(word_piece(), special_tokens=BERT)


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return Tokenizer(sentencepiece_like(), special_tokens=LLAMA)


@pytest.fixture(scope="module", params=["gpt", "bert", "llama"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def test_special_ids_are_known_by_role(gpt: Tokenizer, bert: Tokenizer) -> None:
    assert (gpt.bos_token_id, gpt.eos_token_id, gpt.pad_token_id, gpt.eos_token_ids) == (0, 1, None, (1,))
    assert (bert.pad_token_id, bert.cls_token_id, bert.sep_token_id, bert.mask_token_id) == (0, 2, 3, 4)
    assert bert.eos_token_ids == ()
    assert len(gpt) == gpt.vocab_size == 400
    assert gpt.id_to_token(1) == "</s>"
    assert gpt.token_to_id("nothing of the kind") is None
    assert gpt.id_to_token(-1) is None


def test_end_ids_begin_with_the_end_token_and_have_no_doubles() -> None:
    assert Tokenizer(byte_level(), special_tokens=GPT, eos_token_ids=[7, 1, 7]).eos_token_ids == (1, 7)


def test_a_special_token_that_is_not_there_is_an_error() -> None:
    with pytest.raises(TokenizerError, match=r"pad_token '<nope>' is not in the vocabulary"):
        Tokenizer(byte_level(), special_tokens={"pad_token": "<nope>"})
    with pytest.raises(TokenizerError, match="Did you mean 'pad_token'"):
        Tokenizer(byte_level(), special_tokens={"pad_tokens": "<pad>"})


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_round_trip(gpt: Tokenizer, llama: Tokenizer, text: str) -> None:
    assert gpt.decode(gpt.encode(text)) == text
    assert llama.decode(llama.encode(text)) == text
    ids = gpt.encode(text, add_special_tokens=False)
    assert gpt.decode(torch.tensor(ids, dtype=torch.int64)) == text
    assert gpt.decode_batch([ids, gpt.encode(text)]) == [text, text]


def test_a_surrogate_pair_is_its_character_and_half_of_one_is_an_error(gpt: Tokenizer) -> None:
    assert gpt.encode("a\ud83d\ude00b") == gpt.encode("a😀b")
    for text, place in [("ab\ud83d", 2), ("\ude00", 0), ("\ud83d\ude00\ude00", 2)]:
        with pytest.raises(TokenizerError, match=f"half of a surrogate pair.*position {place}:"):
            gpt.encode(text)
    with pytest.raises(TokenizerError, match="a text is a str, not bytes"):
        gpt.encode(b"x")  # type: ignore[arg-type]


def test_decode_refuses_unfilled_positions_and_batches(gpt: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="id -1 at position 1"):
        gpt.decode([5, -1])
    with pytest.raises(TokenizerError, match="decode_batch"):
        gpt.decode(torch.zeros(2, 3, dtype=torch.int64))
    assert gpt.decode([10**6]) == ""


def test_a_batch_is_padded_on_either_side(gpt: Tokenizer) -> None:
    texts = ["The dog", "The quick brown fox"]
    rows = [gpt.encode(text) for text in texts]
    gap = len(rows[1]) - len(rows[0])
    right, left = gpt(texts), gpt(texts, padding_side="left")
    assert right.input_ids[0].tolist() == rows[0] + [1] * gap  # no pad token: the end token
    assert left.input_ids[0].tolist() == [1] * gap + rows[0]
    assert right.padding_mask.sum(1).tolist() == left.padding_mask.sum(1).tolist() == [len(row) for row in rows]
    assert not left.padding_mask[0, :gap].any()
    assert right.padding_mask.dtype == torch.bool
    assert gpt("The dog").input_ids.shape == (1, len(rows[0]))
    assert gpt([]).input_ids.shape == (0, 0)


def test_padding_without_any_token_for_it_is_an_error() -> None:
    bare = Tokenizer(byte_level())
    assert bare(["same", "same"]).padding_mask.all()
    with pytest.raises(TokenizerError, match="neither a pad_token nor an eos_token"):
        bare(["short", "not so short"])


def test_too_long_a_text_is_an_error_unless_it_may_be_cut(gpt: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"text 1 has \d+ tokens, more than max_length=4"):
        gpt(["a", "The quick brown fox"], max_length=4)
    with pytest.raises(TokenizerError, match="needs a max_length"):
        gpt("a", truncation=True)
    with pytest.raises(TokenizerError, match="no room for the 2 special tokens"):
        gpt("a", truncation=True, max_length=1)
    ids = gpt(["The quick brown fox"], max_length=4, truncation=True).input_ids[0].tolist()
    assert ids == [0, *gpt.encode("The quick brown fox", add_special_tokens=False)[:2], 1]


def test_settings_in_the_file_do_not_pad_or_cut() -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    assert len(Tokenizer(backend).encode(CORPUS[0])) not in (3, 64)


def test_wrong_arguments_say_so(gpt: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="padding_side"):
        gpt("a", padding_side="middle")  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="text_pair has 1 texts for 2"):
        gpt(["a", "b"], text_pair=["c"])


def reference(tokenizer: Tokenizer, folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_loads_what_is_saved_and_gives_the_same(
    any_tokenizer: Tokenizer, side: Any, tmp_path: Path
) -> None:
    theirs = reference(any_tokenizer, tmp_path)
    theirs.padding_side = side
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token
    texts = ["a quick fab", "The lazy dog isn't linear in length ab", "é"]
    pairs = ["b ab", "Caching keys and values", "x y z quick brown"]
    for options in ({}, {"truncation": True, "max_length": 7}, {"truncation": True, "max_length": 8}):
        for second in (None, pairs):
            want = theirs(texts, second, padding=True, return_tensors="pt", return_token_type_ids=True, **options)
            have = any_tokenizer(texts, text_pair=second, padding_side=side, **options)
            assert have.input_ids.tolist() == want["input_ids"].tolist()
            assert have.padding_mask.tolist() == want["attention_mask"].bool().tolist()
            assert have.token_type_ids[have.padding_mask].tolist() == (
                want["token_type_ids"][want["attention_mask"].bool()].tolist()
            )
            assert any_tokenizer.decode_batch(have.input_ids) == theirs.batch_decode(
                want["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
    for role, token in any_tokenizer.special_tokens.items():
        assert getattr(theirs, role) == token


def test_the_chat_template_gives_what_transformers_gives(gpt: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": " Hi <b>&'ä' "}, {"role": "skip"}, {"role": "assistant", "content": "yes"}]
    theirs = reference(gpt, tmp_path)
    for options in ({}, {"add_generation_prompt": True}, {"tools": [{"type": "function", "function": {"name": "ä<"}}]}):
        want = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert gpt.apply_chat_template(messages, **options) == want
    assert "<user>Hi <b>&'ä'" in gpt.apply_chat_template(messages)


def test_a_tokenizer_can_be_sent_to_another_process(gpt: Tokenizer) -> None:
    gpt.apply_chat_template(HELLO)
    again = pickle.loads(pickle.dumps(gpt))
    assert again.encode(CORPUS[2]) == gpt.encode(CORPUS[2])
    assert again.apply_chat_template(HELLO) == gpt.apply_chat_template(HELLO)


def test_saved_end_ids_and_template_are_in_the_config(gpt: Tokenizer, tmp_path: Path) -> None:
    ended = Tokenizer(gpt.backend, special_tokens=GPT, eos_token_ids=[5], chat_template="x", model_max_length=9)
    ended.save_pretrained(tmp_path / "new" / "folder")
    config = json.loads((tmp_path / "new" / "folder" / "tokenizer_config.json").read_text())
    assert config["eos_token_ids"] == [1, 5]
    assert config["chat_template"] == "x"
    assert config["model_max_length"] == 9
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ ''.__class__ }}", "__class__"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__"),
        ("{{ messages['__class__'] }}", "__class__"),
        ("{{ messages | attr('__init__') }}", "__init__"),
        ("{{ raise_exception.__globals__ }}", "__globals__"),
        ("{{ (messages | map(attribute='__class__') | list)[0] }}", "__class__"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "__init__"),
        ("{{ self._TemplateReference__context }}", "_TemplateReference__context"),
        ("{{ '{0.__class__}'.format(messages) }}", "__class__"),
        ("{{ messages.append(1) }}", "append"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 999999999 }}", "repeating"),
        ("{{ 9 ** 999999999 }}", "'\\*\\*'"),
        ("{% for i in range(9999) %}{% for i in range(9999) %}{{ messages }}{% endfor %}{% endfor %}", "characters"),
    ],
)
def test_a_chat_template_cannot_leave_the_sandbox(gpt: Tokenizer, template: str, named: str) -> None:
    with pytest.raises(TokenizerError, match=f"(?s)chat template.*{named}"):
        gpt.with_chat_template(template).apply_chat_template(HELLO)


def test_chat_template_errors_say_what_is_wrong(gpt: Tokenizer, bert: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="has no chat template"):
        bert.apply_chat_template(HELLO)
    with pytest.raises(TokenizerError, match="not valid Jinja: line 2"):
        gpt.with_chat_template("a\n{% for %}").apply_chat_template(HELLO)
    with pytest.raises(TokenizerError, match="roles must alternate"):
        gpt.with_chat_template("{{ raise_exception('roles must alternate') }}").apply_chat_template(HELLO)
    with pytest.raises(TokenizerError, match="ZeroDivisionError"):
        gpt.with_chat_template("{{ 1 / 0 }}").apply_chat_template(HELLO)
    with pytest.raises(TokenizerError, match="list of mappings"):
        gpt.apply_chat_template(HELLO[0])  # type: ignore[arg-type]
    assert len(gpt.with_chat_template("{{ strftime_now('%Y') }}").apply_chat_template(HELLO)) == 4


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    """Every piece, and in the last place what `end` gives."""
    text = TextStream(tokenizer, skip_special_tokens=skip)
    return [*map(text.put, ids), text.end()]


@pytest.mark.parametrize("text", [*ODD_TEXTS, *CORPUS[:3], "ab 你好 ab é 👩‍👩‍👧 ba"])
def test_a_stream_shows_whole_characters_and_the_whole_text(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    pieces = stream(any_tokenizer, ids)
    assert "".join(pieces) == any_tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data(), skip=st.booleans())
def test_a_stream_of_any_ids_is_their_decoding(data: st.DataObject, skip: bool) -> None:
    for tokenizer in _all_tokenizers():
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=60))
        assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=60))
def test_any_text_round_trips_and_streams_without_half_characters(text: str) -> None:
    for tokenizer in _all_tokenizers():
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    for tokenizer in _lossless_tokenizers():
        if not any(token in text for token in ("<s>", "</s>", "<pad>", "<unk>", "▁")):
            assert tokenizer.decode(tokenizer.encode(text)) == text


@cache
def _lossless_tokenizers() -> list[Tokenizer]:
    return [Tokenizer(byte_level(), special_tokens=GPT), Tokenizer(sentencepiece_like(), special_tokens=LLAMA)]


@cache
def _all_tokenizers() -> list[Tokenizer]:
    return [*_lossless_tokenizers(), Tokenizer(word_piece(), special_tokens=BERT)]


def test_a_stream_keeps_words_apart_and_can_be_used_again(llama: Tokenizer) -> None:
    ids = llama.encode("ab ab a", add_special_tokens=False)
    text = TextStream(llama)
    for _ in range(2):
        assert [text.put(number) for number in ids] == ["ab", " ab", " a"]
        assert text.end() == ""


def test_the_cost_of_a_token_does_not_grow_with_the_text(gpt: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: Any, **options: Any) -> str:
        decoded.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    for ids in (gpt.encode(" ".join(CORPUS)) * 3, [gpt.backend.token_to_id("Ġ") or 0, 150, 160, 170] * 100):
        decoded.clear()
        stream(gpt, ids)
        assert max(decoded) < 20
        assert len(decoded) < 2 * len(ids)
