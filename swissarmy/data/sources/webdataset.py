"""WebDataset shards: tar files in which members that differ only in their extension are one record.

Nothing is unpacked, no name in an archive reaches the file system, and nothing is unpickled.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, final

import numpy as np
import numpy.typing as npt

from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.images import EXTENSIONS, decode_image
from swissarmy.data.sources.indexed_file import IndexedFile
from swissarmy.data.sources.record_index import Positions, Scan

_NUMBERS = frozenset({"cls", "cls2", "index", "id", "inx"})
_TEXTS = frozenset({"txt", "text", "transcript"})
_PICKLES = frozenset({"pyd", "pickle", "pkl", "pt", "pth", "ten", "tb"})


@final
@dataclass(frozen=True)
class WebDatasetSource(IndexedFile):
    """`{"__key__": "0001", "jpg": pixels, "json": {...}, "cls": 3}` for each sample of an uncompressed tar file.

    What precedes the first dot of a member's name is the key, what follows is the field. `json` is decoded, `txt` is
    text, `cls` a number, `npy` an array, pictures as `decode_image` gives them; all else is bytes.

    Args:
        path: the tar file.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Raises:
            RecordError: a member is damaged, or is a pickle.
        """
        record: dict[str, Any] = {}
        for member, data in self._members(self._number(index)):
            key, field = _split(member.name)
            record["__key__"] = key
            where = f"{self.path}:{member.name}"
            if field in record:
                raise RecordError(f"{where}: the sample has two of this name")
            record[field] = _decode(data, field.rpartition(".")[2].lower(), where)
        return record

    def where(self, index: int) -> str:
        """`shard.tar:key`."""
        member, _ = next(self._members(self._number(index)))
        return f"{self.path}:{_split(member.name)[0]}"

    def _scan(self) -> tuple[str, Scan]:
        return "tar", scan_samples

    def _members(self, index: int) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        piece = io.BytesIO(self._file.read(*self._index.span(index)))
        view = piece.getbuffer()
        for member in _regular_files(piece, 0, len(view), name=str(self.path), whole=False):
            yield member, bytes(view[member.offset_data : member.offset_data + member.size])


def scan_samples(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[Positions, Positions]]:
    """A record for each run of members with the same key."""
    starts: list[int] = []
    last = None
    for member in _regular_files(file, start, stop, name=str(file.name), whole=True):
        key = _split(member.name)[0]
        if key != last:
            starts.append(member.offset)
            last = key
    yield np.array(starts, np.int64), np.empty(0, np.int64)


def _regular_files(file: BinaryIO, start: int, stop: int, *, name: str, whole: bool) -> Iterator[tarfile.TarInfo]:
    """The files of an archive, or of a piece of one that lacks the mark at the end, without reading them.

    Raises:
        DataError: the archive is damaged or cut off, or holds something that does not belong into a data set.
    """
    file.seek(start)
    if start == stop:
        return
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would remember each
                if member.isdir():
                    continue
                _check(member, stop, name)
                yield member
            file.seek(archive.offset)
            if whole and file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise DataError(f"{name} has no mark at its end: it is damaged, or was not copied completely")
    except DataError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise DataError(f"{name}: not a tar file, or damaged: {error}") from error


def _check(member: tarfile.TarInfo, stop: int, name: str) -> None:
    where = f"{name}:{member.name!r}"
    path = PurePosixPath(member.name)
    if not member.isreg() or member.issparse():
        raise DataError(f"{where} is a link, a device or a sparse file; a shard holds plain files")
    if path.is_absolute() or ".." in path.parts or "\0" in member.name:
        raise DataError(f"{where}: a name in a shard is relative and has no '..'")
    if not 0 <= member.size <= stop - member.offset_data:
        raise DataError(f"{where}: the archive ends within this member: was it copied completely?")


def _split(name: str) -> tuple[str, str]:
    """`dir/0001.seg.png` as `dir/0001` and `seg.png`."""
    folder, slash, last = name.rpartition("/")
    key, _, field = last.partition(".")
    return folder + slash + key, field


def _decode(data: bytes, kind: str, where: str) -> Any:
    try:
        if kind in _PICKLES:
            raise RecordError(f"{where}: pickles can execute code and are not read; store arrays as .npy")
        if kind == "json":
            return json.loads(data.decode())
        if kind in _TEXTS:
            return data.decode()
        if kind in _NUMBERS:
            return int(data)
        if kind == "npy":
            return _array(data)
    except RecordError:
        raise
    except (ValueError, RecursionError, EOFError, SyntaxError) as error:
        raise RecordError(f"{where}: cannot be read: {error}") from error
    return decode_image(data, where=where) if f".{kind}" in EXTENSIONS else data


def _array(data: bytes) -> npt.NDArray[Any]:
    """An `.npy` file; what its header claims is compared with what there is before anything is allocated."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the npy format is not known")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds objects, which would be unpickled")
    return np.frombuffer(data[file.tell() :], dtype).reshape(shape, order="F" if fortran else "C").copy()
