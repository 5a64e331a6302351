"""`Examples`: the records of a source as what a model reads, checked, and no longer than it may be.

A sample is a dict of NumPy arrays under the names that models use: `input_ids` `[n]`, `loss_mask` `[n]`, `labels`, ...
`loss_mask` belongs to the tokens of `input_ids`: where it is true, the token is to be predicted from those before it.
Nothing is shifted here or in the batch; whoever computes the loss pairs `logits[:, :-1]` with `input_ids[:, 1:]` and
`loss_mask[:, 1:]`. A first token has nothing before it and is never scored.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, final, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from swissarmy.core.config import report
from swissarmy.core.errors import TokenizerError
from swissarmy.data.source import DataError, RecordError, Source, check_index, digest

Sample = dict[str, Any]
"""Arrays under the names that models use."""
Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

IGNORED = -100
"""In `labels`: not scored; what `torch.nn.functional.cross_entropy` ignores."""
TOKEN_FIELDS = ("input_ids", "decoder_input_ids")


class Cut(NamedTuple):
    """Where a sequence that is too long is cut off."""

    max_length: int
    """In tokens."""
    side: Literal["right", "left"] = "right"
    """The end that is lost."""

    def kept(self, length: int) -> slice:
        """The part of a sequence of `length` tokens that stays."""
        return slice(self.max_length) if self.side == "right" else slice(max(0, length - self.max_length), None)


@runtime_checkable
class Encoder(Protocol):
    """From a record to a sample. Frozen and picklable: it travels to workers."""

    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """The sample of one record.

        Args:
            record: fields by name.
            where: where the record stands, to begin errors with.
            cut: shorten each sequence to this; `None` leaves it whole.

        Raises:
            RecordError: the record does not have what the sample needs.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the same record gives another sample."""
        ...


@final
class Examples:
    """A source whose records are samples: `source[i]` encoded.

    Args:
        source: records.
        encode: makes a sample of each.
        max_length: the most tokens that a sequence may have; `None` for no limit.
        truncation: what becomes of a longer one: the end to cut off, or `error`. To split or drop long ones, leave
            `max_length` out and put `Pieces` or `Packed` around.
        vocab_size: how many ids the model knows; others are refused.
        num_labels: how many classes it knows; others are refused.

    Raises:
        ConfigError: `max_length`, `vocab_size` or `num_labels` is below 1, or there is no such `truncation`.
    """

    def __init__(
        self,
        source: Source,
        encode: Encoder,
        *,
        max_length: int | None = None,
        truncation: Literal["right", "left", "error"] = "right",
        vocab_size: int | None = None,
        num_labels: int | None = None,
    ) -> None:
        sizes = {"max_length": max_length, "vocab_size": vocab_size, "num_labels": num_labels}
        problems = [
            f"{name}={size} must be at least 1" for name, size in sizes.items() if size is not None and size < 1
        ]
        if truncation not in ("right", "left", "error"):
            problems.append(f"truncation={truncation!r} is none of 'right', 'left', 'error'")
        report("Examples:", problems)
        self.source, self.encode = source, encode
        self.max_length, self.truncation = max_length, truncation
        self.vocab_size, self.num_labels = vocab_size, num_labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a record.

        Raises:
            RecordError: the record cannot be read or encoded, is too long, or has an id or a class that the model does
                not know.
        """
        index = check_index(index, len(self.source))
        record = self.source[index]
        try:
            return self._checked(record, where="")
        except RecordError:
            # finding out where a record stands takes longer than reading it: only a bad one is worth that
            return self._checked(record, where=self.source.where(index))

    @property
    def cut(self) -> Cut | None:
        """What the encoder shortens sequences to."""
        if self.max_length is None or self.truncation == "error":
            return None
        return Cut(self.max_length, self.truncation)

    @property
    def fingerprint(self) -> str:
        """Of the source, the encoder and the limit."""
        return digest("examples", self.source.fingerprint, self.encode.fingerprint, self.max_length, self.truncation)

    def where(self, index: int) -> str:
        """Where the record stands."""
        return self.source.where(index)

    def _checked(self, record: Mapping[str, Any], *, where: str) -> Sample:
        try:
            sample = self.encode(record, where=where, cut=self.cut)
        except TokenizerError as error:
            raise RecordError(f"{where}: {error}") from error
        for name in TOKEN_FIELDS:
            if name in sample:
                self._check(name, sample[name], where)
        label = sample.get("labels")
        if self.num_labels is not None and label is not None and label.ndim == 0 and label >= self.num_labels:
            raise RecordError(
                f"{where}: the class is number {label}, and the model has {self.num_labels}, numbered from "
                "0: give its head more (num_labels), or mend the record"
            )
        return sample

    def _check(self, name: str, ids: Ids, where: str) -> None:
        if ids.size == 0:
            raise RecordError(f"{where}: {name} is empty: the record gives no token")
        if self.max_length is not None and len(ids) > self.max_length:
            raise RecordError(
                f"{where}: {name} has {len(ids)} tokens, more than {self.max_length}: allow truncation, or split or "
                "drop long records"
            )
        if int(ids.min()) < 0 or (self.vocab_size is not None and int(ids.max()) >= self.vocab_size):
            position = int(ids.argmin() if ids.min() < 0 else ids.argmax())
            known = "no id is negative" if self.vocab_size is None else f"the model knows 0 to {self.vocab_size - 1}"
            raise RecordError(
                f"{where}: token id {ids[position]} at position {position} of {name}: {known}; was the text encoded "
                "by another tokenizer?"
            )


def token_sample(input_ids: Ids, scored: Flags, cut: Cut | None) -> Sample:
    """A sample of a causal model: ids `[n]` and which of them are to be predicted, `[n]`, shortened to `cut`."""
    kept = slice(None) if cut is None else cut.kept(len(input_ids))
    loss_mask = scored[kept].copy()
    loss_mask[:1] = False
    return {"input_ids": input_ids[kept], "loss_mask": loss_mask}


def length_of(sample: Mapping[str, Any]) -> int:
    """How many tokens a sample has; of a pair of sequences, the longer one's.

    Raises:
        DataError: it has no tokens at all, like an image.
    """
    lengths = [len(sample[name]) for name in TOKEN_FIELDS if name in sample]
    if not lengths:
        raise DataError(f"a sample with {', '.join(sample) or 'no fields'} has no tokens to count")
    return max(lengths)
