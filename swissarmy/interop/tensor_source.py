"""Tensors on disk in any format: what a reader offers, and how one byte range becomes a tensor.

A tensor is read either as a private copy-on-write mapping of its bytes (nothing is copied until it is touched or
written) or as a copy. Each has a mapping of its own, which goes when the tensor goes: a caller who keeps a transposed
copy of every tensor never holds the file and the copies together.
"""

import ctypes
import functools
import math
import mmap
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, final

import torch

from swissarmy.core.errors import CheckpointError

# Below this a mapping costs more (a system call, a kernel entry, a page of rounding) than copying the bytes.
_LARGE = 1 << 20
_MAP_FAILED = ctypes.c_void_p(-1).value


class TensorSource(Protocol):
    """Named tensors on disk, read one at a time."""

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order in which reading them is fastest."""
        ...

    def shape(self, name: str) -> torch.Size:
        """The shape, without reading the tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype, without reading the tensor."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor, contiguous, on the CPU; the caller may keep it and write to it, and the file never changes."""
        ...

    def where(self, name: str) -> str:
        """The name of the file that holds the tensor, for messages."""
        ...


@final
class TensorFile:
    """One regular file of tensor bytes. Its size is looked at once and must not change while it is being read.

    Raises:
        CheckpointError: the file is missing, cannot be opened, or is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        if "\0" in str(path):
            raise CheckpointError(f"{str(path)!r} is not a path: it contains a NUL")
        self.path = path
        with explained(path):
            # Before opening: opening a named pipe would wait for ever.
            status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        self.size = status.st_size
        self._identity = _identity(status)

    def read_bytes(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, both checked against the file's size before anything is allocated."""
        self._check_range(offset, length)
        with self.opened() as descriptor:
            buffer = bytearray(length)
            self._fill(descriptor, memoryview(buffer), offset)
        return bytes(buffer)

    def read_tensor(self, offset: int, dtype: torch.dtype, shape: torch.Size, *, mapped: bool = True) -> torch.Tensor:
        """The little-endian tensor that starts at byte `offset`, shape `shape`.

        With `mapped`, a tensor of a mebibyte or more is a private mapping: written to freely, the file never changes,
        and replacing the file (`os.replace`) does no harm; but shortening that same file in place kills the process
        when the tensor is next touched. Without `mapped`, the bytes are copied.

        Raises:
            CheckpointError: the range is not within the file, or the file changed since it was first looked at.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        self._check_range(offset, nbytes)
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        with self.opened() as descriptor:
            raw = None
            if mapped and nbytes >= _LARGE and offset % dtype.itemsize == 0:
                raw = _map_private(descriptor, offset, nbytes)
            if raw is None:
                raw = allocate(torch.uint8, torch.Size([nbytes]))
                self._fill(descriptor, raw.numpy().data, offset)
        return raw.view(dtype).view(shape)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CheckpointError(
                f"{self.path}: bytes {offset} to {offset + length} were asked for, but it has {self.size}; "
                "it is truncated or corrupt"
            )

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the file, which is still the one first seen."""
        # Opened for each read, so that a source holds no descriptors; offsets hold only for the file first seen.
        with explained(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if _identity(os.fstat(descriptor)) != self._identity:
                raise CheckpointError(f"{self.path} was changed or replaced while it was being read; load it again")
            yield descriptor
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            with explained(self.path):
                count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path} ended at byte {offset + done}: it was truncated while being read")
            done += count


def allocate(dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """An uninitialised tensor, whose memory goes back to the system as soon as it is let go."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return torch.empty(shape, dtype=dtype)
    # malloc keeps large freed blocks for later: with it, reading 500 MB in blocks of 20 MB and keeping a copy of each
    # peaked at twice the size.
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """An OSError inside becomes a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _map_private(descriptor: int, offset: int, nbytes: int) -> torch.Tensor | None:
    """Bytes of an open file as a writable private mapping, shape `[nbytes]`; None if the system refuses one."""
    # Not mmap.mmap: before Python 3.13 it keeps a descriptor per mapping, and a model has more tensors than a
    # process may have descriptors.
    libc = _libc()
    lead = offset % mmap.ALLOCATIONGRANULARITY
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, lead + nbytes, protection, mmap.MAP_PRIVATE, descriptor, offset - lead)
    if address == _MAP_FAILED:
        return None
    buffer = (ctypes.c_ubyte * nbytes).from_address(address + lead)
    # Not at exit: tensors may still be in use by other exit handlers.
    weakref.finalize(buffer, libc.munmap, address, lead + nbytes).atexit = False
    return torch.frombuffer(buffer, dtype=torch.uint8)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
