"""Tokenizers with all that objectives put into texts, and samples of their ordinary tokens."""

from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from swissarmy.data.samples.examples import Ids
from swissarmy.data.tokenizer import Tokenizer

SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "eos_token": "[SEP]", "mask_token": "[MASK]"}
ADDED = (*SPECIAL.values(), "[gMASK]", "[sMASK]", "<sop>", "<eop>", *(f"<extra_id_{number}>" for number in range(60)))
"""Ids 0 to 67."""
FIRST = len(ADDED)
"""The first id that is text."""


def vocabulary(*texts: str) -> dict[str, int]:
    return {token: number for number, token in enumerate((*ADDED, *texts))}


def made(model: Any) -> Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(list(ADDED))
    return Tokenizer(backend, special_tokens=SPECIAL)


def word_pieces() -> Tokenizer:
    """BERT's kind: 40 tokens from id 68 on, of which every even one begins a word."""
    texts = [f"w{number}" if number % 2 == 0 else f"##w{number}" for number in range(40)]
    return made(models.WordPiece(vocabulary(*texts), unk_token="[PAD]"))


def bytes_of_words() -> Tokenizer:
    """GPT-2's kind: `Ġw` begins a word, `w` goes on."""
    texts = [f"Ġw{number}" if number % 2 == 0 else f"w{number}" for number in range(40)]
    return made(models.BPE(vocab=vocabulary(*texts), merges=[]))


def sentences() -> Tokenizer:
    """Whole words; every tenth of the 40 is a full stop."""
    texts = [f"w{number}" if number % 10 else f"w{number}." for number in range(40)]
    return made(models.WordLevel(vocabulary(*texts), unk_token="[PAD]"))


def text(length: int, seed: int = 0) -> Ids:
    """So many ordinary tokens."""
    return np.random.default_rng(seed).integers(FIRST, FIRST + 40, length)


def framed(ids: Ids) -> Ids:
    """`[CLS] ids [SEP]`."""
    return np.concatenate(([1], ids, [2]))
