"""Where each record of a text file begins: found once, kept beside the file, and trusted only while it fits.

The index of `a.jsonl` is `a.jsonl.sat-index`; where the folder cannot be written it is in the user's cache folder.
It holds a header of 4096 bytes (JSON, and in the last four a checksum of all the rest), then `starts` and `skips` as
int64.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import numpy.typing as npt

from swissarmy.core.files import replace_file
from swissarmy.data.source import digest, file_fingerprint

Positions = npt.NDArray[np.int64]
Scan = Callable[[BinaryIO, int, int], Iterator[tuple[Positions, Positions]]]
"""Reads a file from a position where a record begins up to another; gives `starts` and `skips` piece by piece, the
skips counted from the first record of the scan."""

SUFFIX = ".sat-index"
_HEADER = 4096
_CHECKSUM = 4
_CHUNK = 1 << 24
_WORTH_KEEPING = 1 << 20
"""Bytes; a smaller file is scanned faster than its index is read."""
_BOM = b"\xef\xbb\xbf"
_WHITE = np.isin(np.arange(256), list(b" \t\r\n"))
_BLANK = re.compile(rb"[ \t\r]*")


@final
@dataclass(frozen=True)
class RecordIndex:
    """The records of a text file.

    Args:
        starts: [records] the byte where each begins.
        skips: for each line that begins no record (it is blank, or a quoted field runs over it) the number of records
            that begin before it; ascending.
        size: of the file, in bytes.
    """

    starts: Positions
    skips: Positions
    size: int

    def __len__(self) -> int:
        return len(self.starts)

    def span(self, index: int) -> tuple[int, int]:
        """The bytes from a record's first to the next one's: blank lines that follow it are in it."""
        stop = self.starts.item(index + 1) if index + 1 < len(self.starts) else self.size
        return self.starts.item(index), stop

    def line(self, index: int) -> int:
        """The line on which a record begins, counted from 1."""
        return index + 1 + int(np.searchsorted(self.skips, index, side="right"))


def scan_lines(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[Positions, Positions]]:
    """A record for each line that has more than spaces; lines end with a line feed, and the last one need not."""
    begin = position = start + _skip_byte_order_mark(file, start)
    blank, records = True, 0
    while chunk := file.read(min(_CHUNK, stop - position)):
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
        is_blank = _blank_lines(chunk, ends)
        if len(ends):
            is_blank[0] &= blank
            starts = np.concatenate([[begin], ends[:-1] + (position + 1)])
            yield _sorted_out(starts, is_blank[:-1], records)
            records += len(starts) - int(is_blank[:-1].sum())
            begin, blank = position + int(ends[-1]) + 1, True
        blank &= bool(is_blank[-1])
        position += len(chunk)
    if begin < position:
        yield _sorted_out(np.array([begin]), np.array([blank]), records)


def _skip_byte_order_mark(file: BinaryIO, start: int) -> int:
    file.seek(start)
    if start == 0 and file.read(len(_BOM)) == _BOM:
        return len(_BOM)
    file.seek(start)
    return 0


def _blank_lines(chunk: bytes, ends: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Whether each line of a chunk is blank as far as the chunk goes; what follows the last line feed is one too."""
    starts, stops = np.concatenate([[0], ends + 1]), np.concatenate([ends, [len(chunk)]])
    blank: npt.NDArray[np.bool_] = starts == stops
    longer = np.flatnonzero(~blank)
    # only a line that begins with a space is looked at further
    for line in longer[_WHITE[np.frombuffer(chunk, np.uint8)[starts[longer]]]]:
        found = _BLANK.match(chunk, starts[line], stops[line])
        blank[line] = found is not None and found.end() == stops[line]
    return blank


def _sorted_out(starts: Positions, blank: npt.NDArray[np.bool_], records: int) -> tuple[Positions, Positions]:
    before = records + np.cumsum(~blank)
    return starts[~blank].astype(np.int64), before[blank].astype(np.int64)


def open_index(path: Path, *, kind: str, scan: Scan, content: str) -> RecordIndex:
    """The index of a file: read where it is kept, extended where the file has grown, made where there is none.

    Args:
        path: the file.
        kind: what `scan` looks for; an index of another kind is not used.
        scan: finds the records.
        content: `file_fingerprint(path)`.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        facts = {"format": 1, "kind": kind, "size": about.st_size, "mtime_ns": about.st_mtime_ns, "content": content}
        for place in _places(path):
            kept = _read(place)
            if kept is None:
                continue
            header, index = kept
            if all(header.get(key) == value for key, value in facts.items()):
                return index
            if _has_grown(path, header, facts):
                index = _make(file, scan, about.st_size, after=index)
                break
        else:
            index = _make(file, scan, about.st_size)
        if about.st_size >= _WORTH_KEEPING:
            _keep(_places(path), facts, index)
    return index


def _make(file: BinaryIO, scan: Scan, size: int, *, after: RecordIndex | None = None) -> RecordIndex:
    """All records, or those that `after` has but its last, which may have grown too, and those from there on."""
    starts, skips, first, records = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0, 0
    if after is not None and len(after):
        records, first = len(after) - 1, int(after.starts[-1])
        starts, skips = [after.starts[:-1]], [after.skips[after.skips <= records]]
    for new_starts, new_skips in scan(file, first, size):
        starts.append(new_starts)
        skips.append(new_skips + records)
    return RecordIndex(np.concatenate(starts), np.concatenate(skips), size)


def _has_grown(path: Path, header: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether the file is what the index describes, with something added at its end."""
    return (
        (header.get("format"), header.get("kind")) == (facts["format"], facts["kind"])
        and header["size"] < facts["size"]
        and header.get("content") == file_fingerprint(path, size=header["size"])
    )


def _places(path: Path) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "swissarmy" / "index"
    absolute = path.absolute()
    return absolute.with_name(path.name + SUFFIX), cache / f"{digest(absolute)}{SUFFIX}"


def _keep(places: tuple[Path, Path], facts: dict[str, Any], index: RecordIndex) -> None:
    counts = {"records": len(index.starts), "skips": len(index.skips)}
    header = json.dumps(facts | counts).encode().ljust(_HEADER - _CHECKSUM)
    checksum = _checksum(header, index.starts, index.skips)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(place) as file:
                file.write(header + checksum)
                file.write(index.starts.data)
                file.write(index.skips.data)
        except OSError:
            continue  # read-only or full: the next place, and at worst the scan is done again next time
        return


def _read(place: Path) -> tuple[dict[str, Any], RecordIndex] | None:
    """A kept index and its header; `None` if there is none, or it is not whole."""
    try:
        with place.open("rb") as file:
            header = file.read(_HEADER)
            longer = os.fstat(file.fileno()).st_size > _HEADER
            numbers = np.asarray(
                np.memmap(file, np.int64, mode="r", offset=_HEADER) if longer else np.empty(0, np.int64)
            )
    except (OSError, ValueError):
        return None
    if header[-_CHECKSUM:] != _checksum(header[:-_CHECKSUM], numbers):
        return None
    facts = json.loads(header[:-_CHECKSUM])
    starts, skips = numbers[: facts["records"]], numbers[facts["records"] :]
    return facts, RecordIndex(starts, skips, facts["size"])


def _checksum(header: bytes, *numbers: Positions) -> bytes:
    found = zlib.crc32(header)
    for part in numbers:
        found = zlib.crc32(part.data, found)
    return found.to_bytes(_CHECKSUM, "little")
