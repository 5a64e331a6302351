"""Records of one fixed length, one after another in a file of plain numbers."""

import math
import mmap
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import numpy.typing as npt

from swissarmy.data.source import DataError
from swissarmy.data.sources.file_source import FileSource


@final
@dataclass(frozen=True)
class BinaryDataset(FileSource):
    """`{"data": array}` for each record, of the given shape and type; the file is memory-mapped.

    Args:
        path: the file, which holds nothing but records.
        dtype: the type of its numbers, as NumPy writes it: `uint16`, `<f4`, ...
        shape: of one record; a number for `[n]`, `()` for a single value.
        field: the name that the array has in a record.

    Raises:
        DataError: there is no such type or shape; on first use, if the file's size is no multiple of a record's.
    """

    dtype: str
    shape: int | tuple[int, ...]
    field: str = "data"

    def __post_init__(self) -> None:
        """Refuse types that are no numbers, and records without any."""
        try:
            kind = np.dtype(self.dtype).kind
        except TypeError as error:
            raise DataError(f"{self.path}: dtype={self.dtype!r} is no type of number: {error}") from error
        if kind not in "biufc":
            raise DataError(f"{self.path}: dtype={self.dtype!r} is no type of number")
        if any(size < 1 for size in self._shape):
            raise DataError(f"{self.path}: shape={self.shape} must be at least 1 along each dimension")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        """A copy of one record, in the machine's byte order."""
        record = self._records[self._number(index)]
        return {self.field: np.array(record, dtype=record.dtype.newbyteorder("="))}

    def where(self, index: int) -> str:
        """`file, record 17`."""
        return f"{self.path}, record {self._number(index)}"

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.shape,) if isinstance(self.shape, int) else tuple(self.shape)

    @cached_property
    def _records(self) -> npt.NDArray[Any]:
        dtype = np.dtype(self.dtype)
        size, length = self._file.size, dtype.itemsize * math.prod(self._shape)
        if size % length:
            raise DataError(
                f"{self.path} has {size} bytes, which is no multiple of {length}, the length of a record of shape "
                f"{self._shape} in {dtype}: {size % length} bytes are left over"
            )
        if not size:
            return np.empty((0, *self._shape), dtype)
        with self.path.open("rb") as file:
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return np.frombuffer(data, dtype).reshape(-1, *self._shape)
