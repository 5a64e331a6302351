"""JSON in UTF-8: files with an object on each line, and files that are one array of objects."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.file_source import FileSource
from swissarmy.data.sources.indexed_file import IndexedFile

_DECODER = json.JSONDecoder()
_WHITE = " \t\r\n"


@final
@dataclass(frozen=True)
class JsonlSource(IndexedFile):
    """A record for each line of a JSON Lines file. Empty lines are none, and count as lines where a line is named.

    Args:
        path: the file.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The object on a line.

        Raises:
            RecordError: the line is not UTF-8, not JSON, or not an object.
        """
        index = self._number(index)
        data = self._bytes(index)
        try:
            text = data.decode()
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            return self._checked(index)
        is_whole = not text[end:].strip(_WHITE)
        return value if is_whole and type(value) is dict else self._checked(index)

    def _checked(self, index: int) -> dict[str, Any]:
        """The object on a line that needs a closer look: spaces are before it, or something is wrong."""
        line = self._line(index)
        try:
            return _object(_parsed(line))
        except ValueError as error:
            raise RecordError(f"{self.where(index)}: {error}") from error


@final
@dataclass(frozen=True)
class JsonArraySource(FileSource):
    """A record for each object of a JSON file that is one array; it is read into memory as a whole.

    Args:
        path: the file.
    """

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One of the objects.

        Raises:
            RecordError: the array holds something else at this place.
            DataError: the file is no JSON array.
        """
        try:
            return _object(self._records[self._number(index)])
        except ValueError as error:
            raise RecordError(f"{self.where(index)}: {error}") from error

    def where(self, index: int) -> str:
        """`a.json[17]`."""
        return f"{self.path}[{self._number(index)}]"

    @cached_property
    def _records(self) -> list[Any]:
        try:
            text = self._file.read(0, self._file.size).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not valid UTF-8 at byte {error.start}") from error
        try:
            records = _parsed(text)
        except ValueError as error:
            raise DataError(f"{self.path}: {error}") from error
        if not isinstance(records, list):
            raise DataError(f"{self.path}: the file is no array of objects; one object a line is JSON Lines (.jsonl)")
        return records


def _parsed(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is none; says what is wrong, and not where.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"not valid JSON: {error.msg.removesuffix(' at')} at {line}column {error.colno}") from error
    except ValueError as error:  # a number with thousands of digits
        raise ValueError(f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(value: Any) -> dict[str, Any]:
    """A value that is a record.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, dict):
        return value
    kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a single value")
    raise ValueError(f"a record is an object in braces, and this is {kind}")
