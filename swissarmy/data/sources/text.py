"""Plain text in UTF-8: a record is a line, a paragraph, or the whole file."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, final

import numpy as np

from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.indexed_file import IndexedFile
from swissarmy.data.sources.record_index import Positions, Scan, scan_lines


@final
@dataclass(frozen=True)
class TextSource(IndexedFile):
    """`{"text": ...}` for each piece of a text file. Lines without anything but spaces are no records.

    Args:
        path: the file.
        unit: what a record is: a `line`, a `paragraph` (lines up to an empty one) or the whole `file`.
    """

    unit: Literal["line", "paragraph", "file"] = "line"

    def __post_init__(self) -> None:
        """Refuse another unit."""
        if self.unit not in ("line", "paragraph", "file"):
            raise DataError(f"{self.path}: unit={self.unit!r} is none of 'line', 'paragraph', 'file'")

    def __len__(self) -> int:
        return min(len(self._index), 1) if self.unit == "file" else len(self._index)

    def __getitem__(self, index: int) -> dict[str, str]:
        """The text, without line breaks at its end; a whole file's is complete.

        Raises:
            RecordError: it is not UTF-8.
        """
        index = self._number(index)
        if self.unit == "line":
            return {"text": self._line(index)}
        text = self._text(index)
        return {"text": text if self.unit == "file" else text.rstrip()}

    def _scan(self) -> tuple[str, Scan]:
        return ("paragraphs", scan_paragraphs) if self.unit == "paragraph" else super()._scan()

    def _text(self, index: int) -> str:
        data = self._file.read(0, self._file.size) if self.unit == "file" else self._bytes(index)
        try:
            return data.decode("utf-8-sig" if self.unit == "file" else "utf-8")
        except UnicodeDecodeError as error:
            first = 1 if self.unit == "file" else self._index.line(index)
            line = first + data.count(b"\n", 0, error.start)
            raise RecordError(f"{self.path}:{line}: not valid UTF-8: {error.reason}") from error


def scan_paragraphs(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[Positions, Positions]]:
    """A record for each line after a blank one, or at the beginning, that is not blank itself."""
    lines = paragraphs = 0
    goes_on = False
    for starts, blanks in scan_lines(file, start, stop):
        after_blank = np.zeros(len(starts) + 1, np.bool_)
        after_blank[blanks - lines] = True
        after_blank[0] |= not goes_on
        begins = after_blank[:-1]
        count = paragraphs + np.concatenate([[0], np.cumsum(begins)])
        yield starts[begins], np.sort(np.concatenate([count[blanks - lines], count[1:][~begins]]))
        goes_on = not after_blank[-1] and bool(len(starts) or goes_on)
        lines, paragraphs = lines + len(starts), int(count[-1])
