"""Saving tensors in the Hugging Face layout: one safetensors file, or shards and an index, made tensor by tensor."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.safe_write import OUT_OF_SPACE, dump, sibling, write_errors
from swissarmy.interop.safetensors_folder import DTYPES, read_header
from swissarmy.interop.tensor_source import TensorFile

_INDEX = "model.safetensors.index.json"
_PART_BYTES = 16 << 20
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@final
@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor to save that is made only when its turn comes and let go at once, such as a concatenation."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Saved = torch.Tensor | LazyTensor


def save_safetensors(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Saved] | Iterable[tuple[str, Saved]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Write `model.safetensors`, or numbered shards and `model.safetensors.index.json`, into an existing folder.

    A tensor that is not contiguous or not on the CPU is copied alone, and let go before the next. An iterable is
    consumed shard by shard. `metadata` goes into each file's header; by default `{"format": "pt"}`.

    Returns:
        The names of the files written, the index last.

    Raises:
        CheckpointError: weights are there already, two names are one tensor, a tensor cannot be saved, or the disk
            is full; nothing is left behind.
    """
    root = Path(folder)
    _check_no_weights(root)
    pairs: Iterable[tuple[str, Saved]] = tensors if not isinstance(tensors, Mapping) else tensors.items()
    if isinstance(tensors, Mapping):
        for name, tensor in pairs:
            _check_saved(name, tensor)
        _refuse_shared(tensors)  # across shards too; of an iterable only one shard is alive at a time
    made: list[Path] = []
    try:
        with write_errors(root, only=OUT_OF_SPACE):
            shards = [
                _write_shard(_temporary_file(root, made), shard, {"format": "pt"} if metadata is None else metadata)
                for shard in _split(pairs, max_shard_bytes)
            ]
        with write_errors(root):
            return _publish(root, shards, made)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, kw_only=True)
class _WrittenShard:
    path: Path
    names: tuple[str, ...]
    nbytes: int
    parameters: int


def _write_shard(path: Path, shard: dict[str, Saved], metadata: Mapping[str, str]) -> _WrittenShard:
    """Write one safetensors file, emptying `shard` on the way, so that each tensor can go when it is written."""
    # Wide dtypes first, as the safetensors library does: every tensor is then aligned to its own element.
    names = tuple(sorted(shard, key=lambda name: (-shard[name].dtype.itemsize, name)))
    nbytes = sum(tensor.nbytes for tensor in shard.values())
    parameters = sum(math.prod(tensor.shape) for tensor in shard.values())
    with write_errors(path), open(path, "xb") as file:
        file.write(_header(names, shard, metadata))
        for name in names:
            file.writelines(_parts(name, shard.pop(name)))
    read_header(TensorFile(path))  # the file on disk is as long as its header says
    return _WrittenShard(path=path, names=names, nbytes=nbytes, parameters=parameters)


def _header(names: tuple[str, ...], shard: Mapping[str, Saved], metadata: Mapping[str, str]) -> bytes:
    """The header with its length before it, padded so that the tensors start at a multiple of 8 bytes."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name in names:
        tensor = shard[name]
        offsets = [position, position + tensor.nbytes]
        fields[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parts(name: str, saved: Saved) -> Iterator[memoryview]:
    """The bytes of a tensor in order; whatever has to be copied (strides, devices) is copied a part at a time."""
    tensor = saved.make() if isinstance(saved, LazyTensor) else saved
    if tuple(tensor.shape) != tuple(saved.shape) or tensor.dtype != saved.dtype:
        raise CheckpointError(
            f"tensor {name!r} was announced as {tuple(saved.shape)} {saved.dtype} "
            f"and made as {tuple(tensor.shape)} {tensor.dtype}"
        )
    plain = tensor.detach().resolve_conj().resolve_neg()
    rows = plain if plain.dim() else plain.unsqueeze(0)
    step = max(1, _PART_BYTES * len(rows) // max(1, rows.nbytes))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].cpu().contiguous()
        yield part.reshape(-1).view(torch.uint8).numpy().data


def _split(pairs: Iterable[tuple[str, Saved]], limit: int) -> Iterator[dict[str, Saved]]:
    """Groups of at most `limit` bytes (or one tensor), in the order given; one empty group if there is nothing."""
    if limit < 1:
        raise CheckpointError(f"max_shard_bytes is {limit}; it must be at least 1")
    seen: set[str] = set()
    shard: dict[str, Saved] = {}
    size = 0
    for name, tensor in pairs:
        _check_saved(name, tensor)
        if name in seen:
            raise CheckpointError(f"tensor {name!r} is given twice")
        if shard and size + tensor.nbytes > limit:
            _refuse_shared(shard)
            yield shard
            shard, size = {}, 0
        seen.add(name)
        shard[name] = tensor
        size += tensor.nbytes
    if shard or not seen:
        _refuse_shared(shard)
        yield shard


def _publish(root: Path, shards: list[_WrittenShard], made: list[Path]) -> tuple[str, ...]:
    """Give the shards their names, which depend on how many there are, and write the index last."""
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    for shard, name in zip(shards, names, strict=True):
        made.append(root / name)
        os.rename(shard.path, root / name)
    if count == 1:
        return tuple(names)
    weight_map = {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard.names}
    totals = {
        "total_size": sum(shard.nbytes for shard in shards),
        "total_parameters": sum(shard.parameters for shard in shards),
    }
    temporary = _temporary_file(root, made)
    temporary.write_text(dump({"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}))
    os.rename(temporary, root / _INDEX)
    return (*names, _INDEX)


def _check_no_weights(root: Path) -> None:
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a folder; create it first, or use `write_folder`")
    present = sorted(path.name for path in root.iterdir() if _WEIGHTS.fullmatch(path.name))
    if present:
        raise CheckpointError(
            f"{root} already holds {present[0]}; weights are never overwritten, choose another folder"
        )


def _check_saved(name: str, tensor: Saved) -> None:
    if name == "__metadata__" or any("\ud800" <= character <= "\udfff" for character in name):
        raise CheckpointError(f"a tensor cannot be called {name!r} in a safetensors file")
    if tensor.dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
    if isinstance(tensor, torch.Tensor) and (tensor.layout != torch.strided or tensor.is_meta):
        kind = "on the meta device, without data" if tensor.is_meta else f"of layout {tensor.layout}"
        raise CheckpointError(f"tensor {name!r} is {kind}; only dense tensors can be saved")


def _refuse_shared(tensors: Mapping[str, Saved]) -> None:
    owners: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, LazyTensor) or tensor.numel() == 0:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = owners.setdefault(key, name)
        if owner != name:
            raise CheckpointError(
                f"{owner!r} and {name!r} are one tensor; save it under one name and tie it on loading"
            )


def _temporary_file(root: Path, made: list[Path]) -> Path:
    path = sibling(root / "model", "tmp")
    made.append(path)
    return path
