"""What encoders need of a tokenizer beside ids: where each token begins in its text, and which tokenizer it is."""

from typing import Any, NamedTuple, final

import numpy as np
import tokenizers
from numpy.typing import NDArray

from swissarmy.data.encoding import as_unicode
from swissarmy.data.source import digest
from swissarmy.data.tokenizer import Tokenizer


class TokenOffsets(NamedTuple):
    """A text as ids, n of them."""

    input_ids: NDArray[np.int64]
    """`[n]`."""
    begins: NDArray[np.int64]
    """`[n]`: the character that each token begins with; -1 for special tokens put before the text, and the length of
    the text for those put after it."""


@final
class OffsetTokenizer:
    """Encodes texts and says where each token begins, its leading whitespace included.

    Byte-level tokenizers leave whitespace out of the offsets that they report, which would move a line break at the
    end of a prompt into the answer. It is their post-processor that does so: a copy without it tells the truth.

    Args:
        tokenizer: the ids are those of its `encode`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._plain: tokenizers.Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        # the copy is made again where it is needed: a worker should not receive every tokenizer twice
        return self.__dict__ | {"_plain": None}

    def __call__(self, text: str, *, add_special_tokens: bool) -> TokenOffsets:
        """The tokens of one text.

        Raises:
            TokenizerError: `text` is no string, or has half of a surrogate pair.
        """
        inner = self._backend().encode(as_unicode(text), add_special_tokens=False)
        begins = np.array([begin for begin, _ in inner.offsets], dtype=np.int64)
        if not add_special_tokens:
            return TokenOffsets(np.array(inner.ids, dtype=np.int64), begins)
        outer = self.tokenizer.backend.post_process(inner, None, True)
        own = np.array(outer.special_tokens_mask, dtype=np.int64) == 0
        around = np.where(np.cumsum(own) == 0, -1, len(text))
        around[own] = begins
        return TokenOffsets(np.array(outer.ids, dtype=np.int64), around)

    def _backend(self) -> tokenizers.Tokenizer:
        if self._plain is None:
            self._plain = tokenizers.Tokenizer.from_str(self.tokenizer.backend.to_str())
            self._plain.post_processor = None
        return self._plain


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A short hash of what decides a text's ids: vocabulary, special tokens and chat template."""
    tokens = (tokenizer.special_tokens, tokenizer.eos_token_ids)
    return digest(tokenizer.backend.to_str(), *tokens, tokenizer.chat_template)
