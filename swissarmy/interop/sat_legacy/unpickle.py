"""A pickle read as data: tensors become places in the file, and nothing that the pickle names is ever imported.

A pickle is a program whose one dangerous instruction looks up a name and calls it. Here every name is answered by a
function of this file or by a stand-in that remembers being asked for; if any stand-in was made, the file is refused
with the whole list. The pure-Python unpickler of the standard library is used: the one in C allocates from sizes that
the stream claims.
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, final

import torch

from swissarmy.core.errors import CheckpointError

MAX_PICKLE_BYTES = 256 << 20
"""Longer than any state dict's names and shapes; what a pickle holds beside those is not wanted."""

_MAX_DIMS = 64
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}
_BUILTINS = ("__builtin__", "builtins")
_NUMPY = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
_INERT = frozenset({*_NUMPY, ("_codecs", "encode"), ("torch", "device"), ("argparse", "Namespace")})
"""Names that old checkpoints do ask for (random states, arguments) and whose values a migration does not need."""

_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))
# What a damaged or hostile stream makes the unpickler raise.
_STREAM_ERRORS = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    RecursionError, MemoryError, AssertionError,
)  # fmt: skip


@final
@dataclass(frozen=True)
class Storage:
    """A run of numbers somewhere in the file, by the key under which the container keeps it."""

    key: str
    dtype: torch.dtype
    numel: int


@final
@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


@final
class Inert:
    """What stands where the pickle wanted an object of some class: it takes everything and does nothing."""

    def __call__(self, *args: object, **kw_args: object) -> "Inert":
        """Being called, as a class or a function, gives another one."""
        return Inert()

    def append(self, item: object) -> None:
        """Drop it."""

    def extend(self, items: object) -> None:
        """Drop them."""

    def add(self, item: object) -> None:
        """Drop it."""

    def __setitem__(self, key: object, value: object) -> None:
        """Drop it."""


def unpickle(stream: BinaryIO, place: str, storages: dict[str, Storage] | None = None) -> Any:
    """The value of one pickle, read from where the stream stands and no further.

    Args:
        stream: What is read.
        place: Begins the message of an error.
        storages: Is given every storage that the pickle refers to, by key.

    Raises:
        CheckpointError: It asks for a name that is not on the short list (all of them are given), it is damaged, or
            it is longer than `MAX_PICKLE_BYTES`.
    """
    reader = _Reader(_Limited(stream), {} if storages is None else storages)
    try:
        value = reader.load()
    except _STREAM_ERRORS as error:
        _refuse(reader.refused, place)
        raise CheckpointError(f"{place} is truncated or corrupt: its pickle cannot be read ({error})") from error
    _refuse(reader.refused, place)
    return value


def _refuse(names: Mapping[str, None], place: str) -> None:
    if names:
        raise CheckpointError(
            f"{place} was refused, and nothing in it was run: beside tensors it asks for {', '.join(names)}. "
            "Weights need none of these; if you trust the file, save its state dict alone with the program that made it"
        )


@final
class _Limited:
    """The stream with an end: no instruction reads more than is left of the allowance."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise EOFError(f"an instruction asks for {size} bytes, and a pickle has at most {MAX_PICKLE_BYTES}")
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError(f"an instruction asks for {size} bytes, and the stream ends after {len(data)}")
        self._left -= size
        return data

    def readline(self) -> bytes:
        line = self._stream.readline(min(self._left, 1 << 16))
        self._left -= len(line)
        return line


class _Reader(pickle._Unpickler):
    """The unpickler with its own instructions for everything that could run code or allocate from a claim."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: _Limited, storages: dict[str, Storage]) -> None:
        super().__init__(stream)
        self.refused: dict[str, None] = {}
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module in _BUILTINS and name in ("set", "frozenset"):
            return _plain_set
        if (module, name) in _CALLABLES:
            return _CALLABLES[module, name]
        if (module, name) not in _INERT:
            self.refused[f"{module}.{name}"] = None
        return Inert()

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"extension code {code}")

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), _, int(numel), *view) if numel >= 0 and view in (
                [],
                [None],
            ):
                return self._storages.setdefault(key, Storage(key, dtype, numel))
        raise pickle.UnpicklingError("a persistent id is no plain storage")

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack.append(self.stack.pop()(*arguments))

    def load_newobj_ex(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        self.stack.append(self.stack.pop()(*arguments, **keywords))

    def load_build(self) -> None:
        self.stack.pop()  # the state of an object; none that is kept here has any

    def load_bytearray8(self) -> None:
        raise pickle.UnpicklingError("a bytearray, which no checkpoint holds")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        items, made = self.pop_mark(), dict[Any, Any]()
        _set_items(made, items)
        self.stack.append(made)

    def load_additems(self) -> None:
        items = self.pop_mark()
        for item in _plain_set(items):
            self.stack[-1].add(item)

    def load_frozenset(self) -> None:
        self.stack.append(_plain_set(self.pop_mark()))

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset


def _set_items(target: Any, items: list[Any]) -> None:
    # Keys are hashed, and the hash of a tuple nested a million times deep overruns the stack of the process.
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in _PLAIN_KEYS:
            raise pickle.UnpicklingError(f"a key is a {type(key).__name__}")
        target[key] = value


def _plain_set(items: Any = ()) -> set[Any]:
    return {item for item in items if type(item) in _PLAIN_KEYS}


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    _set_items(made, [part for pair in pairs for part in pair])
    return made


def _size(sizes: Any) -> torch.Size:
    if not isinstance(sizes, tuple | list) or len(sizes) > _MAX_DIMS or any(type(n) is not int or n < 0 for n in sizes):
        raise pickle.UnpicklingError("a tensor's size is no list of whole numbers")
    return torch.Size(sizes)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: object) -> PickledTensor:
    sizes, strides = _size(shape), tuple(_size(stride))
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0 or len(sizes) != len(strides):
        raise pickle.UnpicklingError("a tensor is no view of a storage")
    return PickledTensor(storage, offset, sizes, strides)


def _parameter(data: Any, *more: object) -> Any:
    return data


_CALLABLES: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
}
"""Names that are answered with a value: the shape of a state dict, and its tensors."""
