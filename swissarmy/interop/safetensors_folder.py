"""Reading weights in the Hugging Face layouts: a safetensors file, a folder of shards with an index, an old `.bin`.

Nothing is executed and nothing is allocated from a size that a file claims before it is checked against the size that
the file has. Files that an index names must lie in the folder itself; a symbolic link may lead out of it only from a
snapshot of the Hub's cache (`<repo>/snapshots/<revision>`) into the blobs of that same cache (`<repo>/blobs`).
"""

import copy
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, final

import torch

from swissarmy.core.errors import CheckpointError, nearest
from swissarmy.interop.json_object import parse_json_object
from swissarmy.interop.tensor_source import TensorFile, allocate, explained

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "F64": torch.float64,
        "I64": torch.int64,
        "U64": torch.uint64,
        "C64": torch.complex64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
    }
)

_MAX_JSON_BYTES = 100_000_000  # the safetensors library's own limit for a header
_MAX_DIMS = 64
_MAX_MAPPED_TENSORS = 16_384  # Linux gives a process 65,530 mappings, and others need some
# What torch.load raises for damaged or malicious files, besides UnpicklingError.
_TORCH_LOAD_ERRORS = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, TypeError,
    LookupError, AttributeError, AssertionError, ArithmeticError, ImportError, MemoryError, struct.error,
)  # fmt: skip


@final
class SafetensorsSource:
    """The tensors of a file or folder, a `TensorSource`.

    `path` is a `.safetensors` or `.bin` file, or a folder with `model.safetensors`, or
    `model.safetensors.index.json` and its shards, or the same with `pytorch_model.bin`; safetensors win.
    `mapped=False` copies each tensor instead of mapping it, for files that may be shortened in place.

    Raises:
        CheckpointError: one line that says what is wrong with which file.
    """

    def __init__(self, path: str | os.PathLike[str], *, mapped: bool = True) -> None:
        self.path = Path(path)
        self._shards: dict[str, _Shard] = {}
        with explained(self.path):
            for shard in _open_shards(self.path, mapped=mapped):
                self._shards.update(dict.fromkeys(shard.entries, shard))

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, file by file, in the order in which they lie in it."""
        return tuple(self._shards)

    def shape(self, name: str) -> torch.Size:
        """The shape, without reading the tensor."""
        return self._shard(name).entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype, without reading the tensor."""
        return self._shard(name).entries[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor, contiguous, on the CPU, independent of any other read: keep it and write to it freely."""
        return self._shard(name).read(name)

    def where(self, name: str) -> str:
        """The name of the file that holds the tensor."""
        return self._shard(name).path.name

    def without(self, names: Collection[str]) -> "SafetensorsSource":
        """The same but for some tensors."""
        rest = copy.copy(self)
        rest._shards = {name: shard for name, shard in self._shards.items() if name not in names}
        return rest

    def _shard(self, name: str) -> "_Shard":
        if name not in self._shards:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.{nearest(name, self._shards)}")
        return self._shards[name]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a file; `offset` is in bytes from the file's start (0 where the format gives none)."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int = 0


class _Shard(Protocol):
    path: Path
    entries: Mapping[str, TensorEntry]

    def read(self, name: str) -> torch.Tensor: ...


@final
class _SafetensorsShard:
    def __init__(self, path: Path, real_path: Path, *, mapped: bool) -> None:
        self.path = path
        self._file = TensorFile(real_path)
        self.entries: Mapping[str, TensorEntry] = read_header(self._file)
        self._mapped = mapped and len(self.entries) <= _MAX_MAPPED_TENSORS

    def read(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        return self._file.read_tensor(entry.offset, entry.dtype, entry.shape, mapped=self._mapped)


@final
class _TorchShard:
    """A `torch.save` state dict, read by torch's restricted unpickler and nothing else."""

    def __init__(self, path: Path, real_path: Path, *, mapped: bool) -> None:
        del mapped  # the bytes are always copied: names may share a storage, and each read is independent
        self.path = path
        self._file = TensorFile(real_path)
        _check_zip(self._file, path)
        self._tensors = self._load()
        self.entries: Mapping[str, TensorEntry] = {
            name: TensorEntry(dtype=tensor.dtype, shape=tensor.shape) for name, tensor in self._tensors.items()
        }
        # torch maps the whole file, and pages that were read stay resident until the mapping goes.
        self._window = max(32 << 20, self._file.size // 16)
        self._read_bytes = 0

    def read(self, name: str) -> torch.Tensor:
        if self._read_bytes > self._window:
            self._tensors = {}
            self._tensors, self._read_bytes = self._load(), 0
        tensor = self._tensors[name]
        self._read_bytes += tensor.nbytes
        return allocate(tensor.dtype, tensor.shape).copy_(tensor.detach())

    def _load(self) -> dict[str, torch.Tensor]:
        with self._file.opened():  # still the file that was checked
            try:
                loaded = torch.load(self._file.path, map_location="cpu", weights_only=True, mmap=True)
            except _TORCH_LOAD_ERRORS as error:
                raise CheckpointError(_refusal(self.path, self._file.path, error)) from error
        return _state_dict(loaded, self.path)


_LAYOUTS: tuple[tuple[str, type[_SafetensorsShard] | type[_TorchShard]], ...] = (
    ("model.safetensors", _SafetensorsShard),
    ("pytorch_model.bin", _TorchShard),
)


def read_header(file: TensorFile) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file declares, in the order of their bytes, all checked against the file.

    Raises:
        CheckpointError: the file is empty, truncated, or its header is not what the format allows.
    """
    if file.size < 10:
        raise CheckpointError(f"{file.path} is {'truncated' if file.size else 'empty'} ({file.size} bytes)")
    length = int.from_bytes(file.read_bytes(0, 8), "little")
    if length > min(file.size - 8, _MAX_JSON_BYTES):
        raise CheckpointError(
            f"{file.path}: its header claims {length} bytes, the file has {file.size} and the limit is "
            f"{_MAX_JSON_BYTES}; it is truncated or not a safetensors file"
        )
    header = parse_json_object(file.read_bytes(8, length), f"the header of {file.path}")
    _check_metadata(header.pop("__metadata__", {}), file.path)
    start = 8 + length
    entries = {name: _parse_entry(fields, start, f"{file.path}: tensor {name!r}") for name, fields in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, _nbytes(item[1]))))
    _check_layout(entries, start, file)
    return entries


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: `__metadata__` in its header is not a map from strings to strings")


def _parse_entry(fields: Any, start: int, place: str) -> TensorEntry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{place} needs exactly `dtype`, `shape` and `data_offsets` in the header")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{place} has dtype {dtype!r:.40}, which is none of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > _MAX_DIMS or math.prod(max(1, size) for size in shape) >= 2**60:
        raise CheckpointError(f"{place} has an impossible shape: {shape!r:.80}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{place} has impossible data_offsets: {offsets!r:.80}")
    entry = TensorEntry(dtype=DTYPES[dtype], shape=torch.Size(shape), offset=start + offsets[0])
    if offsets[1] - offsets[0] != _nbytes(entry):
        raise CheckpointError(f"{place}, {dtype} {shape}, needs {_nbytes(entry)} bytes, but data_offsets is {offsets}")
    return entry


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _nbytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _check_layout(entries: Mapping[str, TensorEntry], start: int, file: TensorFile) -> None:
    """The tensors follow one another without gaps or overlaps and fill the file, as the format demands."""
    position = start
    for name, entry in entries.items():
        if entry.offset != position:
            problem = "overlaps the one before it" if entry.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{file.path}: tensor {name!r} {problem} (byte {entry.offset}, not {position})")
        position += _nbytes(entry)
    if position != file.size:
        problem = "truncated" if position > file.size else "longer than its header says"
        raise CheckpointError(f"{file.path} is {problem}: its tensors end at byte {position}, it has {file.size}")


def _open_shards(path: Path, *, mapped: bool) -> Iterator[_Shard]:
    if not path.is_dir():
        reader = _TorchShard if path.suffix in (".bin", ".pt", ".pth") else _SafetensorsShard
        yield reader(path, path, mapped=mapped)
        return
    for stem, reader in _LAYOUTS:
        if os.path.lexists(path / stem):
            yield reader(path / stem, _inside(path, stem), mapped=mapped)
            return
        if os.path.lexists(path / f"{stem}.index.json"):
            for name, tensors in _read_index(path, f"{stem}.index.json").items():
                shard = reader(path / name, _inside(path, name), mapped=mapped)
                _check_against_index(shard, tensors, f"{stem}.index.json")
                yield shard
            return
    raise CheckpointError(
        f"{path} holds no weights: it needs model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
        f"pytorch_model.bin.index.json, and {_holds(path)}. A weight file of another name can be given by its own path."
    )


def _read_index(folder: Path, index_name: str) -> dict[str, set[str]]:
    """The tensors that each shard should hold, by the shard's file name."""
    file = TensorFile(_inside(folder, index_name))
    place = f"{folder / index_name}"
    if file.size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{place} has {file.size} bytes; an index has at most {_MAX_JSON_BYTES}")
    weight_map = parse_json_object(file.read_bytes(0, file.size), place).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{place} has no `weight_map` from tensor names to file names")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(shard, set()).add(tensor)
    for shard, tensors in shards.items():
        if shard in ("", ".", "..") or any(character in shard for character in "/\\\0"):
            raise CheckpointError(f"{place} puts tensor {min(tensors)!r} in {shard!r}, which is not a plain file name")
        if not os.path.lexists(folder / shard):
            raise CheckpointError(
                f"{place} puts {len(tensors)} tensors, such as {min(tensors)!r}, in {shard!r}, which is missing: "
                f"{_holds(folder)}"
            )
    return dict(sorted(shards.items()))


def _check_against_index(shard: _Shard, expected: set[str], index_name: str) -> None:
    if missing := expected - shard.entries.keys():
        name = min(missing)
        raise CheckpointError(
            f"{shard.path} lacks tensor {name!r} ({len(missing)} in all), which {index_name} says it holds."
            f"{nearest(name, shard.entries)}"
        )
    if unexpected := shard.entries.keys() - expected:
        raise CheckpointError(
            f"{shard.path} holds tensor {min(unexpected)!r} ({len(unexpected)} in all), which {index_name} does not "
            "give to it; the index and the shard are of different saves"
        )


def _inside(folder: Path, name: str) -> Path:
    """The real path of a file in `folder`; a link may lead only to where the module's docstring says."""
    real_folder = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(folder / name))
    roots = [real_folder]
    if real_folder.parent.name == "snapshots":
        roots.append(real_folder.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{folder / name} is a link that leads out of its folder, to {real}; "
            "copy the file into the folder, or give that file's own path"
        )
    return real


def _holds(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"the folder holds {shown}" if names else "the folder is empty"


def _check_zip(file: TensorFile, path: Path) -> None:
    """A zip archive whose records are stored as they are, so that no record is larger than the file."""
    try:
        if not zipfile.is_zipfile(file.path):
            raise CheckpointError(
                f"{path} ({file.size} bytes) is not a zip archive of torch.save: truncated, or older than torch 1.6. "
                "Load it with torch.load(weights_only=True), then save it as model.safetensors."
            )
        with zipfile.ZipFile(file.path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, LookupError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > file.size:
            raise CheckpointError(f"{path}: record {record.filename!r} is compressed or larger than the file; refused")


def _refusal(path: Path, real_path: Path, error: Exception) -> str:
    try:
        unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(real_path))
    except _TORCH_LOAD_ERRORS:
        unsafe = []
    if unsafe:
        return f"{path} was refused, and nothing in it was run: it asks for {', '.join(unsafe)}; weights need none"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{path} was refused by torch's restricted unpickler: {lines[0]}"


def _state_dict(loaded: object, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    for name, tensor in loaded.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name!r} is not a plain tensor but {type(tensor).__name__}")
    return dict(loaded)
