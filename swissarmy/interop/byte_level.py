"""Byte-level BPE tokenizers (GPT-2 and its descendants) from a vocabulary and its merges."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from swissarmy.core.errors import TokenizerError


@final
@dataclass(frozen=True)
class Splitting:
    """How text is cut into words before merging."""

    pattern: str | None = None
    """A regular expression whose matches are words; None for GPT-2's own."""
    single_digits: bool = False
    """Each digit is a word."""
    nfc: bool = False
    """Unicode is composed first."""
    ignore_merges: bool = False
    """A word that is in the vocabulary is one token, whatever the merges say."""


def _cl100k(digits: str) -> str:
    """The pattern of OpenAI's cl100k_base, which Llama 3, Qwen 2 and GLM 4 differ from by the run of digits."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


GPT2 = Splitting()
LLAMA3 = Splitting(pattern=_cl100k(r"\p{N}{1,3}"), ignore_merges=True)
CL100K = Splitting(pattern=_cl100k(r"\p{N}{1,3}"))
QWEN2 = Splitting(pattern=_cl100k(r"\p{N}"), nfc=True)
STARCODER = Splitting(single_digits=True)


def byte_level_bpe(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    splitting: Splitting = GPT2,
    *,
    add_prefix_space: bool = False,
    source: str,
) -> tokenizers.Tokenizer:
    """The Rust tokenizer, without special tokens.

    Args:
        vocab: token to id; tokens are written in GPT-2's alphabet of 256 printable characters.
        merges: pairs, the first merged first.
        splitting: how text is cut into words.
        add_prefix_space: put a space before the first word.
        source: the file, for messages.

    Raises:
        TokenizerError: a merge names a token that is not in the vocabulary.
    """
    check_merges(vocab, merges, source)
    model = models.BPE(vocab=vocab, merges=list(merges), fuse_unk=False, ignore_merges=splitting.ignore_merges)
    backend = tokenizers.Tokenizer(model)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if splitting.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), "isolated"))
    use_regex = splitting.pattern is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex))
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def split_merges(lines: Iterable[str], source: str) -> list[tuple[str, str]]:
    """`"a b"` lines as pairs.

    Raises:
        TokenizerError: a line is not two tokens; the message has its number.
    """
    merges = []
    for number, line in enumerate(lines, start=1):
        # a first token may itself begin with a space in vocabularies that do not map bytes
        at = line.find(" ", 1)
        if at < 1 or at == len(line) - 1:
            raise TokenizerError(f"{source}: merge {number} is {line!r}, not two tokens with a space between")
        merges.append((line[:at], line[at + 1 :]))
    return merges


def check_merges(vocab: dict[str, int], merges: Iterable[tuple[str, str]], source: str) -> None:
    """Every merge joins two tokens of the vocabulary into a third one.

    Raises:
        TokenizerError: one does not; the message has its number.
    """
    for number, (left, right) in enumerate(merges, start=1):
        for token in (left, right, left + right):
            if token not in vocab:
                raise TokenizerError(
                    f"{source}: merge {number} ({left!r}, {right!r}): {token!r} is not in the vocabulary"
                )
