"""What sources over one file have in common: opened on first use, pickled as path and options, read by position."""

import dataclasses
import os
import weakref
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, final

from swissarmy.data.source import DataError, check_index, digest, file_fingerprint

_MOST_AT_ONCE = 1 << 30
"""Bytes; Linux reads no more than 2 GiB in one call."""


@final
class FileReader:
    """A file's bytes by position, from any thread and after a fork.

    It reads and does not map: of a mapped file that somebody shortens, a page that is gone kills the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`.

        Raises:
            DataError: the file ends before.
        """
        if not 0 <= start <= stop:
            raise DataError(f"{self.path}: there are no bytes {start} to {stop}")
        length = stop - start
        data = os.pread(self._descriptor, min(length, _MOST_AT_ONCE), start)
        return data if len(data) == length else self._rest(data, start + len(data), stop)

    def _rest(self, data: bytes, start: int, stop: int) -> bytes:
        pieces = [data]
        while start < stop:
            piece = os.pread(self._descriptor, min(stop - start, _MOST_AT_ONCE), start)
            if not piece:
                raise DataError(f"{self.path} ends before byte {stop}: it changed since it was opened; start again")
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)


@dataclasses.dataclass(frozen=True)
class FileSource(ABC):
    """A source over one file. Subclasses are frozen dataclasses; what they open, they keep in cached properties.

    Raises:
        DataError: on first use, if the file cannot be opened.
    """

    path: Path

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: whatever was opened is opened again by whoever unpickles or copies it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def where(self, index: int) -> str: ...

    @cached_property
    def fingerprint(self) -> str:
        """Of the file's content and the options; its name is no part of it."""
        options = {name: value for name, value in self.__getstate__().items() if name != "path"}
        return digest(type(self).__name__, options, self._content)

    @cached_property
    def _content(self) -> str:
        try:
            return file_fingerprint(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error

    @cached_property
    def _file(self) -> FileReader:
        try:
            return FileReader(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error

    def _number(self, index: int) -> int:
        return check_index(index, len(self))
