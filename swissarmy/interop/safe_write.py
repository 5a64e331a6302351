"""Writing checkpoints so that a folder is either absent or complete, and saving tensors in the Hugging Face layout.

A folder is filled under a temporary name beside its target, hashed, flushed to disk and renamed. A process that is
killed leaves at most that temporary, `.<name>.tmp-<pid>-<random>`, which nothing reads and `leftovers` lists.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.safetensors_folder import DTYPES, read_header
from swissarmy.interop.tensor_source import TensorFile, explained, parse_json_object

MANIFEST = "manifest.json"
_INDEX = "model.safetensors.index.json"
_TEMPORARY = re.compile(r"\.([^/]+)\.tmp-\d+-[0-9a-f]+")
_PART_BYTES = 16 << 20
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def write_folder(target: str | os.PathLike[str], *, overwrite: bool = False, manifest: bool = True) -> Iterator[Path]:
    """Gives an empty temporary folder to fill; when the block ends without an error it becomes `target`, atomically.

    Every file is flushed to disk first and, with `manifest`, listed in `manifest.json` with its size and sha256.
    `overwrite` replaces a folder that an earlier `write_folder` made and that holds nothing besides; a process killed
    between the two renames leaves the old one as `.<name>.old-<pid>-<random>`.

    Raises:
        CheckpointError: `target` is a file or a folder that is not empty, cannot be written, or the disk is full;
            `target` is untouched and the temporary is removed.
    """
    if "\0" in os.fspath(target):
        raise CheckpointError(f"{os.fspath(target)!r} is not a path: it contains a NUL")
    final_path = Path(os.path.realpath(target))
    _check_target(final_path, overwrite=overwrite)
    temporary = _sibling(final_path, "tmp")
    try:
        with _write_errors(final_path):
            temporary.mkdir(parents=True)
        with _write_errors(final_path, only=_OUT_OF_SPACE):
            yield temporary
        with _write_errors(final_path):
            _flush(temporary, manifest=manifest)
            _move(temporary, final_path, overwrite=overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leftovers(target: str | os.PathLike[str]) -> tuple[Path, ...]:
    """What killed saves of `target` left beside it: `.<name>.tmp-*` (incomplete), `.<name>.old-*` (replaced)."""
    path = Path(os.path.realpath(target))
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(tmp|old)-\d+-[0-9a-f]+")
    if not path.parent.is_dir():
        return ()
    return tuple(sorted(entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)))


def verify_manifest(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Check every file that `manifest.json` lists, and give their names; files it does not list are not looked at.

    Raises:
        CheckpointError: the manifest is missing or malformed, or names the first file that is missing or differs.
    """
    root = Path(folder)
    listed = _read_manifest(root)
    for name, (size, sha256) in listed.items():
        file = TensorFile(root / name)
        if file.size != size:
            raise CheckpointError(
                f"{file.path} has {file.size} bytes, {MANIFEST} says {size}: it is not what was saved"
            )
        if _sha256(file.path) != sha256:
            raise CheckpointError(f"{file.path} differs from what was saved (sha256); copy or download it again")
    return tuple(listed)


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
        with _write_errors(root, only=_OUT_OF_SPACE):
            shards = [
                _write_shard(_temporary_file(root, made), shard, {"format": "pt"} if metadata is None else metadata)
                for shard in _split(pairs, max_shard_bytes)
            ]
        with _write_errors(root):
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
    with _write_errors(path), open(path, "xb") as file:
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
    temporary.write_text(_dump({"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}))
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
    path = _sibling(root / "model", "tmp")
    made.append(path)
    return path


def _sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def _check_target(path: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    with _write_errors(path):
        present = {file.relative_to(path).as_posix() for file in _files(path)} if path.is_dir() else None
    if present is None:
        raise CheckpointError(f"{path} is a file; give the name of a folder")
    if not os.listdir(path):
        return
    if not overwrite:
        raise CheckpointError(
            f"{path} exists and is not empty; it is never written over in place: "
            "choose another name, delete it, or pass overwrite=True"
        )
    strangers = present - {*_read_manifest(path), MANIFEST}
    if strangers:
        raise CheckpointError(f"{path} holds {min(strangers)!r}, which no save wrote; overwrite=True would delete it")


def _files(folder: Path) -> list[Path]:
    return sorted(Path(parent) / name for parent, _, names in os.walk(folder) for name in names)


def _flush(folder: Path, *, manifest: bool) -> None:
    """Force every file and folder to disk; with `manifest`, hash the files and write the list."""
    listed: dict[str, dict[str, object]] = {}
    for path in _files(folder):
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path.name} is not a regular file; a checkpoint holds only those")
        if manifest:
            size, sha256 = path.stat().st_size, _sha256(path)
            listed[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": sha256}
        _fsync(path)
    if MANIFEST in listed:
        raise CheckpointError(f"{MANIFEST} is the name of the list of files; give that file another name")
    if manifest:
        (folder / MANIFEST).write_text(_dump({"format": 1, "files": listed}))
        _fsync(folder / MANIFEST)
    for parent, _, _ in os.walk(folder, topdown=False):
        _fsync(Path(parent))


def _move(temporary: Path, target: Path, *, overwrite: bool) -> None:
    aside = None
    if overwrite and target.is_dir() and os.listdir(target):
        aside = _sibling(target, "old")
        os.rename(target, aside)
    try:
        os.rename(temporary, target)  # fails if somebody has put files there meanwhile
    except OSError:
        if aside is not None:
            os.rename(aside, target)
        raise
    _fsync(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _read_manifest(root: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 by file name, relative to `root`."""
    file = TensorFile(root / MANIFEST)
    content = parse_json_object(file.read_bytes(0, file.size), str(file.path))
    files = content.get("files")
    if content.keys() != {"format", "files"} or content["format"] != 1 or not isinstance(files, dict):
        raise CheckpointError(f"{file.path} is not a list of files with their sha256, format 1")
    result: dict[str, tuple[int, str]] = {}
    for name, fields in files.items():
        if not isinstance(fields, dict) or fields.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{file.path}: {name!r} needs exactly `bytes` and `sha256`")
        if "\0" in name or not Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root)):
            raise CheckpointError(f"{file.path}: {name!r} is not a file inside the folder")
        result[name] = (fields["bytes"], fields["sha256"])
    return result


def _sha256(path: Path) -> str:
    with explained(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


@contextmanager
def _write_errors(path: Path, *, only: frozenset[int] | None = None) -> Iterator[None]:
    """An OSError inside (with `only`, one of those errnos) becomes a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        shown = _TEMPORARY.sub(r"\1", str(path))  # the name that it would have had
        raise CheckpointError(f"{shown} was not written: {error.strerror or error}{where}{_room(path)}") from error


def _room(path: Path) -> str:
    try:
        return f"; {shutil.disk_usage(path.parent).free >> 20} MiB are free there"
    except OSError:
        return ""
