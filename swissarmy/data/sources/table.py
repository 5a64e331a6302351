"""CSV and TSV: a header, then a record for each row. Quoted fields may hold delimiters, line breaks and `""`."""

import csv
import mmap
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import BinaryIO, final

import numpy as np

from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.indexed_file import IndexedFile
from swissarmy.data.sources.record_index import Positions, Scan, scan_lines

_CHUNK = 1 << 24
_LONGEST_BLANK = 1 << 16
"""Bytes; a row of more spaces than this is one."""
_FIELD_LIMIT = threading.Lock()


@final
@dataclass(frozen=True)
class CsvSource(IndexedFile):
    """A row as `{column: text}`; no value is taken for a number. Lines of nothing but spaces and tabs are no rows.

    Args:
        path: the file; its first row names the columns.
        delimiter: what stands between fields, one ASCII character.
    """

    delimiter: str = ","

    def __post_init__(self) -> None:
        """Refuse what cannot stand between fields."""
        if len(self.delimiter) != 1 or not self.delimiter.isascii() or self.delimiter in '"\r\n':
            raise DataError(f"{self.path}: delimiter={self.delimiter!r} must be one ASCII character, and no quote")

    def __len__(self) -> int:
        return max(len(self._index) - 1, 0)

    def __getitem__(self, index: int) -> dict[str, str]:
        """One row.

        Raises:
            RecordError: it is not UTF-8, badly quoted, or not as long as the header.
            DataError: the header cannot be read.
        """
        row = 1 + self._number(index)
        values = self._row(row)
        if len(values) != len(self.columns):
            raise RecordError(
                f"{self._place(row)}: {len(values)} fields, and the header has {len(self.columns)}: "
                f"{', '.join(self.columns)}"
            )
        return dict(zip(self.columns, values, strict=True))

    def where(self, index: int) -> str:
        """`file:line`, the line on which the row begins."""
        return self._place(1 + self._number(index))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names in the first row."""
        if not len(self._index):
            raise DataError(f"{self.path} is empty: the first row of a table names its columns")
        names = tuple(self._row(0))
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise DataError(f"{self._place(0)}: the header names {min(twice)!r} twice")
        return names

    def _place(self, row: int) -> str:
        return f"{self.path}:{self._index.line(row)}"

    def _scan(self) -> tuple[str, Scan]:
        return f"rows by {self.delimiter!r}", partial(scan_rows, delimiter=self.delimiter.encode())

    def _row(self, row: int) -> list[str]:
        try:
            text = _without_blank_lines(self._bytes(row).decode())
        except UnicodeDecodeError as error:
            raise RecordError(f"{self._place(row)}: not valid UTF-8 at byte {error.start} of the row") from error
        try:
            rows = _parse(text, self.delimiter)
        except csv.Error as error:
            raise RecordError(f"{self._place(row)}: badly quoted: {error}") from error
        if len(rows) != 1:
            raise RecordError(f"{self._place(row)}: a single row was expected here, and there are {len(rows)}")
        return rows[0]


def scan_rows(file: BinaryIO, start: int, stop: int, *, delimiter: bytes) -> Iterator[tuple[Positions, Positions]]:
    """A record for each row; a line break in quotes ends none. A quote opens a field only where a field begins."""
    if not _has_quotes(file, start, stop):
        yield from scan_lines(file, start, stop)
        return
    begins = rb"(?:(?<![^\n%b])|(?<=\A\xef\xbb\xbf))" % re.escape(delimiter)
    quoted_or_end = re.compile(begins + rb'"[^"]*+(?:""[^"]*+)*+"?|\n')
    with mmap.mmap(file.fileno(), stop, access=mmap.ACCESS_READ) as data:
        row = start + 3 * (start == 0 and data[:3] == b"\xef\xbb\xbf")
        starts: list[int] = []
        skips: list[int] = []
        for match in quoted_or_end.finditer(data, row):
            if data[match.start()] == ord("\n"):
                _end_row(data, row, match.start(), starts, skips)
                row = match.end()
            else:
                skips += [len(starts) + 1] * match.group().count(b"\n")
        if row < stop:
            _end_row(data, row, stop, starts, skips)
    yield np.array(starts, np.int64), np.array(skips, np.int64)


def _end_row(data: mmap.mmap, row: int, end: int, starts: list[int], skips: list[int]) -> None:
    blank = end - row <= _LONGEST_BLANK and not data[row:end].strip(b" \t\r")
    (skips if blank else starts).append(len(starts) if blank else row)


def _has_quotes(file: BinaryIO, start: int, stop: int) -> bool:
    file.seek(start)
    while start < stop:
        chunk = file.read(min(_CHUNK, stop - start))
        if b'"' in chunk:
            return True
        start += len(chunk)
        if not chunk:
            break
    return False


def _without_blank_lines(text: str) -> str:
    """A row without the line break at its end, and without blank lines after it."""
    end = len(text.rstrip(" \t\r\n"))
    return text[:end] + text[end:].partition("\n")[0].removesuffix("\r")


def _parse(text: str, delimiter: str) -> list[list[str]]:
    """The rows in a piece of text, with fields of any length."""
    with _FIELD_LIMIT:  # the limit is the process's, so it is put back
        limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
        try:
            return list(csv.reader([text], delimiter=delimiter, strict=True))
        finally:
            csv.field_size_limit(limit)
