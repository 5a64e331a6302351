"""The bytes that each token of a vocabulary stands for inside a text, as constrained decoding needs them."""

import json
import re
from typing import NamedTuple

from tokenizers import Tokenizer as Backend

from swissarmy.core.errors import TokenizerError
from swissarmy.data.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenBytes(NamedTuple):
    """What tokens add to a text."""

    tokens: list[bytes]
    """By id, after another token; empty for special tokens and for ids without a token."""
    drops_first_space: bool
    """Whether decoding leaves out the space before a text's first token, as that of sentencepiece does."""


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The bytes of every token.

    Raises:
        TokenizerError: Decoding joins tokens by rules, so that a token has no bytes of its own.
    """
    backend = tokenizer.backend
    decoder = "" if backend.decoder is None else str(backend.decoder.__getstate__(), "utf-8")
    kinds = set(_kinds(json.loads(decoder or "{}")))
    if "WordPiece" in kinds:
        raise TokenizerError("a WordPiece tokenizer joins words by rules: constraints need bytes or sentencepiece.")
    names = [tokenizer.id_to_token(number) for number in range(len(tokenizer))]
    names = [None if number in tokenizer.special_ids else name for number, name in enumerate(names)]
    if "ByteLevel" in kinds:
        return TokenBytes([b"" if name is None else _from_alphabet(name) for name in names], False)
    anchor = _anchor(backend, names)
    added = _added_by(backend, anchor, len(names))
    tokens = [b"" if name is None else _own_byte(name, text) for name, text in zip(names, added, strict=True)]
    spaced = next((number for number, text in enumerate(tokens) if len(text) > 1 and text[:1] == b" "), None)
    return TokenBytes(tokens, spaced is not None and backend.decode([spaced]).encode() == tokens[spaced][1:])


def _kinds(decoder: dict[str, object]) -> list[str]:
    """The types of a decoder's steps."""
    inner = decoder.get("decoders", [])
    assert isinstance(inner, list)
    return [str(decoder.get("type")), *(kind for each in inner for kind in _kinds(each))]


def _from_alphabet(name: str) -> bytes:
    """Byte-level tokens are written in GPT-2's alphabet; a token that was added is written as it is."""
    if all(character in _ALPHABET for character in name):
        return bytes(_ALPHABET[character] for character in name)
    return name.encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's characters: printable bytes stand for themselves, the others follow from U+0100 on in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _anchor(backend: Backend, names: list[str | None]) -> int:
    """A token that is a plain character or word, to put before others."""
    for number, name in enumerate(names):
        if name is not None and backend.decode([number]).isalnum() and not _BYTE_TOKEN.fullmatch(name):
            return number
    raise TokenizerError("no token of this vocabulary decodes to letters or digits: it cannot be constrained.")


def _added_by(backend: Backend, anchor: int, size: int) -> list[str]:
    """What each id adds to the text of the anchor."""
    before = len(backend.decode([anchor]))
    return [text[before:] for text in backend.decode_batch([[anchor, number] for number in range(size)])]


def _own_byte(name: str, text: str) -> bytes:
    """The text of a token, or the one byte that it stands for where decoders put bytes together."""
    byte = _BYTE_TOKEN.fullmatch(name)
    if byte is not None and text != name:
        return bytes([int(byte[1], 16)])
    return b"" if _REPLACEMENT in text and _REPLACEMENT not in name else text.encode()
