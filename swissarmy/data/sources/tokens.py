"""Token files as sources: a record for each document, or for each stretch of the whole row of tokens."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt

from swissarmy.data.source import DataError, digest
from swissarmy.data.sources.file_source import FileSource
from swissarmy.data.sources.token_file import TokenFile

Ids = npt.NDArray[np.int64]


@final
@dataclass(frozen=True)
class TokenDocuments(FileSource):
    """`{"input_ids": [n]}` for each document of a token file.

    Args:
        path: the file.
    """

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Ids]:
        """One document, int64."""
        return {"input_ids": self.tokens.document(self._number(index))}

    def where(self, index: int) -> str:
        """`a.tokens, document 17`."""
        return f"{self.path}, document {self._number(index)}"

    @cached_property
    def fingerprint(self) -> str:
        """Of all the ids."""
        return digest("TokenDocuments", self.tokens.fingerprint)

    @cached_property
    def tokens(self) -> TokenFile:
        """The file."""
        return TokenFile(self.path)

    def token_counts(self) -> npt.NDArray[np.int64]:
        """`[documents]`, how many tokens each has, without reading them."""
        lengths: npt.NDArray[np.int64] = np.diff(self.tokens.offsets)
        return lengths


@final
@dataclass(frozen=True)
class TokenWindows(FileSource):
    """`{"input_ids": [length]}` for each stretch of a token file, cut without regard to documents.

    What is left at the end and is shorter than `length` is no record.

    Args:
        path: the file.
        length: tokens in a record.
        stride: how far each record begins after the one before; `length` when omitted. For inputs and targets of
            `n` tokens each take `length=n + 1, stride=n`.
    """

    length: int
    stride: int | None = None

    def __post_init__(self) -> None:
        """Refuse stretches of nothing."""
        if self.length < 1 or (self.stride is not None and self.stride < 1):
            raise DataError(f"{self.path}: length={self.length} and stride={self.stride} must be at least 1")

    def __len__(self) -> int:
        return max(0, (self._tokens.header.tokens - self.length) // self._stride + 1)

    def __getitem__(self, index: int) -> dict[str, Ids]:
        """One stretch, int64."""
        start = self._number(index) * self._stride
        return {"input_ids": self._tokens.tokens[start : start + self.length].astype(np.int64)}

    def where(self, index: int) -> str:
        """`a.tokens, tokens 2048 to 4095`."""
        start = self._number(index) * self._stride
        return f"{self.path}, tokens {start} to {start + self.length - 1}"

    @cached_property
    def fingerprint(self) -> str:
        """Of all the ids and the cut."""
        return digest("TokenWindows", self._tokens.fingerprint, self.length, self._stride)

    @property
    def _stride(self) -> int:
        return self.length if self.stride is None else self.stride

    @cached_property
    def _tokens(self) -> TokenFile:
        return TokenFile(self.path)
