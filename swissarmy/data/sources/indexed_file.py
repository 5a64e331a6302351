"""What sources share whose records have different lengths: an index of where each begins."""

from dataclasses import dataclass
from functools import cached_property

from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.file_source import FileSource
from swissarmy.data.sources.record_index import RecordIndex, Scan, open_index, scan_lines

_LINE_FEED = b"\n"


@dataclass(frozen=True)
class IndexedFile(FileSource):
    """A text file whose records begin on lines of their own, by default on every line that is not blank."""

    def __len__(self) -> int:
        return len(self._index)

    def where(self, index: int) -> str:
        """`file:line`, the line on which the record begins."""
        return f"{self.path}:{self._index.line(self._number(index))}"

    def _scan(self) -> tuple[str, Scan]:
        """How records are found, and a name for it, which the kept index bears."""
        return "lines", scan_lines

    @cached_property
    def _index(self) -> RecordIndex:
        kind, scan = self._scan()
        try:
            return open_index(self.path, kind=kind, scan=scan, content=self._content)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error

    def _bytes(self, index: int) -> bytes:
        """A record's bytes, with all up to the next record.

        Raises:
            DataError: the file changed.
        """
        start, stop = self._index.span(index)
        before = min(start, 1)
        data = self._file.read(start - before, stop)
        if before and index and data[:1] != _LINE_FEED:
            raise DataError(f"{self.path} changed since it was opened; start again")
        return data[before:]

    def _line(self, index: int) -> str:
        """The text of the line on which a record begins.

        Raises:
            RecordError: it is not UTF-8.
        """
        line = self._bytes(index).partition(_LINE_FEED)[0].removesuffix(b"\r")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"{self.where(index)}: not valid UTF-8 at byte {error.start} of the line") from error
