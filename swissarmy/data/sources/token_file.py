"""Token files: the ids of many documents in one long row, and where each document begins.

A header of 4096 bytes (JSON, padded with spaces), then the ids in the smallest type that holds the vocabulary, zeros
up to a multiple of 8 bytes, and the documents' offsets as int64, one more than there are documents. All numbers are
little-endian. The ids are memory-mapped; a file is never changed once it has its name.
"""

import hashlib
import json
import mmap
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import numpy.typing as npt

from swissarmy.core.files import replace_file
from swissarmy.data.source import DataError, digest

Ids = npt.NDArray[np.int64]

SUFFIX = ".tokens"
_FORMAT = "swissarmy tokens 1"
_HEADER = 4096
_CHUNK = 1 << 24


@final
@dataclass(frozen=True, kw_only=True)
class TokenHeader:
    """What a token file says about itself."""

    documents: int
    tokens: int
    dtype: str
    """Of the ids: `uint16` or `uint32`."""
    vocab_size: int
    """Every id is below."""
    made_of: str
    """The fingerprint of the records and the tokenizer that the ids come from."""
    skipped: int = 0
    """Bad records that were left out."""
    checksum: str = ""
    """Of all that follows the header (BLAKE2b)."""

    @property
    def size(self) -> int:
        """Of the whole file, in bytes."""
        return self.offsets_at + 8 * (self.documents + 1)

    @property
    def offsets_at(self) -> int:
        """The byte where the documents' offsets begin."""
        return _HEADER + -(-self.tokens * np.dtype(self.dtype).itemsize // 8) * 8


@final
class TokenFile:
    """A token file, mapped.

    Args:
        path: the file.

    Raises:
        DataError: it cannot be read, or is no complete token file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.header = _read_header(file, path)
                self._data = mmap.mmap(file.fileno(), self.header.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
        dtype = np.dtype(self.header.dtype).newbyteorder("<")
        self.tokens = np.frombuffer(self._data, dtype, count=self.header.tokens, offset=_HEADER)
        """`[tokens]`, the ids as stored."""
        self.offsets = np.frombuffer(self._data, "<i8", offset=self.header.offsets_at)
        """`[documents + 1]`, where each document begins in `tokens`, and where the last one ends."""
        if self.offsets[0] != 0 or self.offsets[-1] != self.header.tokens:
            raise DataError(f"{path}: its documents do not fit its tokens; copy or make it again")

    def __reduce__(self) -> tuple[type["TokenFile"], tuple[Path]]:
        return TokenFile, (self.path,)

    def __len__(self) -> int:
        return self.header.documents

    def document(self, index: int) -> Ids:
        """The ids of one document, `[n]`, from 0 to `len(self)` - 1."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Of all the ids, by the checksum in the header."""
        return digest("TokenFile", self.header.checksum, self.header.vocab_size)

    def verify(self) -> None:
        """Read everything, and compare it with the checksum.

        Raises:
            DataError: it differs.
        """
        content = hashlib.blake2b(digest_size=16)
        for start in range(_HEADER, self.header.size, _CHUNK):
            content.update(self._data[start : start + _CHUNK])
        if content.hexdigest() != self.header.checksum:
            raise DataError(f"{self.path} differs from what was written (checksum); make it or copy it again")


class TokenFileWriter:
    """Writes documents one after another; made by `write_token_file`."""

    def __init__(self, file: BinaryIO, path: Path, *, vocab_size: int, made_of: str) -> None:
        self._file, self._path = file, path
        self._vocab_size, self._made_of = vocab_size, made_of
        self._dtype = smallest_dtype(vocab_size)
        self._offsets = array("q", [0])
        self._content = hashlib.blake2b(digest_size=16)
        self.skipped = 0
        file.write(bytes(_HEADER))

    def add(self, ids: Ids, *, where: str) -> None:
        """One document, `[n]`.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < self._vocab_size):
            bad = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise DataError(f"{where}: token id {bad} is outside the vocabulary of {self._vocab_size}")
        self._write(ids.astype(self._dtype.newbyteorder("<")).data)
        self._offsets.append(self._offsets[-1] + ids.size)

    def append(self, part: TokenFile) -> None:
        """All documents of another file with the same vocabulary."""
        for start in range(0, part.header.tokens, _CHUNK):
            self._write(part.tokens[start : start + _CHUNK].data)
        self._offsets.frombytes((part.offsets[1:].astype(np.int64) + self._offsets[-1]).tobytes())
        self.skipped += part.header.skipped

    def finish(self) -> None:
        """Write the offsets and, before everything else, the header."""
        tokens = self._offsets[-1]
        self._write(bytes(-tokens * self._dtype.itemsize % 8))
        self._write(np.frombuffer(self._offsets, np.int64).astype("<i8").data)
        header = TokenHeader(
            documents=len(self._offsets) - 1,
            tokens=tokens,
            dtype=self._dtype.name,
            vocab_size=self._vocab_size,
            made_of=self._made_of,
            skipped=self.skipped,
            checksum=self._content.hexdigest(),
        )
        self._file.seek(0)
        self._file.write(json.dumps({"format": _FORMAT, **asdict(header)}).encode().ljust(_HEADER))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._content.update(data)


@contextmanager
def write_token_file(path: Path, *, vocab_size: int, made_of: str) -> Iterator[TokenFileWriter]:
    """A writer; the file gets its name when the block ends without an error.

    Args:
        path: the file.
        vocab_size: every id must be below.
        made_of: a fingerprint of what the ids come from.

    Raises:
        OSError: it cannot be written.
        DataError: the vocabulary is empty or too large.
    """
    if not 1 <= vocab_size <= 1 << 32:
        raise DataError(f"vocab_size={vocab_size} must be from 1 to {1 << 32}")
    with replace_file(path) as file:
        writer = TokenFileWriter(file, path, vocab_size=vocab_size, made_of=made_of)
        yield writer
        writer.finish()


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """`uint16` where all ids fit, otherwise `uint32`."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _read_header(file: BinaryIO, path: Path) -> TokenHeader:
    """The header; what it claims is compared with the file's size before anything is mapped."""
    start = file.read(_HEADER)
    size = file.seek(0, 2)
    try:
        values = json.loads(start)
        if values.pop("format") != _FORMAT:
            raise ValueError
        header = TokenHeader(**values)
        _check_types(header)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is no token file; `sat data tokenize` makes one") from error
    if header.size != size:
        raise DataError(
            f"{path} has {size} bytes and should have {header.size} for {header.tokens} tokens in {header.documents} "
            "documents: copy or make it again"
        )
    return header


def _check_types(header: TokenHeader) -> None:
    counts: Sequence[int] = (header.documents, header.tokens, header.vocab_size, header.skipped)
    if any(type(count) is not int or count < 0 for count in counts) or header.dtype not in ("uint16", "uint32"):
        raise ValueError
    if any(type(getattr(header, field.name)) is not str for field in fields(header) if field.type is str):
        raise ValueError
