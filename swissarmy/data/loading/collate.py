"""Collators: lists of samples as batches of tensors, under the names that models are called with.

Each is a small frozen value, so that it travels to workers. Ids are int64, masks bool with 1 = real or scored. A list
may be empty (a rank that gets nothing of a last batch): the batch then has the same fields, with no rows.
Fields of a sample that a collator does not name stay behind. Shapes: b samples, s tokens of the longest (m on the
decoder's side), rounded up to `pad_to_multiple`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from swissarmy.core.config import report
from swissarmy.data.samples.examples import IGNORED
from swissarmy.data.source import DataError

Samples = Sequence[Mapping[str, Any]]
Batch = dict[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class Padding:
    """How rows of different lengths become a rectangle."""

    pad_id: int
    """Put where there is no token; never seen, so any id that the model knows will do."""
    side: Literal["right", "left"] = "right"
    """Where padding goes."""
    pad_to_multiple: int = 1
    """Round the width up to a multiple of this, which some kernels are faster with."""

    def __post_init__(self) -> None:
        """Refuse what makes no rectangle."""
        problems = [] if self.pad_id >= 0 else [f"pad_id={self.pad_id} is no token"]
        if self.side not in ("right", "left"):
            problems.append(f"side={self.side!r} is neither 'right' nor 'left'")
        if self.pad_to_multiple < 1:
            problems.append(f"pad_to_multiple={self.pad_to_multiple} must be at least 1")
        report("Padding:", problems)

    def ids(self, samples: Samples, name: str) -> Tensor:
        """Token ids `[b, s]`."""
        return self.rows(samples, name, self.pad_id, np.int64)

    def mask(self, samples: Samples, name: str) -> Tensor:
        """`[b, s]`: where the rows of that name have tokens."""
        lengths = [len(sample[name]) for sample in samples]
        columns = torch.arange(self._width(lengths)).expand(len(lengths), -1)
        distance = columns if self.side == "right" else columns.flip(1)
        return distance < torch.tensor(lengths, dtype=torch.int64)[:, None]

    def rows(self, samples: Samples, name: str, fill: int, dtype: type[np.generic]) -> Tensor:
        """The rows of that name `[b, s]`, with `fill` where they have ended."""
        rows = [sample[name] for sample in samples]
        result = np.full((len(rows), self._width([len(row) for row in rows])), fill, dtype=dtype)
        for line, row in zip(result, rows, strict=True):
            line[slice(len(row)) if self.side == "right" else slice(len(line) - len(row), None)] = row
        return torch.from_numpy(result)

    def _width(self, lengths: Sequence[int]) -> int:
        return -(-max(lengths, default=0) // self.pad_to_multiple) * self.pad_to_multiple


@final
@dataclass(frozen=True, kw_only=True)
class CausalCollator:
    """For language models: `input_ids`, `loss_mask`, `padding_mask` and `position_ids`, `[b, s]`.

    Positions count from a row's first token, as `padding_mask` alone would not with padding on the left; a model
    whose positions begin elsewhere wants `model.first_position` added.
    """

    padding: Padding
    """How rows are made equally long."""

    def __call__(self, samples: Samples) -> Batch:
        """The batch."""
        real = self.padding.mask(samples, "input_ids")
        return {
            "input_ids": self.padding.ids(samples, "input_ids"),
            "loss_mask": self.padding.rows(samples, "loss_mask", 0, np.bool_),
            "padding_mask": real,
            "position_ids": (real.cumsum(1) - 1).clamp(min=0),
        }


@final
@dataclass(frozen=True, kw_only=True)
class PackedCollator:
    """For packed rows: `input_ids`, `loss_mask`, `document_ids` and `position_ids`, `[b, length]`.

    Padding is a document of its own, -1, at the right end: a mask of documents keeps it apart, and no other mask is
    needed for it.
    """

    length: int
    """Tokens of a row, so that every batch has one shape."""
    pad_id: int
    """Put where a row is not full."""

    def __call__(self, samples: Samples) -> Batch:
        """The batch.

        Raises:
            DataError: a row has more tokens.
        """
        longest = max((len(sample["input_ids"]) for sample in samples), default=0)
        if longest > self.length:
            raise DataError(f"a packed row has {longest} tokens, and the batch has room for {self.length}")
        padding = Padding(pad_id=self.pad_id, pad_to_multiple=self.length)
        return {
            "input_ids": padding.ids(samples, "input_ids"),
            "loss_mask": padding.rows(samples, "loss_mask", 0, np.bool_),
            "document_ids": padding.rows(samples, "document_ids", -1, np.int64),
            "position_ids": padding.rows(samples, "position_ids", 0, np.int64),
        }


@final
@dataclass(frozen=True, kw_only=True)
class Seq2SeqCollator:
    """For encoder-decoders: `input_ids` and `padding_mask` `[b, s]`, and of the target, `[b, m]`,
    `decoder_input_ids`, `decoder_padding_mask` and `labels`, -100 where there is none.

    Labels stand where the decoder gives them: nothing is left to shift.
    """

    padding: Padding
    """How rows are made equally long."""

    def __call__(self, samples: Samples) -> Batch:
        """The batch."""
        return {
            "input_ids": self.padding.ids(samples, "input_ids"),
            "padding_mask": self.padding.mask(samples, "input_ids"),
            "decoder_input_ids": self.padding.ids(samples, "decoder_input_ids"),
            "decoder_padding_mask": self.padding.mask(samples, "decoder_input_ids"),
            "labels": self.padding.rows(samples, "labels", IGNORED, np.int64),
        }


@final
@dataclass(frozen=True, kw_only=True)
class ClassificationCollator:
    """For labelled texts: `input_ids`, `token_type_ids` and `padding_mask` `[b, s]`, `labels` `[b]`."""

    padding: Padding
    """How rows are made equally long."""
    token_types: bool = True
    """Whether the model has embeddings for the first and second text of a pair."""

    def __call__(self, samples: Samples) -> Batch:
        """The batch."""
        batch = {"input_ids": self.padding.ids(samples, "input_ids")}
        if self.token_types:
            batch["token_type_ids"] = self.padding.rows(samples, "token_type_ids", 0, np.int64)
        return batch | {"padding_mask": self.padding.mask(samples, "input_ids"), "labels": _labels(samples)}


@final
@dataclass(frozen=True, kw_only=True)
class ImageCollator:
    """For pictures: `pixel_values` `[b, c, h, w]` float32, and `labels` `[b]`."""

    with_labels: bool = True
    """Whether samples have labels."""

    def __call__(self, samples: Samples) -> Batch:
        """The batch.

        Raises:
            DataError: pictures have different shapes.
        """
        pictures = [torch.from_numpy(np.asarray(sample["pixel_values"], dtype=np.float32)) for sample in samples]
        shapes = {tuple(picture.shape) for picture in pictures}
        if len(shapes) > 1:
            raise DataError(f"pictures of a batch have different shapes: {', '.join(map(str, sorted(shapes)))}")
        stacked = torch.stack(pictures) if pictures else torch.empty(0, 0, 0, 0)
        return {"pixel_values": stacked, "labels": _labels(samples)} if self.with_labels else {"pixel_values": stacked}


def _labels(samples: Samples) -> Tensor:
    return torch.tensor([int(sample["labels"]) for sample in samples], dtype=torch.int64)
