"""What each token of a vocabulary is: special, the beginning of a word, the end of a sentence.

Tables `[v + 1]` of flags; the last one is for ids that the tokenizer does not know, as in a padded vocabulary, which
count as special. `kind_of(table, ids)` looks up.
"""

import numpy as np
from tokenizers.models import WordLevel, WordPiece

from swissarmy.core.errors import ConfigError
from swissarmy.data.samples.examples import Flags, Ids
from swissarmy.data.tokenizer import Tokenizer

SPACES = ("Ġ", "▁")
"""How byte-level tokenizers, and those after SentencePiece, write the space before a word."""
SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？", "\n")
"""What the text of a sentence's last token ends with."""


def kind_of(table: Flags, ids: Ids) -> Flags:
    """The flags of ids, in their shape."""
    return table.take(ids, mode="clip")


def special_tokens(tokenizer: Tokenizer) -> Flags:
    """Tokens that are no text, which are left alone."""
    special = np.ones(_size(tokenizer) + 1, dtype=np.bool_)
    special[list(tokenizer.backend.get_vocab().values())] = False
    special[list(tokenizer.special_ids)] = True
    return special


def word_beginnings(tokenizer: Tokenizer) -> Flags:
    """Tokens that begin a word; the first of a text, and one after a special token, do so in any case.

    Raises:
        ConfigError: The tokenizer does not mark where words begin.
    """
    model = tokenizer.backend.model
    if isinstance(model, WordLevel):
        return np.ones(_size(tokenizer) + 1, dtype=np.bool_)
    if isinstance(model, WordPiece):
        return ~_tokens_with(tokenizer, model.continuing_subword_prefix)
    marked = [_tokens_with(tokenizer, space) for space in SPACES]
    begins = max(marked, key=np.count_nonzero)
    if not begins.any():
        marks = " or ".join(repr(space) for space in SPACES)
        raise ConfigError(f"mask_whole_words: no token begins with {marks}: where words begin cannot be seen.")
    return begins


def sentence_ends(tokenizer: Tokenizer) -> Flags:
    """Tokens after which a new sentence may begin."""
    ids = sorted(tokenizer.backend.get_vocab().values())
    texts = tokenizer.backend.decode_batch([[number] for number in ids], skip_special_tokens=False)
    ends = np.zeros(_size(tokenizer) + 1, dtype=np.bool_)
    ends[ids] = [text.endswith(SENTENCE_ENDS) for text in texts]
    return ends


def token_id(tokenizer: Tokenizer, field: str, *candidates: str | None) -> int:
    """The id of the first of some tokens that the tokenizer has.

    Raises:
        ConfigError: It has none of them; `field` can name another.
    """
    for candidate in candidates:
        if candidate is not None and (found := tokenizer.token_to_id(candidate)) is not None:
            return found
    wanted = " or ".join(repr(candidate) for candidate in candidates if candidate is not None)
    raise ConfigError(f"{field}: the tokenizer has no {wanted}: add it to the tokenizer, or name a token that it has.")


def _tokens_with(tokenizer: Tokenizer, prefix: str) -> Flags:
    flags = np.zeros(_size(tokenizer) + 1, dtype=np.bool_)
    flags[[number for token, number in tokenizer.backend.get_vocab().items() if token.startswith(prefix)]] = True
    return flags


def _size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.backend.get_vocab().values()) + 1
