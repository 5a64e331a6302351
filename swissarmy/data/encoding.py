"""A batch of encoded texts: what is checked before encoding, how much is kept, how it is padded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import tokenizers
import torch

from swissarmy.core.errors import TokenizerError

_LONE_SURROGATE = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


@final
@dataclass(frozen=True)
class Encoding:
    """A batch of texts as ids, padded to the longest."""

    input_ids: torch.Tensor
    """[b, s] int64."""
    padding_mask: torch.Tensor
    """[b, s] bool, true where there is a token of the text."""
    token_type_ids: torch.Tensor
    """[b, s] int64: 0, and 1 for the second text of a pair where the tokenizer tells them apart."""


def pad(rows: Sequence[tokenizers.Encoding], padding_id: int, *, left: bool) -> Encoding:
    """Rows of different lengths as tensors `[b, s]`, s being the longest."""
    longest = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), longest), padding_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    types = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row.ids, dtype=torch.int64)
        types[index, place] = torch.tensor(row.type_ids, dtype=torch.int64)
        mask[index, place] = True
    return Encoding(input_ids=ids, padding_mask=mask, token_type_ids=types)


def as_unicode(text: str) -> str:
    """`text` as UTF-8 can hold it: the two halves of a surrogate pair become the character they stand for."""
    if not isinstance(text, str):
        raise TokenizerError(f"a text is a str, not {type(text).__name__}")
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    if lone := _LONE_SURROGATE.search(text):
        raise TokenizerError(
            f"the text has half of a surrogate pair, {lone[0]!r} at position {lone.start()}: it is no Unicode text; "
            "decode its source with errors='replace'"
        )
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def fit(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each text to keep so that all fit: the longest is cut first."""
    if len(lengths) == 1 or sum(lengths) <= room:
        return [min(length, room) for length in lengths]
    shorter = min(lengths)
    if shorter > room // 2:
        # as in `tokenizers`: both are cut, and the odd token goes to the longer one
        small, large = room // 2, room - room // 2
    else:
        small, large = shorter, room - shorter
    return [small, large] if lengths[0] <= lengths[1] else [large, small]


def check_lengths(rows: Sequence[tokenizers.Encoding], max_length: int) -> None:
    for index, row in enumerate(rows):
        if len(row) > max_length:
            raise TokenizerError(
                f"text {index} has {len(row)} tokens, more than max_length={max_length}: "
                "pass truncation=True, or split it first"
            )
