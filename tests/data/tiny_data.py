"""A source in memory and tokenizers small enough to count on one's fingers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from swissarmy.data.source import RecordError, digest
from swissarmy.data.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


class Records:
    """A list as a source; `None` in it stands for a bad record. Counts what is read of it."""

    def __init__(self, records: Sequence[Mapping[str, Any] | None], name: str = "a.jsonl") -> None:
        self.records, self.name = records, name
        self.reads = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        self.reads += 1
        record = self.records[index]
        if record is None:
            raise RecordError(f"{self.where(index)}: bad")
        return record

    @property
    def fingerprint(self) -> str:
        return digest(self.name, [str(record) for record in self.records])

    def where(self, index: int) -> str:
        return f"{self.name}:{index + 1}"


class Tokens(Records):
    """Documents of ids; every id says which document it is of and where: `1000 * document + position`."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__(
            [{"input_ids": np.arange(length) + 1000 * document} for document, length in enumerate(lengths)]
        )


def letters(**options: Any) -> Tokenizer:
    """A token for each character, ids from 4 on in the order of the alphabet; `<s>` is put before a text."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for character in "abcdefghijklmnopqrstuvwxyz .:|\n":
        vocab[character] = len(vocab)
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, special_tokens=SPECIAL, **options)


def byte_level(**options: Any) -> Tokenizer:
    """Words with the space before them, whose offsets leave whitespace out, as those of most published tokenizers."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["What is it?\n A cat.\n\n What is that? A dog."] * 3, trainer)
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return Tokenizer(backend, special_tokens=SPECIAL, **options)


def spaced(**options: Any) -> Tokenizer:
    """Llama 2's kind: a space is put before the text and written as ▁, unknown characters are bytes."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    for token in ["▁", *"abcde", "▁a", "ab"]:
        vocab[token] = len(vocab)
    merges = [("▁", "a"), ("a", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, special_tokens=SPECIAL, **options)


def pairs(**options: Any) -> Tokenizer:
    """BERT's kind, on words: `[CLS] a b [SEP] c [SEP]`."""
    vocab = {token: number for number, token in enumerate("[PAD] [UNK] [CLS] [SEP] a b c d e f".split())}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return Tokenizer(backend, special_tokens={"pad_token": "[PAD]", "sep_token": "[SEP]"}, **options)
