"""One `mp_rank_XX_model_states.pt`: what its pickle says, and its tensors, mapped from the file when asked for.

Both containers of `torch.save` are read: the zip archive (since torch 1.6) and the stream of pickles before it. Every
size is compared with the size of the file before a byte is allocated; compressed records are refused.
"""

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import torch

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.sat_legacy.unpickle import MAX_PICKLE_BYTES, PickledTensor, Storage, unpickle
from swissarmy.interop.tensor_source import TensorFile, allocate, explained

_ZIP_START, _PICKLE_START = b"PK\x03\x04", b"\x80"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
# Tied weights are stored once and named twice or thrice; a file that names more than this is no checkpoint.
_MOST_TIMES_NAMED = 4


@final
@dataclass(frozen=True)
class LegacyTensor:
    """A tensor of the state dict and where its storage begins in the file, in bytes."""

    view: PickledTensor
    start: int

    @property
    def shape(self) -> torch.Size:
        """The shape in this file, which is a share of the whole where the model was split."""
        return self.view.shape

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.view.storage.dtype

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in the file in the order of the tensor."""
        expected = 1
        for size, stride in zip(reversed(self.view.shape), reversed(self.view.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@final
class TorchFile:
    """The state dict of one model-parallel rank.

    Attributes:
        content: What else the file holds (`iteration`, ...), with stand-ins for objects.
        tensors: The tensors of `module`, by name.

    Raises:
        CheckpointError: The file is truncated, corrupt or a bomb, or asks for anything but tensors and plain data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = TensorFile(path)
        start = self._file.read_bytes(0, min(4, self._file.size))
        if start == _ZIP_START:
            content, storages = _read_zip(self._file)
        elif start[:1] == _PICKLE_START:
            content, storages = _read_stream(self._file)
        else:
            kind = "empty" if not start else "neither a zip archive nor a pickle"
            raise CheckpointError(f"{path} is no checkpoint of torch.save: it is {kind}; is it truncated?")
        self.tensors: Mapping[str, LegacyTensor] = self._located(content, storages)
        self.content = {key: value for key, value in content.items() if key != "module"}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of dimension 0, contiguous, without reading the others."""
        tensor = self.tensors[name]
        if not tensor.is_contiguous:
            return self.read(name)[start:stop]
        row = math.prod(tensor.shape[1:])
        offset = tensor.start + (tensor.view.offset + start * row) * tensor.dtype.itemsize
        return self._file.read_tensor(offset, tensor.dtype, torch.Size([stop - start, *tensor.shape[1:]]))

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, contiguous."""
        tensor = self.tensors[name]
        view, offset = tensor.view, tensor.start + tensor.view.offset * tensor.dtype.itemsize
        if tensor.is_contiguous:
            return self._file.read_tensor(offset, tensor.dtype, tensor.shape)
        spanned = self._file.read_tensor(offset, tensor.dtype, torch.Size([_span(view)]))
        return allocate(tensor.dtype, view.shape).copy_(spanned.as_strided(view.shape, view.stride))

    def check_records(self) -> None:
        """Read a zip archive's records through and compare them with their checksums.

        Raises:
            CheckpointError: A record differs: bits of it changed since it was written.
        """
        if self._file.read_bytes(0, 4) != _ZIP_START:
            return
        with _zip_errors(self.path), zipfile.ZipFile(self.path) as archive:
            for record in archive.infolist():
                with archive.open(record) as stream:
                    while stream.read(1 << 20):
                        pass

    def _located(self, content: Any, storages: Mapping[str, "_Extent"]) -> dict[str, LegacyTensor]:
        module = content.get("module") if isinstance(content, dict) else None
        if not isinstance(module, dict) or not module:
            held = ", ".join(map(str, content))[:200] if isinstance(content, dict) else type(content).__name__
            raise CheckpointError(f"{self.path} has no state dict under 'module'; it holds: {held}")
        tensors: dict[str, LegacyTensor] = {}
        for name, value in module.items():
            if not isinstance(name, str) or not isinstance(value, PickledTensor):
                raise CheckpointError(f"{self.path}: {name!r} of its state dict is a {type(value).__name__}, no tensor")
            tensors[name] = self._locate(name, value, storages)
        named = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
        if named > _MOST_TIMES_NAMED * self._file.size:
            raise CheckpointError(
                f"{self.path} has {self._file.size} bytes, and its tensors would make {named}: a decompression bomb"
            )
        return tensors

    def _locate(self, name: str, view: PickledTensor, storages: Mapping[str, "_Extent"]) -> LegacyTensor:
        storage = view.storage
        extent = storages.get(storage.key)
        if extent is None or extent.nbytes < storage.numel * storage.dtype.itemsize:
            held = "is missing" if extent is None else f"has {extent.nbytes} bytes"
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is in storage {storage.key!r} of {storage.numel} elements, which "
                f"{held}: truncated or corrupt"
            )
        if math.prod(view.shape) > storage.numel or view.offset + _span(view) > storage.numel:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(view.shape)} is larger than its storage, which has "
                f"{storage.numel} elements: a decompression bomb, or corrupt"
            )
        if max(view.shape, default=0) > self._file.size:  # possible where another dimension is 0
            raise CheckpointError(f"{self.path}: tensor {name!r} claims the shape {list(view.shape)}; refused")
        return LegacyTensor(view, extent.start)


@final
@dataclass(frozen=True)
class _Extent:
    """Where the bytes of a storage lie in the file."""

    start: int
    nbytes: int


def _span(view: PickledTensor) -> int:
    """How many elements of its storage a view reaches over."""
    if math.prod(view.shape) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride, strict=True))


def _read_zip(file: TensorFile) -> tuple[Any, dict[str, _Extent]]:
    with _zip_errors(file.path), zipfile.ZipFile(file.path) as archive:
        records = archive.infolist()
    extents = {record.filename: _extent(file, record) for record in records}
    pickles = [name for name in extents if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1 or len(extents) != len(records):
        raise CheckpointError(f"{file.path} is no archive of torch.save: it needs one record data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    order = extents.get(f"{folder}byteorder")
    if order is not None and file.read_bytes(order.start, order.nbytes) != b"little":
        raise CheckpointError(f"{file.path} was written on a big-endian machine, which is not supported")
    pickled = extents[pickles[0]]
    if pickled.nbytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{file.path}: its pickle has {pickled.nbytes} bytes, at most {MAX_PICKLE_BYTES} are read"
        )
    with _opened(file) as stream:
        stream.seek(pickled.start)
        content = unpickle(stream, str(file.path))
    start = f"{folder}data/"
    return content, {name.removeprefix(start): extent for name, extent in extents.items() if name.startswith(start)}


def _extent(file: TensorFile, record: zipfile.ZipInfo) -> _Extent:
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
        raise CheckpointError(
            f"{file.path}: record {record.filename!r} is compressed; torch.save stores plainly. Refused"
        )
    if record.file_size > file.size:
        raise CheckpointError(f"{file.path}: record {record.filename!r} claims {record.file_size} bytes; refused")
    fields = _LOCAL_HEADER.unpack(file.read_bytes(record.header_offset, _LOCAL_HEADER.size))
    start = record.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1]
    if fields[0] != _ZIP_START or start + record.file_size > file.size:
        raise CheckpointError(f"{file.path}: record {record.filename!r} is not where the archive says; it is corrupt")
    return _Extent(start, record.file_size)


def _read_stream(file: TensorFile) -> tuple[Any, dict[str, _Extent]]:
    """The container before torch 1.6: magic, version, machine, content and storage keys, each a pickle, then bytes."""
    place = str(file.path)
    with _opened(file) as stream:
        if unpickle(stream, place) != _MAGIC or unpickle(stream, place) != _PROTOCOL:
            raise CheckpointError(f"{place} is a pickle, and not one of torch.save")
        machine = unpickle(stream, place)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise CheckpointError(f"{place} was written on a big-endian machine, which is not supported")
        storages: dict[str, Storage] = {}
        content, keys = unpickle(stream, place, storages), unpickle(stream, place)
        position = stream.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{place} is corrupt: it has no list of storages")
    return content, _stream_extents(file, keys, position, storages)


def _stream_extents(
    file: TensorFile, keys: list[str], position: int, storages: Mapping[str, Storage]
) -> dict[str, _Extent]:
    extents: dict[str, _Extent] = {}
    for key in keys:
        count = int.from_bytes(file.read_bytes(position, 8), "little")
        nbytes = count * storages[key].dtype.itemsize if key in storages else -1
        if nbytes < 0 or position + 8 + nbytes > file.size:
            raise CheckpointError(f"{file.path} is truncated or corrupt: storage {key!r} does not fit into it")
        extents[key] = _Extent(position + 8, nbytes)
        position += 8 + nbytes
    return extents


@contextmanager
def _opened(file: TensorFile) -> Iterator[BinaryIO]:
    with file.opened() as descriptor, open(descriptor, "rb", closefd=False) as stream:
        yield stream


@contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    try:
        with explained(path):
            yield
    except (zipfile.BadZipFile, EOFError, NotImplementedError, LookupError, ValueError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is a truncated or corrupt zip archive: {error}") from error
