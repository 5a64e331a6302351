"""The small files beside a vocabulary: `tokenizer_config.json`, `special_tokens_map.json` and their like."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

from tokenizers import AddedToken

from swissarmy.core.errors import TokenizerError
from swissarmy.data.tokenizer import SPECIAL_TOKENS
from swissarmy.interop.json_object import read_json_object

_FAMILY_TOKENS: dict[str | None, dict[str, str]] = {
    None: {},
    "bert": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "roberta": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    },
}
"""What a family uses where no file says it: the oldest checkpoints are a vocabulary and nothing else."""

_ROBERTA_LIKE = ("roberta", "bart", "longformer", "led", "blenderbot")
_UNLIMITED = 10**9
"""`model_max_length` from here on is how transformers writes "not known"."""


@final
class TokenizerFolder:
    """What the files of a folder say about a tokenizer.

    Args:
        root: the folder, or None for a vocabulary that stands alone.
        family: whose special tokens are the default: `bert`, `gpt2` or `roberta`; if None, what the files say.
    """

    def __init__(self, root: Path | None, *, family: str | None = None) -> None:
        self.root = root
        self.family = family or self._find_family()

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._read("tokenizer_config.json")

    @cached_property
    def special_tokens_map(self) -> dict[str, Any]:
        return self._read("special_tokens_map.json")

    @cached_property
    def model_config(self) -> dict[str, Any]:
        return self._read("config.json")

    def names(self) -> tuple[str, str]:
        """The tokenizer class and the model type, in lower case."""
        return str(self.config.get("tokenizer_class")).lower(), str(self.model_config.get("model_type")).lower()

    def is_roberta(self) -> bool:
        """Whether this byte-level BPE puts `<s> ... </s>` around a text."""
        if any(name.startswith(_ROBERTA_LIKE) for name in self.names()):
            return True
        return self._declared("cls_token") is not None and self._declared("sep_token") is not None

    def flag(self, name: str, default: bool) -> bool:
        """A boolean of `tokenizer_config.json`."""
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise TokenizerError(f"{self.root}/tokenizer_config.json: {name} is {value!r}, not true or false")
        return value

    def special_tokens(self) -> dict[str, AddedToken]:
        """The token of each role, from the files or the family."""
        found = {role: self._declared(role) for role in SPECIAL_TOKENS}
        for role, text in _FAMILY_TOKENS[self.family].items():
            if role not in self.config and role not in self.special_tokens_map:
                # RoBERTa's mask stands for a word together with the space before it
                lstrip = self.family == "roberta" and role == "mask_token"
                found[role] = AddedToken(text, special=True, normalized=False, lstrip=lstrip)
        return {role: token for role, token in found.items() if token is not None}

    def special_ids(self, ends: Sequence[int]) -> dict[str, int]:
        """Roles by id, from the model's `config.json`, for tokenizers whose files name no tokens."""
        found = {"eos_token": ends[0]} if ends else {}
        for role in ("bos_token", "eos_token", "pad_token"):
            number = self.model_config.get(f"{role}_id")
            if type(number) is int and number >= 0:
                found[role] = number
        # a role that is null in tokenizer_config.json is meant to be empty
        return {role: number for role, number in found.items() if role not in self.config}

    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: from `generation_config.json`, else as saved by us, else from `config.json`."""
        text_config = self.model_config.get("text_config")
        for stated in (
            self._read("generation_config.json").get("eos_token_id"),
            self.config.get("eos_token_ids"),
            self.model_config.get("eos_token_id"),
            text_config.get("eos_token_id") if isinstance(text_config, dict) else None,
        ):
            ids = stated if isinstance(stated, list) else [stated]
            if found := tuple(number for number in ids if type(number) is int and number >= 0):
                return found
        return ()

    def added_tokens(self) -> dict[int, AddedToken]:
        """Tokens beyond the vocabulary, by id."""
        found: dict[int, AddedToken] = {}
        for content, number in self._read("added_tokens.json").items():
            if type(number) is not int:
                raise TokenizerError(f"{self.root}/added_tokens.json: the id of {content!r} is {number!r}")
            found[number] = AddedToken(content, special=False, normalized=False)
        for number, entry in self.config.get("added_tokens_decoder", {}).items():
            token = _added_token(entry)
            if token is None or not number.isdecimal():
                raise TokenizerError(
                    f"{self.root}/tokenizer_config.json: added_tokens_decoder[{number!r}] is {entry!r}"
                )
            found[int(number)] = token
        return found

    def chat_template(self) -> str | None:
        """The file `chat_template.jinja`, else the field, which may be a list of named templates."""
        if self.root is not None and (self.root / "chat_template.jinja").is_file():
            return self._text("chat_template.jinja")
        field = self.config.get("chat_template")
        if isinstance(field, list):
            named = [entry for entry in field if isinstance(entry, dict) and entry.get("name") == "default"]
            field = named[0].get("template") if named else None
        return field if isinstance(field, str) else None

    def model_max_length(self) -> int | None:
        length = self.config.get("model_max_length")
        return length if isinstance(length, int) and 0 < length < _UNLIMITED else None

    def _find_family(self) -> str | None:
        for name in self.names():
            if name.startswith("gpt2"):
                return "gpt2"
            if "roberta" in name or name.startswith(_ROBERTA_LIKE):
                return "roberta"
            if "bert" in name:
                return "bert"
        return None

    def _declared(self, role: str) -> AddedToken | None:
        return _added_token(self.config.get(role)) or _added_token(self.special_tokens_map.get(role))

    def _text(self, name: str) -> str:
        assert self.root is not None
        try:
            return (self.root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{self.root / name}: not UTF-8, at byte {error.start}") from error

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON object, or an empty one where there is no such file."""
        if self.root is None or not (self.root / name).is_file():
            return {}
        return read_json_object(self.root / name, TokenizerError)


def _added_token(entry: Any) -> AddedToken | None:
    """A token as Hugging Face files write it: its text, or an object with its text and flags."""
    if isinstance(entry, str):
        return AddedToken(entry, special=True, normalized=False)
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        return None
    flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(entry["content"], special=bool(entry.get("special", True)), **flags)
