"""The tokenizer inside a GGUF model file, rebuilt as a Rust tokenizer with the same ids as llama.cpp gives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, final

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from swissarmy.core.errors import TokenizerError, nearest
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.interop.byte_level import CL100K, GPT2, LLAMA3, QWEN2, STARCODER, Splitting, byte_level_bpe, split_merges
from swissarmy.interop.gguf_file import GGUFArray, GGUFFile

_T = TypeVar("_T")

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6

_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # so spelt in the format
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
_END_KEYS = ("eot", "eom")
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Control tokens that end a turn; older files do not say so with a key, and llama.cpp knows them by their text."""

_SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "olmo", "jais"), GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), LLAMA3),
    **dict.fromkeys(("glm4", "chatglm-bpe", "dbrx", "smaug-bpe"), CL100K),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact"), STARCODER),
}
_SPACE = "▁"


def load_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a GGUF file: sentencepiece BPE (`llama`: Llama 2, Gemma) or byte-level BPE (`gpt2`).

    Raises:
        CheckpointError: the file is no readable GGUF file.
        TokenizerError: it has no tokenizer, or one of another kind.
        MissingExtraError: the package `gguf` is not installed.
    """
    return _Reader(GGUFFile(path)).tokenizer()


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE model, which stores only pieces and their scores.

    Every split of a piece into two other pieces is a merge that is ranked by the score of the piece. Ties go as
    in the converter of `transformers`: the longer left part first.
    """
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in scores and (right := piece[cut:]) in scores:
                found.append((score, cut, len(piece) - cut, left, right))
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in found]


@final
class _Reader:
    """The fields `tokenizer.*` of one file, checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.kind = self._field("model", str)
        if self.kind is None:
            raise TokenizerError(f"{file.path}: it has no tokenizer (no field tokenizer.ggml.model)")
        self.tokens: list[str] = self._array("tokens")
        self.types = self._array("token_type") or [_NORMAL] * len(self.tokens)
        self.vocab = {token: number for number, token in enumerate(self.tokens)}
        if len(self.vocab) != len(self.tokens):
            raise self._error("some tokens are there twice")
        if len(self.types) != len(self.tokens):
            raise self._error(f"{len(self.types)} token types for {len(self.tokens)} tokens")

    def tokenizer(self) -> Tokenizer:
        if self.kind == "llama":
            backend, add_bos = self._sentencepiece(), True
        elif self.kind == "gpt2":
            splitting = self._splitting()
            merges = split_merges(self._array("merges"), f"{self.file.path}, tokenizer.ggml.merges")
            backend = byte_level_bpe(self.vocab, merges, splitting, source=str(self.file.path))
            add_bos = splitting is LLAMA3
        else:
            raise self._error(
                f"kind {self.kind!r} is not read; llama (sentencepiece BPE) and gpt2 (byte-level BPE) are"
            )
        self._add_tokens(backend)
        special = self._special_tokens()
        self._add_ends(backend, special, add_bos)
        template = self.file.metadata.get("tokenizer.chat_template")
        return Tokenizer(
            backend,
            special_tokens=special,
            eos_token_ids=self._ends(),
            chat_template=template if isinstance(template, str) else None,
        )

    def _error(self, what: str) -> TokenizerError:
        return TokenizerError(f"{self.file.path}: its tokenizer cannot be read: {what}")

    def _field(self, key: str, kind: type[_T]) -> _T | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{key}")
        if value is None or isinstance(value, kind):
            return value
        raise self._error(f"tokenizer.ggml.{key} is {value!r}, not of type {kind.__name__}")

    def _flag(self, key: str, default: bool) -> bool:
        value = self._field(key, bool)
        return default if value is None else value

    def _array(self, key: str) -> list[Any]:
        """The values of an array, or an empty list if there is none."""
        array = self._field(key, GGUFArray)
        return [] if array is None else self.file.values(array)

    def _id(self, key: str, default: int | None = None) -> int | None:
        number = self._field(f"{key}_token_id", int)
        if number is None:
            number = default
        if number is not None and not 0 <= number < len(self.tokens):
            raise self._error(f"tokenizer.ggml.{key}_token_id is {number}, and there are {len(self.tokens)} tokens")
        return number

    def _special_tokens(self) -> dict[str, str]:
        # a sentencepiece file without these keys means Llama's own
        defaults = {"unknown": 0, "bos": 1, "eos": 2} if self.kind == "llama" else {}
        ids = {role: self._id(key, defaults.get(key)) for role, key in _ROLES.items()}
        return {role: self.tokens[number] for role, number in ids.items() if number is not None}

    def _ends(self) -> list[int]:
        marked = [number for key in _END_KEYS if (number := self._id(key)) is not None]
        known = [number for token in _END_OF_TURN if (number := self.vocab.get(token)) is not None]
        return marked + [number for number in known if self.types[number] == _CONTROL]

    def _splitting(self) -> Splitting:
        name = self._field("pre", str) or "default"
        if name not in _SPLITTINGS:
            hint = nearest(name, _SPLITTINGS)
            raise self._error(
                f"its way of cutting words, {name!r}, is not known; these are: {', '.join(_SPLITTINGS)}.{hint}"
            )
        return _SPLITTINGS[name]

    def _sentencepiece(self) -> tokenizers.Tokenizer:
        merges = split_merges(self._array("merges"), f"{self.file.path}, tokenizer.ggml.merges") or self._merges()
        unknown = self._id("unknown", 0)
        model = models.BPE(
            vocab=self.vocab,
            merges=merges,
            unk_token=None if unknown is None else self.tokens[unknown],
            fuse_unk=True,
            byte_fallback=_BYTE in self.types,
        )
        backend = tokenizers.Tokenizer(model)
        to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.normalizer = normalizers.Replace(" ", _SPACE)
        if self._flag("add_space_prefix", True):
            # also after each token that is matched whole, as in llama.cpp and Llama 2's own tokenizer.json
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), backend.normalizer])
            to_text.append(decoders.Strip(content=" ", left=1, right=0))
        backend.decoder = decoders.Sequence(to_text)
        return backend

    def _merges(self) -> list[tuple[str, str]]:
        scores = self._array("scores")
        if len(scores) != len(self.tokens):
            raise self._error(f"it has {len(scores)} scores for {len(self.tokens)} tokens, and no merges")
        # control, byte and user-defined tokens never come about by merging
        rows = zip(self.tokens, scores, self.types, strict=True)
        return merges_from_scores({token: score for token, score, kind in rows if kind == _NORMAL})

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """Tokens that are matched whole, before anything is merged."""
        typed = list(zip(self.tokens, self.types, strict=True))
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token, kind in typed if kind == _CONTROL]
        )
        backend.add_tokens(
            [AddedToken(token, special=False, normalized=False) for token, kind in typed if kind == _USER_DEFINED]
        )

    def _add_ends(self, backend: tokenizers.Tokenizer, special: Mapping[str, str], add_bos: bool) -> None:
        """Put begin and end tokens around each text, if the file says so."""
        wanted = {
            "bos_token": self._flag("add_bos_token", add_bos),
            "eos_token": self._flag("add_eos_token", False),
        }
        used = {role: special[role] for role, wish in wanted.items() if wish and role in special}
        if not used:
            return
        backend.post_processor = processors.TemplateProcessing(
            single=_around("$A:0", used, 0),
            pair=[*_around("$A:0", used, 0), *_around("$B:1", used, 1)],
            special_tokens=[(token, self.vocab[token]) for token in set(used.values())],
        )


def _around(text: str, used: Mapping[str, str], kind: int) -> list[str]:
    before = [f"{used['bos_token']}:{kind}"] if "bos_token" in used else []
    after = [f"{used['eos_token']}:{kind}"] if "eos_token" in used else []
    return [*before, text, *after]
