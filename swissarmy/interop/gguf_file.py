"""The container format of GGUF files: the header is read, the data stays in the file until it is asked for.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. The header is
read here and not by `gguf.GGUFReader`, which makes an array for every token of the vocabulary: 10.6 s for the
262,144 tokens of Gemma 3, against 0.1 s. The package `gguf` brings the quantised formats.
"""

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

import numpy as np
import torch

from swissarmy.core.errors import CheckpointError, require_extra

ELEMENTS_AT_ONCE = 1 << 22
"""How many elements are dequantised together, which bounds the scratch memory of a read."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@final
@dataclass(frozen=True)
class GGUFArray:
    """An array among the metadata, left in the file: `count` values of one type, from byte `offset`."""

    kind: int
    count: int
    offset: int


@final
@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file: its ggml type, its shape in the order of torch, and where its bytes lie."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    row_bytes: int
    offset: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@final
class GGUFFile:
    """The header of a GGUF file; the data stays in the file, mapped into memory and unread.

    Nothing is allocated from a size that the file claims: a size is first compared with the bytes that are there.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is no GGUF file of version 2 or 3, or it is truncated or corrupt.
        MissingExtraError: the package `gguf` is not installed.
    """

    metadata: dict[str, int | float | bool | str | GGUFArray]
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._gguf = require_extra("gguf", extra="gguf", purpose="Reading GGUF files")
        if not self.path.is_file():
            self.fail("there is no such file")
        if self.path.stat().st_size < 24:
            self.fail("it is too short for a GGUF file")
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        self._reading = "the header"
        tensors, fields = self._read_preamble()
        self.metadata = {}
        for _ in range(fields):
            self._read_field()
        self.tensors = self._place([self._read_tensor() for _ in range(tensors)])

    def fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        """Raise a CheckpointError that names the file."""
        raise CheckpointError(f"{self.path}: {what}") from cause

    def values(self, array: GGUFArray) -> list[Any]:
        """The values of an array of the metadata: numbers, booleans or strings."""
        if array.kind != _STRING:
            dtype = np.dtype(_SCALARS[array.kind]).newbyteorder("<")
            return list(np.frombuffer(self._data, dtype, array.count, array.offset).tolist())
        strings, at = [], array.offset
        for _ in range(array.count):
            (length,) = struct.unpack_from("<Q", self._data, at)
            strings.append(self._text(at + 8, length, "an array of the metadata"))
            at += 8 + length
        return strings

    def dequantise(self, tensor: GGUFTensor, dtype: torch.dtype) -> torch.Tensor:
        """The values of `tensor`, in `dtype`, some rows at a time."""
        output = torch.empty(tensor.rows, tensor.shape[-1], dtype=dtype)
        step = max(1, ELEMENTS_AT_ONCE // tensor.shape[-1])
        for first in range(0, tensor.rows, step):
            rows = min(step, tensor.rows - first)
            start = tensor.offset + first * tensor.row_bytes
            packed = np.frombuffer(self._data, np.uint8, rows * tensor.row_bytes, start)
            try:
                values = self._gguf.dequantize(packed.reshape(rows, tensor.row_bytes), tensor.kind)
            except NotImplementedError as error:
                self.fail(f"{tensor.name}: cannot be read from type {tensor.kind.name}", error)
            # torch takes writable arrays only, and a float32 tensor comes as a view of the mapped file
            output[first : first + rows] = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        return output.reshape(tensor.shape)

    def _skip(self, count: int) -> int:
        """Move past `count` bytes, which must be in the file; where they begin."""
        start = self._at
        if count > len(self._data) - start:
            self.fail(f"it ends inside {self._reading}: {count} bytes wanted at {start} of {len(self._data)}")
        self._at = start + count
        return start

    def _read(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self._data, self._skip(struct.calcsize(f"<{code}")))[0]

    def _read_string(self) -> str:
        length = self._read("Q")
        return self._text(self._skip(length), length, self._reading)

    def _text(self, start: int, length: int, place: str) -> str:
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError as error:
            self.fail(f"text in {place} is not UTF-8, at byte {start}", error)

    def _read_preamble(self) -> tuple[int, int]:
        start = self._skip(4)
        if self._data[start : start + 4] != b"GGUF":
            self.fail("not a GGUF file (it does not begin with 'GGUF')")
        version = self._read("I")
        if version not in (2, 3):
            self.fail(f"GGUF version {version} (or a big-endian file): only 2 and 3, little-endian, are read")
        return self._read("Q"), self._read("Q")

    def _read_field(self) -> None:
        self._reading = f"metadata field {len(self.metadata)}"
        key = self._read_string()
        self._reading = f"the metadata field {key!r}"
        if key in self.metadata:
            self.fail(f"{self._reading} is there twice")
        kind = self._read("I")
        self.metadata[key] = self._read_array() if kind == _ARRAY else self._read_scalar(kind)

    def _read_scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self._read_string()
        if kind not in _SCALARS:
            self.fail(f"{self._reading} has the unknown type {kind}")
        return self._read(_SCALARS[kind])

    def _read_array(self) -> GGUFArray:
        kind, count, start = self._read("I"), self._read("Q"), self._at
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._read("Q"))
        else:
            self.fail(f"{self._reading} is an array of the unknown type {kind}")
        return GGUFArray(kind, count, start)

    def _read_tensor(self) -> GGUFTensor:
        self._reading = "the list of tensors"
        name = self._read_string()
        self._reading = f"the entry of tensor {name!r}"
        dims = self._read("I")
        if not 1 <= dims <= _MAX_DIMS:
            self.fail(f"tensor {name!r} has {dims} dimensions, not 1 to {_MAX_DIMS}")
        shape = tuple(self._read("Q") for _ in range(dims))[::-1]
        raw_kind, offset = self._read("I"), self._read("Q")
        try:
            kind = self._gguf.GGMLQuantizationType(raw_kind)
        except ValueError as error:
            self.fail(f"tensor {name!r} has the unknown type {raw_kind}", error)
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            self.fail(f"tensor {name!r} of shape {shape} cannot be of type {kind.name} (blocks of {block})")
        return GGUFTensor(name, kind, shape, shape[-1] // block * block_bytes, offset)

    def _place(self, tensors: Sequence[GGUFTensor]) -> dict[str, GGUFTensor]:
        """Turn offsets into the data into offsets into the file, and see that each tensor is there."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}, not a power of two")
        data = -(-self._at // alignment) * alignment
        placed: dict[str, GGUFTensor] = {}
        for tensor in tensors:
            if tensor.name in placed:
                self.fail(f"tensor {tensor.name!r} is there twice")
            start, size = data + tensor.offset, tensor.rows * tensor.row_bytes
            if start + size > len(self._data):
                self.fail(
                    f"tensor {tensor.name!r} is not complete: {size} bytes wanted at {start} of "
                    f"{len(self._data)}; the file is truncated or corrupt"
                )
            placed[tensor.name] = GGUFTensor(tensor.name, tensor.kind, tensor.shape, tensor.row_bytes, start)
        return placed
