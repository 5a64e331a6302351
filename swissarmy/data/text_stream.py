"""Turning ids into text as they are generated, without ever showing half a character."""

import re
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from swissarmy.data.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WINDOW = 8
"""How many tokens are decoded again to learn what the next one adds.

More than the 4 bytes of a character (a byte-level token has at least one), and more than the one token that
decoders look back for spaces."""


@final
class TextStream:
    """The text of a growing list of ids, piece by piece; each token costs the same, however long the text.

    The pieces, with that of `end`, joined give `tokenizer.decode(all_ids)` exactly. To that end a piece is held
    back while it may still change: an incomplete character, and a run of byte tokens (`<0xE4>`), which decodes
    to characters only when the whole run is valid UTF-8.

    Args:
        tokenizer: decodes the ids.
        skip_special_tokens: leave special tokens out, as `decode` does.
    """

    def __init__(self, tokenizer: "Tokenizer", *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._shown = 0

    def put(self, token_id: int) -> str:
        """Add one id; the text that is now certain and was not before, often empty."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        self._window.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            return ""
        piece = self._certain()[self._shown :]
        self._shown += len(piece)
        if len(self._window) > 2 * _WINDOW:
            del self._window[:-_WINDOW]
            self._shown = len(self._certain())
        return piece

    def end(self) -> str:
        """What was held back; the stream is then empty and can be used again."""
        piece = self._decode()[self._shown :]
        self._window, self._shown = [], 0
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def _certain(self) -> str:
        # an incomplete character decodes to one U+FFFD at the very end, so all before it stands
        return self._decode().removesuffix(_REPLACEMENT)
