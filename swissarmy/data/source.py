"""What a source of data is: records by number, a fingerprint that tells when they changed, and a place for errors."""

import hashlib
import json
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from swissarmy.core.errors import SwissArmyError, nearest

_WHOLE = 1 << 20
"""Bytes; a file up to this size is hashed whole."""
_BLOCK = 1 << 14
_BLOCKS = 64
"""A longer file is hashed in this many blocks, spread evenly from its first byte to its last."""


class DataError(SwissArmyError):
    """A source of data cannot be opened or read as asked."""


class RecordError(DataError):
    """One record is bad; the message begins with where it stands (`a.jsonl:17`)."""


@runtime_checkable
class Source(Protocol):
    """Records by number. It is opened when first read, so that it travels to workers as little more than its path.

    Reading is a pure function of the number, from any process, in any order.
    """

    def __len__(self) -> int:
        """How many records there are, found without reading them."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The fields of one record.

        Raises:
            RecordError: the record is bad; others can still be read.
            IndexError: there is no such record.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the records or the settings change; cheap, so it looks at samples of what is large."""
        ...

    def where(self, index: int) -> str:
        """Where a record stands, as a person would look it up: `a.jsonl:17`."""
        ...


@runtime_checkable
class CountsTokens(Protocol):
    """A source that may know how many tokens each record has without reading it. A method, as `isinstance` evaluates
    properties."""

    def token_counts(self) -> npt.NDArray[np.integer[Any]] | None:
        """`[records]`; `None` if it would have to read them."""
        ...


def check_index(index: int, length: int) -> int:
    """`index` as a number from 0; negative ones count from the end, as in a list.

    Raises:
        IndexError: it is outside.
    """
    number = operator.index(index)
    if not -length <= number < length:
        raise IndexError(f"record {number} of {length}")
    return number % length


def field_of(record: Mapping[str, Any], name: str, where: str) -> Any:
    """A record's field.

    Raises:
        RecordError: it has none of that name; lists those it has.
    """
    if name not in record:
        has = ", ".join(repr(key) for key in record) or "none"
        raise RecordError(f"{where}: there is no field {name!r}.{nearest(name, map(str, record))} Its fields: {has}")
    return record[name]


def digest(*parts: object) -> str:
    """A short hash of plain values (what JSON can hold), the same in every process and version."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=os.fspath)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_fingerprint(path: str | os.PathLike[str], *, size: int | None = None) -> str:
    """A short hash of a file's size and content; the name is no part of it, so a moved file is the same data.

    Of a file over 1 MiB only blocks are read: an edit between them that keeps the size is not seen.

    Args:
        path: the file.
        size: look only at so many bytes from its start.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        content = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
        if size <= _WHOLE:
            content.update(os.pread(file.fileno(), size, 0))
        else:
            for block in range(_BLOCKS):
                content.update(os.pread(file.fileno(), _BLOCK, (size - _BLOCK) * block // (_BLOCKS - 1)))
    return content.hexdigest()
